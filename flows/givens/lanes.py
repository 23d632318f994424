"""What numba compiles: vector instructions for tiles of rotations, and the loops over tiles.

LLVM by itself does not keep the rows of a tile in registers, as it cannot know that they are
different rows; here they are values, not memory. Loops and all that they take in at compile
time stand in this one file, because numba's cache on disk notices changes of a function's own
file only. Read by ``compiled.py`` and ``program.py``.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

try:
    from llvmlite import binding, ir
    from numba import types
    from numba.core import cgutils
    from numba.extending import intrinsic

    from flows.native import njit
except ImportError as error:
    raise ImportError(
        'impl="compiled" needs the numba package: pip install givens-flows[compiled]'
    ) from error

__all__ = [
    "CROSS",
    "LEAF",
    "PAIR",
    "PATTERNS",
    "ROWS",
    "ROW_OF_SAMPLES",
    "SINGLE",
    "TURNS",
    "VECTOR",
    "carry_signs",
    "collect",
    "pull_each",
    "pull_shared",
    "shears",
    "turn_each",
    "turn_shared",
]

# --- sizes and patterns -------------------------------------------------------------------------

_QUARTER = [(0, 1), (2, 3), (0, 2), (1, 3), (0, 1), (2, 3)]
_HALVES = _QUARTER + [(i + 4, j + 4) for i, j in _QUARTER]

# The planes of a tile in order of application, as positions among its rows.
_EIGHT = _HALVES + [(k, k + 4) for k in range(4)] + _HALVES
SINGLE, CROSS, LEAF, PAIR = range(4)
PATTERNS = (
    ((0, 1),),
    tuple((a, 4 + b) for a in (3, 2, 1, 0) for b in range(4)),  # four rows meet four others
    tuple(_EIGHT),  # cosine_sine(8)
    # Eight rows each meet one of eight others, then both eights are turned as above.
    (*((k, k + 8) for k in range(8)), *_EIGHT, *((i + 8, j + 8) for i, j in _EIGHT)),
)
ROWS, TURNS = np.array([2, 8, 8, 16]), np.array([1, 16, 28, 64])

# Bytes in a row of a slab of samples.
ROW_OF_SAMPLES = 256
# Turns of a slab of samples that are made from their angles at a time.
CHUNK = 64
# Bytes in a vector register.
VECTOR = 64 if binding.get_host_cpu_features().get("avx512f") else 32


# --- instructions -------------------------------------------------------------------------------


class _Emit:
    """The instructions of one function: rows of a slab in registers, vector by vector."""

    def __init__(self, context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> None:
        self.context, self.builder = context, builder
        self.types, self.args = signature.args, args
        number = signature.args[0].dtype
        lanes = VECTOR * 8 // number.bitwidth
        self.vector = ir.VectorType(context.get_value_type(number), lanes)
        self.int32 = ir.IntType(32)

    def pointer(self, k: int, offset: ir.Value | None = None) -> ir.Value:
        """Where the numbers of the k-th argument, an array, begin."""
        array = self.context.make_array(self.types[k])(self.context, self.builder, self.args[k])
        return array.data if offset is None else self.builder.gep(array.data, [offset])

    def row(self, state: ir.Value, number: ir.Value, vectors: ir.Value) -> ir.Value:
        """Where the row with this number begins, as vectors."""
        b = self.builder
        state = b.bitcast(state, self.vector.as_pointer())
        return b.gep(state, [b.mul(b.sext(number, vectors.type), vectors)])

    def load(self, pointers: list[ir.Value]) -> list[ir.Value]:
        return [self.builder.load(p, align=VECTOR) for p in pointers]

    def store(self, values: list[ir.Value], pointers: list[ir.Value]) -> None:
        for value, pointer in zip(values, pointers, strict=True):
            self.builder.store(value, pointer, align=VECTOR)

    def at(self, pointers: list[ir.Value], index: ir.Value) -> list[ir.Value]:
        return [self.builder.gep(p, [index]) for p in pointers]

    def everywhere(self, pointer: ir.Value, index: int) -> ir.Value:
        """One number of a table in all lanes."""
        b, none = self.builder, ir.Constant(self.vector, ir.Undefined)
        number = b.load(b.gep(pointer, [self.int32(index)]))
        first = b.insert_element(none, number, self.int32(0))
        zeros = ir.Constant(ir.VectorType(self.int32, self.vector.count), None)
        return b.shuffle_vector(first, none, zeros)

    def add(self, x: ir.Value, c: ir.Value, y: ir.Value) -> ir.Value:
        """x + c y, one operation where the machine has it."""
        b = self.builder
        return b.fadd(x, b.fmul(c, y, flags=["contract"]), flags=["contract"])

    def subtract(self, x: ir.Value, c: ir.Value, y: ir.Value) -> ir.Value:
        b = self.builder
        return b.fsub(x, b.fmul(c, y, flags=["contract"]), flags=["contract"])

    def sums(self, vectors: list[ir.Value]) -> list[ir.Value]:
        """The sum over the lanes of each vector: halves are added, two vectors at a time."""
        b, lanes, count = self.builder, self.vector.count, len(vectors)
        if count > lanes:
            return self.sums(vectors[:lanes]) + self.sums(vectors[lanes:])
        padding = (1 << (count - 1).bit_length()) - count
        level = vectors + [ir.Constant(self.vector, None)] * padding
        # A vector of the level holds `parts` unfinished sums of 2 `width` numbers each.
        parts, width = 1, lanes // 2
        while width:
            starts = [2 * width * k for k in range(parts)]
            pairs = [(x, x) for x in level]
            if len(level) > 1:
                pairs = list(zip(level[::2], level[1::2], strict=True))
                starts += [level[0].type.count + start for start in starts]
                parts *= 2
            level = []
            for x, y in pairs:
                halves = []
                for first in (0, width):
                    lane = [start + first + k for start in starts for k in range(width)]
                    mask = ir.Constant(ir.VectorType(self.int32, len(lane)), lane)
                    halves.append(b.shuffle_vector(x, y, mask))
                level.append(b.fadd(*halves))
            width //= 2
        return [b.extract_element(level[0], self.int32(k)) for k in range(count)]


def tile(pattern: tuple[tuple[int, int], ...]) -> tuple[Callable, Callable]:
    """The turns of one tile, and their way back with the gradient of each.

    The tile begins at the given places of ``rows`` (numbers of rows of the slab), of ``table``
    (turns, 2), and of the sums that gather gradients.
    """
    size = 1 + max(j for _, j in pattern)

    def pointers(emit: _Emit, states: tuple[int, ...], rows: ir.Value, vectors: ir.Value) -> list:
        b = emit.builder
        numbers = [b.load(b.gep(rows, [emit.int32(k)])) for k in range(size)]
        return [[emit.row(emit.pointer(s), row, vectors) for row in numbers] for s in states]

    def turns(context, builder, signature, args):
        emit = _Emit(context, builder, signature, args)
        _, vectors, _, row, _, turn = args
        (of_x,) = pointers(emit, (0,), emit.pointer(2, row), vectors)
        table = emit.pointer(4, builder.mul(turn, turn.type(2)))
        with cgutils.for_range(builder, vectors) as loop:
            here = emit.at(of_x, loop.index)
            x = emit.load(here)
            for k, (i, j) in enumerate(pattern):
                tau, s = (emit.everywhere(table, 2 * k + c) for c in (0, 1))
                x[i] = emit.subtract(x[i], tau, x[j])
                x[j] = emit.add(x[j], s, x[i])
                x[i] = emit.subtract(x[i], tau, x[j])
            emit.store(x, here)

    def turns_back(context, builder, signature, args):
        emit = _Emit(context, builder, signature, args)
        _, _, vectors, _, row, _, turn, _ = args
        of_y, of_grad = pointers(emit, (0, 1), emit.pointer(3, row), vectors)
        table = emit.pointer(5, builder.mul(turn, turn.type(2)))
        zero = ir.Constant(emit.vector, None)
        totals = [cgutils.alloca_once(builder, emit.vector) for _ in pattern]
        for total in totals:
            builder.store(zero, total)
        with cgutils.for_range(builder, vectors) as loop:
            here_y, here_grad = emit.at(of_y, loop.index), emit.at(of_grad, loop.index)
            y, grad = emit.load(here_y), emit.load(here_grad)
            for k, (i, j) in reversed(list(enumerate(pattern))):
                # dL/dt is the sum of y_i g_j - y_j g_i.
                total = emit.add(builder.load(totals[k]), y[i], grad[j])
                builder.store(emit.subtract(total, y[j], grad[i]), totals[k])
                tau, s = (emit.everywhere(table, 2 * k + c) for c in (0, 1))
                for x in (y, grad):
                    x[i] = emit.add(x[i], tau, x[j])
                    x[j] = emit.subtract(x[j], s, x[i])
                    x[i] = emit.add(x[i], tau, x[j])
            emit.store(y, here_y)
            emit.store(grad, here_grad)
        sums = emit.pointer(7, turn)
        for k, total in enumerate(emit.sums([builder.load(t) for t in totals])):
            place = builder.gep(sums, [emit.int32(k)])
            builder.store(builder.fadd(builder.load(place), total), place)

    intp = types.intp

    @intrinsic
    def apply(typing, state, vectors, rows, row, table, turn):
        return types.void(state, intp, rows, intp, table, intp), turns

    @intrinsic
    def undo(typing, state, grad, vectors, rows, row, table, turn, sums):
        return types.void(state, grad, intp, rows, intp, table, intp, sums), turns_back

    return apply, undo


def _turn_lanes(context, builder, signature, args):
    emit = _Emit(context, builder, signature, args)
    _, vectors, i, j, _, _, k = args
    places = ((0, i), (0, j), (4, k), (5, k))
    pointers = [emit.row(emit.pointer(a), number, vectors) for a, number in places]
    with cgutils.for_range(builder, vectors) as loop:
        here = emit.at(pointers, loop.index)
        x, y, c, s = emit.load(here)
        cx, cy = (builder.fmul(c, row, flags=["contract"]) for row in (x, y))
        emit.store([emit.subtract(cx, s, y), emit.add(cy, s, x)], here[:2])


@intrinsic
def turn_lanes(typing, state, vectors, i, j, cos, sin, k):
    """Rows i and j of the state turned by rows k of cos and sin, each lane by its own angle."""
    intp = types.intp
    return types.void(state, intp, intp, intp, cos, sin, intp), _turn_lanes


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
def shears(angles, number, table, direction, thread, first, last):
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
def carry_signs(dim, runs, rows, table, direction):
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
def collect(sums, number, direction, dangles, thread, first, last):
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
def turn_shared(
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
def pull_shared(
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
def turn_each(x, y, angles, planes, inverse, thread, first, last):
    dim, width = x.shape[1], ROW_OF_SAMPLES // x.itemsize
    vectors = ROW_OF_SAMPLES // VECTOR
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
def pull_each(y, grad, dx, angles, dangles, planes, inverse, thread, first, last):
    dim, width = y.shape[1], ROW_OF_SAMPLES // y.itemsize
    vectors = ROW_OF_SAMPLES // VECTOR
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
