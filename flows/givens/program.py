"""A schedule as tiles: groups of rotations on few rows, which stay in registers meanwhile.

Rotations without a common axis commute, so the recursions of ``crossing`` and ``cosine_sine``
may also run depth first, small blocks whole: their rows are then still in cache. Other
schedules are tiles of one rotation each, in their own order. Read by ``compiled.py`` only.
"""

from functools import lru_cache
from typing import NamedTuple

import numpy as np

from flows.givens.lanes import CROSS, LEAF, PAIR, PATTERNS, ROWS, SINGLE, TURNS
from flows.givens.schedule import Schedule
from flows.native import njit

__all__ = ["Program", "program"]


class Program(NamedTuple):
    """Tiles in order of application, their rows and turns one after another."""

    runs: np.ndarray  # (runs, 5) int64: pattern, tiles, first tile, first row, first turn
    rows: np.ndarray  # int32: rows of all tiles
    number: np.ndarray  # (num_angles,) int64: which angle each turn takes
    span: np.ndarray  # (tiles, 2) int32: outside these columns of the matrix the rows are zero


def program(schedule: Schedule, *, inverse: bool = False) -> Program:
    """The tiles of a schedule, or of the rotations that undo it; built once."""
    return schedule.remember(("program", inverse), lambda: _build(schedule, inverse))


def _build(schedule: Schedule, inverse: bool) -> Program:
    mirrored = inverse and schedule.name.startswith("cosine_sine(")
    planes, kind, angle = _turns(schedule, mirrored)
    pattern = _tile_patterns(kind)
    step = -1 if inverse and not mirrored else 1
    pattern = pattern[::step]
    first_row, first_turn = (_ends(size[pattern]) for size in (ROWS, TURNS))
    rows, number = np.empty(first_row[-1], np.int32), np.empty(len(angle), np.int64)
    for k, planes_of_tile in enumerate(PATTERNS):
        mine, turns = kind == k, TURNS[k]
        positions = [axis for plane in planes_of_tile for axis in plane]
        of_row = [positions.index(row) for row in range(ROWS[k])]
        tile_rows = planes[mine].reshape(-1, 2 * turns)[:, of_row]
        tile_angles = angle[mine].reshape(-1, turns)
        if inverse:
            row, turn = _undoing(k, mirrored)
            tile_rows, tile_angles = tile_rows[::step, row], tile_angles[::step, turn]
        tiles = pattern == k
        rows[first_row[:-1][tiles, None] + np.arange(ROWS[k])] = tile_rows
        number[first_turn[:-1][tiles, None] + np.arange(turns)] = tile_angles
    first = np.flatnonzero(np.diff(pattern, prepend=-1))
    count = np.diff(first, append=len(pattern))
    runs = np.stack([pattern[first], count, first, first_row[first], first_turn[first]], 1)
    span = np.empty((len(pattern), 2), np.int32)
    _fill_span(schedule.dim, runs.astype(np.int64), rows, ROWS, span)
    return Program(runs.astype(np.int64), rows, number, span)


