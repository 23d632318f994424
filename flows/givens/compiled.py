"""Compiled for the CPU: a slab of columns stays in cache through all rotations.

An engine of ``autograd.py``. Each tile of the program (``program.py``) loads a few rows of the
slab into vector registers, turns them, and stores them (``lanes.py``). A turn by t is three
shears, with tau = tan(t / 2) and s = sin t,

    x_i <- x_i - tau x_j        x_j <- x_j + s x_i        x_i <- x_i - tau x_j

that is three fused multiply-adds, where the definition takes four operations. They want
|t| <= pi / 2: half turns are signs of two rows, and are carried to the end. Where each sample
has angles of its own, samples lie side by side in a vector and are turned by c and s.
README.md derives and counts.
"""

import ctypes
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from flows.givens.lanes import VECTOR, njit, tile, turn_lanes
from flows.givens.program import CROSS, LEAF, PAIR, PATTERNS, ROWS, SINGLE, TURNS, program
from flows.givens.schedule import Schedule

__all__ = ["pull", "turn"]

# Bytes in a row of a slab: of columns at most, so that turns are seldom read; of samples.
ROW, ROW_EACH = 1024, 256
# So many turns of a vector are worth a thread of their own: some 100 microseconds.
TURNS_PER_THREAD = 100_000
# Turns of a slab of samples that are made from their angles at a time.
CHUNK = 64


# --- the engine ---------------------------------------------------------------------------------


def turn(x: Tensor | None, angles: Tensor, schedule: Schedule, inverse: bool) -> Tensor:
    """Rows x (sets, rows, dim), turned by the angles (sets, num_angles) of their set.

    Without x, the matrix of each set (sets, dim, dim).
    """
    if angles.device.type != "cpu":
        raise ValueError(f"impl='compiled' works on the CPU, got tensors on {angles.device}.")
    if angles.dtype not in (torch.float32, torch.float64):
        y = turn(None if x is None else x.float(), angles.float(), schedule, inverse)
        return y.to(angles.dtype)
    n, columns = schedule.dim, x is None
    y = angles.new_empty((len(angles), n, n)) if columns else angles.new_empty(x.shape)
    if _own_angles(y, columns):
        sides = _array(x)[:, 0], _array(y)[:, 0], _array(angles)
        _each(_turn_each, sides, schedule, inverse)
    else:
        sides = _array(y if columns else x), _array(y)
        _shared(sides, angles, schedule, inverse, columns)
    return y


def pull(
    y: Tensor, grad: Tensor, angles: Tensor, schedule: Schedule, inverse: bool, *, columns: bool
) -> tuple[Tensor, Tensor]:
    """Gradients of x, unless ``columns``, and angles from what ``turn`` returned."""
    if angles.dtype not in (torch.float32, torch.float64):
        full = (t.float() for t in (y, grad, angles))
        dx, dangles = pull(*full, schedule, inverse, columns=columns)
        return dx.to(y.dtype), dangles.to(angles.dtype)
    dangles = angles.new_empty(angles.shape)
    dx = grad.new_empty((0, *grad.shape[1:]) if columns else grad.shape)
    if _own_angles(y, columns):
        rows = (_array(t)[:, 0] for t in (y, grad, dx))
        _each(_pull_each, (*rows, _array(angles), _array(dangles)), schedule, inverse)
    else:
        sides = _array(y), _array(grad), _array(dx)
        _shared(sides, angles, schedule, inverse, columns, dangles)
    return dx, dangles


def _array(tensor: Tensor) -> np.ndarray:
    return tensor.detach().resolve_neg().contiguous().numpy()


def _own_angles(y: Tensor, columns: bool) -> bool:
    return not columns and y.shape[0] > 1 and y.shape[1] == 1


