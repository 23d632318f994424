"""Which planes turn in which round: schedules are data, made of integers only.

A schedule lists planes (i, j), i < j, grouped into rounds of disjoint planes. It is to
rotations what a Butcher tableau is to an ODE solver: everything else reads it.
"""

import hashlib
from collections.abc import Callable, Collection, Hashable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property, lru_cache
from operator import index
from typing import Any
from weakref import ref

import numpy as np
import torch
from torch.utils._python_dispatch import _disable_current_modes

__all__ = [
    "Schedule",
    "butterfly",
    "cosine_sine",
    "crossing",
    "hurwitz",
    "odd_even",
    "round_robin",
]


class Schedule:
    """Rounds of disjoint planes in order of application; immutable.

    Two schedules are equal when they were made alike: the name tells constructor, size and
    restrictions, such as ``crossing(8).frame(3)``. A hand-made schedule is named by a hash.

    Args:
        dim: Number of axes, at least 2.
        rounds: For each round its planes (i, j), 0 <= i < j < dim, no axis twice in a round.

    Attributes:
        dim: Number of axes.
        num_angles: Number of planes, hence of angles.
        planes: All planes, first round first; int64, shape (num_angles, 2).
        round_sizes: Number of planes in each round.
        round_of_plane: Round of each plane; int64, shape (num_angles,).
        name: How the schedule was made.

    Raises:
        ValueError: If ``dim`` is below 2, or rounds hold anything but disjoint planes.

    Example:
        >>> from flows.givens import Schedule
        >>> schedule = Schedule(4, [[(0, 1), (2, 3)], [(0, 2), (1, 3)]])
        >>> len(schedule), schedule.num_angles
        (2, 4)
        >>> schedule.blocks(2).rounds  # only planes within axes 0 and 1, or 2 and 3
        (((0, 1), (2, 3)),)
    """

    def __init__(self, dim: int, rounds: Iterable[Iterable[tuple[int, int]]]) -> None:
        _check_dim(dim)
        try:
            rounds = [[(index(i), index(j)) for i, j in planes] for planes in rounds]
        except (TypeError, ValueError) as error:
            raise ValueError(f"rounds must hold planes, pairs of integers: {error}.") from None
        for number, planes in enumerate(rounds):
            seen: set[int] = set()
            for i, j in planes:
                if not 0 <= i < j < dim:
                    raise ValueError(
                        f"planes must be (i, j) with 0 <= i < j < {dim}, "
                        f"got ({i}, {j}) in round {number}."
                    )
                if i in seen or j in seen:
                    raise ValueError(
                        f"planes of one round must be disjoint, got {planes} in round {number}."
                    )
                seen |= {i, j}
        sizes = [len(planes) for planes in rounds if planes]
        flat = np.array([plane for planes in rounds for plane in planes], np.int64).reshape(-1, 2)
        digest = hashlib.sha256(repr((sizes, flat.tolist())).encode()).hexdigest()[:16]
        self._fill(dim, flat, sizes, f"Schedule({dim}, {digest})")

    def _fill(self, dim: int, planes: np.ndarray, sizes: Sequence[int], name: str) -> None:
        if len(planes) == 0:
            raise ValueError(f"a schedule must keep at least one plane, {name} keeps none.")
        self.dim, self.num_angles = dim, len(planes)
        self.round_sizes = tuple(sizes)
        # A schedule made in inference mode must serve gradients later.
        with torch.inference_mode(False):
            self.planes = torch.from_numpy(np.ascontiguousarray(planes, np.int64))
            self.round_of_plane = torch.from_numpy(np.repeat(np.arange(len(sizes)), sizes))
        self.name = name
        self._register()
        self._derived: dict[Hashable, Any] = {}

    @classmethod
    def _from_rounds(cls, dim: int, planes: np.ndarray, rounds: np.ndarray, name: str):
        """Planes with the round of each, sorted by round; gaps between round numbers close."""
        order = np.argsort(rounds, kind="stable")
        sizes = np.bincount(rounds) if len(rounds) else np.array([], int)
        schedule = cls.__new__(cls)
        schedule._fill(dim, planes[order], sizes[sizes > 0].tolist(), name)
        return schedule

    @cached_property
    def rounds(self) -> tuple[tuple[tuple[int, int], ...], ...]:
        """The planes of each round as pairs of integers."""
        planes = iter(map(tuple, self.planes.tolist()))
        return tuple(tuple(next(planes) for _ in range(size)) for size in self.round_sizes)

    def __len__(self) -> int:
        return len(self.round_sizes)

    def __repr__(self) -> str:
        return self.name

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Schedule) and self.name == other.name

    def __hash__(self) -> int:
        return hash(self.name)

    @staticmethod
    def named(name: str) -> "Schedule":
        """The schedule of this name, if there is one in this process."""
        for schedule in _NAMED.get(name, []):
            if (found := schedule()) is not None:
                return found
        raise ValueError(f"the schedule {name} must be made before it is used by name.")

    def remember(self, key: Hashable, build: Callable[[], Any]) -> Any:
        """Something derived from the schedule, such as index tensors; built once, never saved."""
        if key not in self._derived:
            with torch.inference_mode(False), _outside_of_function_transforms():
                self._derived[key] = build()
        return self._derived[key]

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_derived": {}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._register()

    def _register(self) -> None:
        alive = [other for other in _NAMED.get(self.name, []) if other() is not None]
        _NAMED[self.name] = [*alive, ref(self)]

    def __deepcopy__(self, memo: dict) -> "Schedule":
        return self

    def frame(self, m: int) -> "Schedule":
        """Without planes whose two axes are both >= m: dim St(dim, m) angles remain.

        The first m columns of the matrix are then an orthonormal frame; see README.md for
        which schedules reach every frame.
        """
        _check_range("m", m, 1, self.dim)
        return self._keep(lambda i, j: i < m, f"frame({m})")

    def between(self, a: Collection[int], b: Collection[int]) -> "Schedule":
        """Only planes joining an axis of ``a`` with one of ``b``, two disjoint index sets."""
        a, b = (sorted({int(axis) for axis in axes}) for axes in (a, b))
        if set(a) & set(b) or not set(a + b) <= set(range(self.dim)):
            raise ValueError(
                f"a and b must be disjoint sets of axes below {self.dim}, got {a} and {b}."
            )
        side = np.zeros(self.dim, int)
        side[a], side[b] = 1, -1
        return self._keep(lambda i, j: side[i] * side[j] == -1, f"between({a}, {b})")

    def blocks(self, size: int) -> "Schedule":
        """Only planes inside consecutive blocks of ``size`` axes: a block-diagonal matrix."""
        _check_range("size", size, 2, self.dim)
        return self._keep(lambda i, j: i // size == j // size, f"blocks({size})")

    def banded(self, width: int) -> "Schedule":
        """Only planes with j - i <= width."""
        _check_range("width", width, 1, self.dim - 1)
        return self._keep(lambda i, j: j - i <= width, f"banded({width})")

    def first_rounds(self, k: int) -> "Schedule":
        """Only the first k rounds."""
        _check_range("k", k, 1, len(self))
        kept = sum(self.round_sizes[:k])
        mask = np.arange(self.num_angles) < kept
        return self._keep(lambda i, j: mask, f"first_rounds({k})")

    def _keep(self, rule: Callable[..., np.ndarray], step: str) -> "Schedule":
        planes = self.planes.numpy()
        kept = rule(planes[:, 0], planes[:, 1])
        rounds = self.round_of_plane.numpy()
        return self._from_rounds(self.dim, planes[kept], rounds[kept], f"{self.name}.{step}")


def _outside_of_function_transforms() -> AbstractContextManager:
    """Tensors made under ``torch.func`` or in an export belong to it, but these are kept."""
    # Torch has no public names for these; the compiler does without.
    if torch.compiler.is_dynamo_compiling():
        return nullcontext()
    if torch.compiler.is_exporting():  # where tensors are made without numbers
        return _disable_current_modes()
    return torch._C._DisableFuncTorch()


# For compiled graphs, which hold no objects.
_NAMED: dict[str, list[ref]] = {}


def _check_dim(n: int) -> None:
    if not isinstance(n, int) or isinstance(n, bool) or n < 2:
        raise ValueError(f"a schedule needs an integer dimension of at least 2, got {n!r}.")


def _check_range(name: str, value: int, low: int, high: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise ValueError(f"{name} must be an integer from {low} to {high}, got {value!r}.")


def _constructor(build: Callable[[int], tuple[np.ndarray, np.ndarray]]):
    """From n -> (planes, round of each) to n -> Schedule, remembered for recent n."""

    @lru_cache(maxsize=32)
    def make(n: int) -> Schedule:
        _check_dim(n)
        return Schedule._from_rounds(n, *build(n), f"{build.__name__}({n})")

    make.__name__ = make.__qualname__ = build.__name__
    make.__doc__ = build.__doc__
    make.__module__ = build.__module__
    return make


def _sorted_planes(i: np.ndarray, j: np.ndarray) -> np.ndarray:
    return np.stack([np.minimum(i, j).ravel(), np.maximum(i, j).ravel()], axis=1)


@_constructor
def round_robin(n: int) -> tuple[np.ndarray, np.ndarray]:
    """Circle method (Hamze 2021, arXiv 2106.00003): n-1 rounds for even n, n for odd n.

    Every plane once. For odd n the fixed seat rests, which makes the schedule onto SO(n).

    Args:
        n: Number of axes, at least 2.

    Raises:
        ValueError: If ``n`` is no integer of at least 2.

    Reference:
        Hamze (2021), arXiv 2106.00003

    Example:
        >>> from flows import givens
        >>> givens.round_robin(4).rounds
        (((0, 3), (1, 2)), ((1, 3), (0, 2)), ((2, 3), (0, 1)))
    """
    seats = n - 1 if n % 2 == 0 else n
    r, k = np.meshgrid(np.arange(seats), np.arange(1, (seats + 1) // 2), indexing="ij")
    i, j, rounds = (r + k) % seats, (r - k) % seats, r
    if n % 2 == 0:
        fixed = np.arange(seats)
        i = np.concatenate([fixed, i.ravel()])
        j = np.concatenate([np.full(seats, n - 1), j.ravel()])
        rounds = np.concatenate([fixed, r.ravel()])
    return _sorted_planes(i, j), rounds.ravel()


@_constructor
def odd_even(n: int) -> tuple[np.ndarray, np.ndarray]:
    """Brick wall of n rounds with each swap of wires folded into its rotation.

    Every plane once, onto SO(n); the real Clements mesh (arXiv 1603.08788).

    Args:
        n: Number of axes, at least 2.

    Raises:
        ValueError: If ``n`` is no integer of at least 2.

    Reference:
        Clements et al. (2016), arXiv 1603.08788, there complex

    Example:
        >>> from flows import givens
        >>> givens.odd_even(4).planes.tolist()
        [[0, 1], [2, 3], [0, 3], [1, 3], [0, 2], [1, 2]]
    """
    wires = np.arange(n)
    planes, rounds = [], []
    for r in range(n):
        left = np.arange(r % 2, n - 1, 2)
        planes.append(_sorted_planes(wires[left], wires[left + 1]))
        rounds.append(np.full(len(left), r))
        wires[left], wires[left + 1] = wires[left + 1], wires[left].copy()
    return np.concatenate(planes), np.concatenate(rounds)


@_constructor
def crossing(n: int) -> tuple[np.ndarray, np.ndarray]:
    """Recursive crossing of halves, T(n) = X(A, B) (T(A) + T(B)): about 2n rounds.

    Every plane once, onto SO(n), isometric at angle zero, and buildable by batched products.
    The planes (a, b) of X(A, B) meet in wavefronts: for a fixed a the b ascend, for a fixed
    b the a descend, which is the recursion of README.md written as rounds.

    Args:
        n: Number of axes, at least 2.

    Raises:
        ValueError: If ``n`` is no integer of at least 2.

    Example:
        >>> from flows import givens
        >>> givens.crossing(4).rounds
        (((0, 1), (2, 3)), ((1, 2),), ((0, 2), (1, 3)), ((0, 3),))
    """

    def build(size: int) -> tuple[np.ndarray, np.ndarray, int]:
        if size == 1:
            return np.empty((0, 2), np.int64), np.empty(0, np.int64), 0
        half = size // 2
        planes_a, rounds_a, depth_a = remembered(half)
        planes_b, rounds_b, depth_b = remembered(size - half)
        depth = max(depth_a, depth_b)
        a, b = np.meshgrid(np.arange(half), np.arange(size - half), indexing="ij")
        planes = np.concatenate([planes_a, planes_b + half, _sorted_planes(a, b + half)])
        rounds = np.concatenate([rounds_a, rounds_b, (depth + half - 1 - a + b).ravel()])
        return planes, rounds, depth + size - 1

    remembered = lru_cache(build)
    return remembered(n)[:2]


@_constructor
def cosine_sine(n: int) -> tuple[np.ndarray, np.ndarray]:
    """Recursive cosine-sine decomposition: n-1 rounds for n a power of two.

    Planes repeat, their number is still n(n-1)/2. Onto SO(n); degenerate when all angles are
    zero, so start it from random angles. Right factors first, then the planes (k, p + k),
    then the left factors, p = ceil(n/2).

    Args:
        n: Number of axes, at least 2.

    Raises:
        ValueError: If ``n`` is no integer of at least 2.

    Reference:
        Golub and Van Loan, Matrix Computations, for the CS decomposition

    Example:
        >>> from flows import givens
        >>> givens.cosine_sine(4).rounds
        (((0, 1), (2, 3)), ((0, 2), (1, 3)), ((0, 1), (2, 3)))
    """

    def build(size: int) -> tuple[np.ndarray, np.ndarray, int]:
        if size == 1:
            return np.empty((0, 2), np.int64), np.empty(0, np.int64), 0
        p = (size + 1) // 2
        planes_1, rounds_1, depth = remembered(p)
        planes_2, rounds_2, _ = remembered(size - p)
        sides = np.concatenate([planes_1, planes_2 + p])
        side_rounds = np.concatenate([rounds_1, rounds_2])
        k = np.arange(size - p)
        planes = np.concatenate([sides, _sorted_planes(k, p + k), sides])
        rounds = np.concatenate([side_rounds, np.full(len(k), depth), side_rounds + depth + 1])
        return planes, rounds, 2 * depth + 1

    remembered = lru_cache(build)
    return remembered(n)[:2]


@_constructor
def hurwitz(n: int) -> tuple[np.ndarray, np.ndarray]:
    """QR order, last columns first, packed into 2n-3 rounds.

    Every plane once, onto SO(n); ``frame(m)`` reaches every frame for every m.

    Args:
        n: Number of axes, at least 2.

    Raises:
        ValueError: If ``n`` is no integer of at least 2.

    Reference:
        Hoffman, Raffenetti and Ruedenberg (1972), J. Math. Phys. 13, 528

    Example:
        >>> from flows import givens
        >>> givens.hurwitz(4).rounds
        (((2, 3),), ((1, 3),), ((0, 3), (1, 2)), ((0, 2),), ((0, 1),))
    """
    i, j = np.triu_indices(n, 1)
    return _sorted_planes(i, j), 2 * n - 3 - i - j


@_constructor
def butterfly(n: int) -> tuple[np.ndarray, np.ndarray]:
    """FFT pattern: round k joins axes that differ in bit k; ceil(log2 n) rounds.

    (n/2) log2 n planes for n a power of two; for other n the pairs that exist. Not onto.

    Args:
        n: Number of axes, at least 2.

    Raises:
        ValueError: If ``n`` is no integer of at least 2.

    Example:
        >>> from flows import givens
        >>> givens.butterfly(4).rounds
        (((0, 1), (2, 3)), ((0, 2), (1, 3)))
    """
    axes = np.arange(n)
    planes, rounds = [], []
    for k in range((n - 1).bit_length()):
        first = axes[(axes >> k) % 2 == 0]
        first = first[first + 2**k < n]
        planes.append(_sorted_planes(first, first + 2**k))
        rounds.append(np.full(len(first), k))
    return np.concatenate(planes), np.concatenate(rounds)