def _turns(schedule: Schedule, mirrored: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Planes (turns, 2) in order of application, the pattern and the angle of each turn."""
    recursion = _RECURSIONS.get(schedule.name.partition("(")[0])
    if recursion is None:
        planes = schedule.planes.numpy()
        return planes, np.zeros(len(planes), np.int8), np.arange(len(planes))
    planes, kind = recursion(schedule.dim)
    angle, kind = _angle_numbers(planes, schedule, mirrored), kind.copy()
    # A tile that misses a plane of the schedule is cut into single turns.
    for k in (CROSS, LEAF, PAIR):
        at = np.flatnonzero(kind == k).reshape(-1, TURNS[k])
        kind[at[(angle[at] < 0).any(1)]] = SINGLE
    there = angle >= 0
    return planes[there], kind[there], angle[there]


def _tile_patterns(kind: np.ndarray) -> np.ndarray:
    """From the pattern of each turn to the pattern of each tile."""
    start = np.flatnonzero(np.diff(kind, prepend=-1))
    return np.repeat(kind[start], np.diff(start, append=len(kind)) // TURNS[kind[start]])


def _ends(sizes: np.ndarray) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(sizes)])


def _angle_numbers(planes: np.ndarray, schedule: Schedule, mirrored: bool) -> np.ndarray:
    """The angle of each turn, -1 where a restriction has left it out.

    The k-th turn of a plane here is the k-th in the schedule: restrictions leave out all
    turns of a plane, or the last ones. Mirrored, it is the k-th from the end.
    """

    def key(planes: np.ndarray, mirrored: bool = False) -> np.ndarray:
        n = schedule.dim
        plane = planes[:, 0] * n + planes[:, 1]
        order = np.argsort(plane, kind="stable")
        ordered = plane[order]
        occurrence = np.empty(len(plane), np.int64)
        index = np.arange(len(plane))
        last = np.searchsorted(ordered, ordered, side="right") - 1
        first = np.searchsorted(ordered, ordered)
        occurrence[order] = last - index if mirrored else index - first
        return occurrence * n * n + plane

    kept, wanted = key(schedule.planes.numpy()), key(planes, mirrored)
    of_kept, of_wanted = np.argsort(kept), np.argsort(wanted)
    at = np.searchsorted(kept[of_kept], wanted[of_wanted]).clip(max=len(kept) - 1)
    number = np.empty(len(wanted), np.int64)
    number[of_wanted] = of_kept[at]
    return np.where(kept[number] == wanted, number, -1)


@njit
def _fill_span(dim, runs, rows, sizes, span):
    """Starting from the identity, where each row may differ from zero, tile after tile."""
    low, high = np.arange(dim), np.arange(1, dim + 1)
    for kind, count, first, row, _ in runs:
        for tile in range(first, first + count):
            mine = rows[row : row + sizes[kind]]
            row += sizes[kind]
            span[tile, 0], span[tile, 1] = low[mine].min(), high[mine].max()
            for axis in mine:
                low[axis], high[axis] = span[tile]


# --- the recursions: planes (turns, 2) depth first, and the pattern of each turn --------------

_Turns = tuple[np.ndarray, np.ndarray]


def _chain(*parts: _Turns) -> _Turns:
    planes, kinds = zip(*parts, strict=True)
    return np.concatenate(planes), np.concatenate(kinds)


def _moved(turns: _Turns, *by: int) -> _Turns:
    return turns[0] + np.array(by), turns[1]


def _single_turns(planes: list[tuple[int, int]] | np.ndarray) -> _Turns:
    planes = np.array(planes, np.int64).reshape(-1, 2)
    return planes, np.full(len(planes), SINGLE, np.int8)


def _tile(kind: int) -> _Turns:
    return np.array(PATTERNS[kind]), np.full(len(PATTERNS[kind]), kind, np.int8)


@lru_cache(maxsize=64)
def _crossing(n: int) -> _Turns:
    """T(n) = X(A, B) (T(A) + T(B))."""
    if n == 1:
        return _single_turns([])
    a, b = n // 2, n - n // 2
    return _chain(_crossing(a), _moved(_crossing(b), a, a), _moved(_meeting(a, b), 0, a))


@lru_cache(maxsize=256)
def _meeting(a: int, b: int) -> _Turns:
    """X of a axes and b others, each counted from zero: quarter after quarter, in fours."""
    if a == b == 4:
        return _moved(_tile(CROSS), 0, -4)
    if a <= 4 and b <= 4:
        return _single_turns([(i, k) for i in reversed(range(a)) for k in range(b)])
    # The axes in the middle meet first; parts smaller than four are left at the far ends.
    near_a, near_b = min(a, _half_in_fours(a)), min(b, _half_in_fours(b))
    far_a, far_b = a - near_a, b - near_b
    quarters = [(far_a, 0, near_a, near_b), (0, 0, far_a, near_b)]
    quarters += [(far_a, near_b, near_a, far_b), (0, near_b, far_a, far_b)]
    return _chain(*(_moved(_meeting(p, q), i, k) for i, k, p, q in quarters if p and q))


def _half_in_fours(size: int) -> int:
    return 4 * -(-size // 8)


@lru_cache(maxsize=64)
def _cosine_sine(n: int) -> _Turns:
    """Q = (U1 + U2) CS (V1 + V2)."""
    if n == 1:
        return _single_turns([])
    if n % 8 == 0 and (n // 8).bit_count() == 1:
        leaves = [_moved(_tile(LEAF), k, k) for k in range(0, n, 8)]
        return _chain(*leaves, _after_leaves(n))
    p = (n + 1) // 2
    sides = _chain(_cosine_sine(p), _moved(_cosine_sine(n - p), p, p))
    return _chain(sides, _single_turns([(k, p + k) for k in range(n - p)]), sides)


@lru_cache(maxsize=64)
def _after_leaves(n: int) -> _Turns:
    """The same where the first turns of all eights are made: the next follow each CS at once."""
    if n == 8:
        return _single_turns([])
    half = n // 2
    planes, kind = _tile(PAIR)
    pairs = [(planes + np.where(planes < 8, k, half - 8 + k), kind) for k in range(0, half, 8)]
    sides = _chain(_after_leaves(half), _moved(_after_leaves(half), half, half))
    return _chain(sides, *pairs, sides)


_RECURSIONS = {"crossing": _crossing, "cosine_sine": _cosine_sine}


# --- the way back -----------------------------------------------------------------------------

# The turn of (i, j) by -t is that of (j, i) by t: rows of a tile in an order that swaps planes.
_SWAPPED = (
    [1, 0],
    [4, 5, 6, 7, 0, 1, 2, 3],
    list(reversed(range(8))),
    list(reversed(range(16))),
)


@lru_cache
def _undoing(kind: int, mirrored: bool) -> tuple[list[int], list[int]]:
    """For a tile that undoes turns: its rows, and for each of its turns the one it undoes.

    What undoes a schedule takes its tiles last first. ``cosine_sine`` may as well be taken from
    the front: read backwards its planes are the same, so that only angles change places.
    """
    row, pattern = _SWAPPED[kind], PATTERNS[kind]
    swapped = [(row.index(j), row.index(i)) for i, j in pattern]
    left = list(range(len(pattern)))[:: 1 if mirrored else -1]
    turn = []
    for plane in pattern:
        turn.append(next(k for k in left if swapped[k] == plane))
        left.remove(turn[-1])
    return row, turn