def _shared(
    sides: tuple[np.ndarray, ...],
    angles: Tensor,
    schedule: Schedule,
    inverse: bool,
    columns: bool,
    dangles: Tensor | None = None,
) -> None:
    """Turn (x, y), or pull (y, grad, dx), where a set of angles turns several columns."""
    x, (runs, rows, number, span) = sides[0], program(schedule, inverse=inverse)
    sets, count = len(x), x.shape[2 if columns else 1]
    vectors = -(-count * x.itemsize // VECTOR)
    threads = _threads(sets * vectors * len(number))
    slabs = -(-vectors * VECTOR // ROW)
    if sets < threads:  # equal shares
        slabs = -(-slabs // threads) * threads
    width = -(-vectors // max(slabs, 1)) * VECTOR // x.itemsize
    jobs = sets * -(-count // max(width, 1))
    table = np.empty((sets, len(number), 2), x.dtype)
    direction = np.empty((sets, len(number)), x.dtype)
    given = _array(angles), number, table, direction
    _parallel(_shears, given, direction.size, threads)
    signs = _carry_signs(schedule.dim, runs, rows, table, direction)
    given = *sides, columns, width, runs, rows, span, table, signs
    if dangles is None:
        _parallel(_turn_shared, given, jobs, threads)
    else:
        sums = np.zeros((threads, sets, len(number)), x.dtype)
        _parallel(_pull_shared, (*given, sums), jobs, threads)
        given = sums, number, direction, _array(dangles)
        _parallel(_collect, given, len(number), threads)


def _each(
    loop: Callable, arrays: tuple[np.ndarray, ...], schedule: Schedule, inverse: bool
) -> None:
    """Turn or pull where each row has angles of its own."""
    x = arrays[0]
    jobs = -(-len(x) * x.itemsize // ROW_EACH)
    # Making a turn from its angle costs about eight times the turn.
    threads = _threads(8 * jobs * (ROW_EACH // VECTOR) * schedule.num_angles)
    _parallel(loop, (*arrays, schedule.planes.numpy(), inverse), jobs, threads)


# --- threads ------------------------------------------------------------------------------------


def _threads(turns: int) -> int:
    return max(1, min(torch.get_num_threads(), turns // TURNS_PER_THREAD))


_BODY = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


@lru_cache
def _openmp() -> ctypes.CDLL | None:
    """The OpenMP runtime that comes with torch, if it is GNU's."""
    for path in Path(torch.__file__).parent.glob("lib/libgomp*.so*"):
        library = ctypes.CDLL(str(path))
        library.GOMP_parallel.argtypes = [_BODY, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
        return library
    return None


@lru_cache(maxsize=1)
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, "flows.givens")


def _parallel(loop: Callable, given: tuple, jobs: int, threads: int) -> None:
    """loop(*given, k, first, last) for ``threads`` consecutive shares of the jobs."""
    if threads == 1:
        loop(*given, 0, 0, jobs)
        return
    ends = [jobs * k // threads for k in range(threads + 1)]
    openmp = _openmp()
    if openmp is None:
        pool = _pool(torch.get_num_threads())
        list(pool.map(lambda k: loop(*given, k, ends[k], ends[k + 1]), range(threads)))
        return
    # On torch's own threads: those wait for work by spinning, so that others would have to
    # share the cores with them.
    errors = []

    def body(_: None) -> None:
        try:
            for k in range(openmp.omp_get_thread_num(), threads, openmp.omp_get_num_threads()):
                loop(*given, k, ends[k], ends[k + 1])
        except BaseException as error:  # cannot leave a foreign function
            errors.append(error)

    openmp.GOMP_parallel(_BODY(body), None, threads, 0)
    if errors:
        raise errors[0]


# --- turns from angles --------------------------------------------------------------------------

# pi in three parts, the first two with trailing zeros (Cody and Waite 1980).
_PI = (2 * 1.57079632673412561417, 2 * 6.07710050630396597660e-11, 2 * 2.02226624879595063154e-21)


@njit
def _half_angle(angle):
    """sin h, cos h with angle = 2 h + k pi, |h| <= pi / 4, and whether k is odd (0. or 1.)."""
    k = np.floor(angle * 0.3183098861837907 + 0.5)
    h = 0.5 * (((angle - k * _PI[0]) - k * _PI[1]) - k * _PI[2])
    z = h * h
    # Minimax polynomials (fdlibm), in double precision for either type of angles.
    p = -2.50507602534068634195e-08 + z * 1.58969099521155010221e-10
    p = -1.98412698298579493134e-04 + z * (2.75573137070700676789e-06 + z * p)
    sin = h + h * z * (-1.66666666666666324348e-01 + z * (8.33333333332248946124e-03 + z * p))
    p = 2.08757232129817482790e-09 - z * 1.13596475577881948265e-11
    p = 2.48015872894767294178e-05 + z * (-2.75573143513906633035e-07 + z * p)
    p = 4.16666666666666019037e-02 + z * (-1.38888888888741095749e-03 + z * p)
    return sin, 1.0 - 0.5 * z + z * z * p, k - 2.0 * np.floor(0.5 * k)


_PLANES = tuple(np.array(pattern, np.int64) for pattern in PATTERNS)


@njit
def _shears(angles, number, table, direction, thread, first, last):
    """For the turns first:last of all sets: tau and s, and -1 in place of 1 for a half turn."""
    turns, size = len(number), 256
    buffer = np.empty((3, size))
    for begin in range(first, last, size):
        end = min(begin + size, last)
        for k in range(begin, end):
            buffer[0, k - begin] = angles[k // turns, number[k % turns]]
        for k in range(end - begin):
            sin, cos, odd = _half_angle(buffer[0, k])
            buffer[0, k], buffer[1, k], buffer[2, k] = sin / cos, 2.0 * sin * cos, odd
        for k in range(begin, end):
            n, t = k // turns, k % turns
            table[n, t, 0], table[n, t, 1] = buffer[0, k - begin], buffer[1, k - begin]
            direction[n, t] = 1.0 - 2.0 * buffer[2, k - begin]


@njit
def _carry_signs(dim, runs, rows, table, direction):
    """Signs (sets, dim) of the rows in the end.

    A half turn changes the signs of its rows. They are carried past later turns, which change
    direction where one of their two rows has changed; ``direction`` tells that afterwards.
    """
    signs = np.ones((len(table), dim), table.dtype)
    for n in range(len(table)):
        if not (direction[n] < 0.0).any():
            continue
        for run in range(len(runs)):
            kind, tiles, _, row, turn = runs[run]
            pattern = _PLANES[kind]
            for _ in range(tiles):
                for k in range(len(pattern)):
                    i, j = rows[row + pattern[k, 0]], rows[row + pattern[k, 1]]
                    half, sign = direction[n, turn + k], signs[n, i] * signs[n, j]
                    table[n, turn + k, 0] *= sign
                    table[n, turn + k, 1] *= sign
                    direction[n, turn + k] = sign
                    signs[n, i] *= half
                    signs[n, j] *= half
                row += ROWS[kind]
                turn += len(pattern)
    return signs


@njit
def _collect(sums, number, direction, dangles, thread, first, last):
    """The sums of all threads (threads, sets, turns), those of first:last, to their angles."""
    for n in range(len(dangles)):
        for k in range(first, last):
            total = sums[0, n, k]
            for other in range(1, len(sums)):
                total += sums[other, n, k]
            dangles[n, number[k]] = direction[n, k] * total


# --- slabs --------------------------------------------------------------------------------------


@njit
def _slab(rows, width, like):
    """Memory for a slab whose rows begin where vectors do."""
    size = like.itemsize
    memory = np.empty(rows * width + VECTOR // size, like.dtype)
    start = (-memory.ctypes.data % VECTOR) // size
    return memory[start : start + rows * width].reshape(rows, width)


@njit
def _load(x, signs, columns, first, last, slab):
    """Columns, or rows, first:last of x as columns of the slab; those left over are zero."""
    for k in range(len(slab)):
        for c in range(last - first, slab.shape[1]):
            slab[k, c] = 0.0
    if columns:
        for k in range(len(slab)):
            for c in range(first, last):
                slab[k, c - first] = signs[k] * x[k, c]
    else:
        for c in range(first, last):
            for k in range(len(slab)):
                slab[k, c - first] = signs[k] * x[c, k]


@njit
def _save(slab, signs, columns, first, last, y):
    if columns:
        for k in range(len(slab)):
            for c in range(first, last):
                y[k, c] = signs[k] * slab[k, c - first]
    else:
        for c in range(first, last):
            for k in range(len(slab)):
                y[c, k] = signs[k] * slab[k, c - first]


# --- shared angles ------------------------------------------------------------------------------

_single, _undo_single = tile(PATTERNS[SINGLE])
_cross, _undo_cross = tile(PATTERNS[CROSS])
_leaf, _undo_leaf = tile(PATTERNS[LEAF])
_pair, _undo_pair = tile(PATTERNS[PAIR])


@njit
def _turn_shared(
    x, y, columns, width, runs, rows, span, table, signs, thread, first, last
):  # fmt: skip
    dim, count = signs.shape[1], y.shape[2] if columns else y.shape[1]
    vectors, slabs = width * y.itemsize // VECTOR, (count + width - 1) // width
    slab, plus = _slab(dim, width, y), np.ones(dim, y.dtype)
    for job in range(first, last):
        n, low = job // slabs, job % slabs * width
        high = min(low + width, count)
        if columns:
            slab[:] = 0.0
            for k in range(low, high):
                slab[k, k - low] = 1.0
        else:
            _load(x[n], plus, False, low, high, slab)
        for run in range(len(runs)):
            kind, tiles, begin, row, turn = runs[run]
            for t in range(begin, begin + tiles):
                if columns and (span[t, 0] >= high or span[t, 1] <= low):
                    pass  # these rows are still zero
                elif kind == CROSS:
                    _cross(slab, vectors, rows, row, table[n], turn)
                elif kind == LEAF:
                    _leaf(slab, vectors, rows, row, table[n], turn)
                elif kind == PAIR:
                    _pair(slab, vectors, rows, row, table[n], turn)
                else:
                    _single(slab, vectors, rows, row, table[n], turn)
                row += ROWS[kind]
                turn += TURNS[kind]
        _save(slab, signs[n], columns, low, high, y[n])


@njit
def _pull_shared(
    y, grad, dx, columns, width, runs, rows, span, table, signs, sums, thread, first, last
):  # fmt: skip
    dim, count = signs.shape[1], y.shape[2] if columns else y.shape[1]
    vectors, slabs = width * y.itemsize // VECTOR, (count + width - 1) // width
    slab, slope, plus = _slab(dim, width, y), _slab(dim, width, y), np.ones(dim, y.dtype)
    for job in range(first, last):
        n, low = job // slabs, job % slabs * width
        high = min(low + width, count)
        _load(y[n], signs[n], columns, low, high, slab)
        _load(grad[n], signs[n], columns, low, high, slope)
        for run in range(len(runs) - 1, -1, -1):
            kind, tiles, begin, row, turn = runs[run]
            row += tiles * ROWS[kind]
            turn += tiles * TURNS[kind]
            for t in range(begin + tiles - 1, begin - 1, -1):
                row -= ROWS[kind]
                turn -= TURNS[kind]
                if columns and (span[t, 0] >= high or span[t, 1] <= low):
                    pass
                elif kind == CROSS:
                    _undo_cross(slab, slope, vectors, rows, row, table[n], turn, sums[thread, n])
                elif kind == LEAF:
                    _undo_leaf(slab, slope, vectors, rows, row, table[n], turn, sums[thread, n])
                elif kind == PAIR:
                    _undo_pair(slab, slope, vectors, rows, row, table[n], turn, sums[thread, n])
                else:
                    _undo_single(slab, slope, vectors, rows, row, table[n], turn, sums[thread, n])
        if not columns:
            _save(slope, plus, False, low, high, dx[n])


# --- angles per sample --------------------------------------------------------------------------


@njit
def _make_turns(angles, numbers, low, high, inverse, cos, sin):
    """Rows of cos and sin: the turns with these numbers; lanes are the samples low:high."""
    sign = -1.0 if inverse else 1.0
    for lane in range(high - low):
        for k in range(len(numbers)):
            cos[k, lane] = angles[low + lane, numbers[k]]
    for k in range(len(numbers)):
        for lane in range(high - low, cos.shape[1]):
            cos[k, lane] = 0.0
        for lane in range(cos.shape[1]):
            sin_h, cos_h, odd = _half_angle(np.float64(cos[k, lane]))
            half = 1.0 - 2.0 * odd
            cos[k, lane] = half * (1.0 - 2.0 * sin_h * sin_h)
            sin[k, lane] = sign * half * 2.0 * sin_h * cos_h


@njit
def _turn_each(x, y, angles, planes, inverse, thread, first, last):
    dim, width = x.shape[1], ROW_EACH // x.itemsize
    vectors = ROW_EACH // VECTOR
    slab, plus = _slab(dim, width, x), np.ones(dim, x.dtype)
    cos, sin = _slab(CHUNK, width, x), _slab(CHUNK, width, x)
    order = np.arange(len(planes))
    if inverse:
        order = order[::-1].copy()
    for job in range(first, last):
        low, high = job * width, min((job + 1) * width, len(x))
        _load(x, plus, False, low, high, slab)
        for start in range(0, len(order), CHUNK):
            numbers = order[start : start + CHUNK]
            _make_turns(angles, numbers, low, high, inverse, cos, sin)
            for k in range(len(numbers)):
                i, j = planes[numbers[k], 0], planes[numbers[k], 1]
                turn_lanes(slab, vectors, i, j, cos, sin, k)
        _save(slab, plus, False, low, high, y)


@njit
def _pull_each(y, grad, dx, angles, dangles, planes, inverse, thread, first, last):
    dim, width = y.shape[1], ROW_EACH // y.itemsize
    vectors = ROW_EACH // VECTOR
    slab, slope, plus = _slab(dim, width, y), _slab(dim, width, y), np.ones(dim, y.dtype)
    cos, sin = _slab(CHUNK, width, y), _slab(CHUNK, width, y)
    order, sign = np.arange(len(planes)), -1.0 if inverse else 1.0
    if not inverse:
        order = order[::-1].copy()
    for job in range(first, last):
        low, high = job * width, min((job + 1) * width, len(y))
        _load(y, plus, False, low, high, slab)
        _load(grad, plus, False, low, high, slope)
        for start in range(0, len(order), CHUNK):
            numbers = order[start : start + CHUNK]
            _make_turns(angles, numbers, low, high, not inverse, cos, sin)
            for k in range(len(numbers)):
                i, j = planes[numbers[k], 0], planes[numbers[k], 1]
                turn_lanes(slab, vectors, i, j, cos, sin, k)
                turn_lanes(slope, vectors, i, j, cos, sin, k)
                # The same before and after both are turned; cos has served.
                for c in range(width):
                    product = slab[i, c] * slope[j, c] - slab[j, c] * slope[i, c]
                    cos[k, c] = sign * product
            for lane in range(high - low):
                for k in range(len(numbers)):
                    dangles[low + lane, numbers[k]] = cos[k, lane]
        _save(slope, plus, False, low, high, dx)
