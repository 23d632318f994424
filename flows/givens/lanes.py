"""Instructions for vector registers, written through numba's compiler (LLVM).

LLVM by itself does not keep the rows of a tile in registers, as it cannot know that they are
different rows; here they are values, not memory. Read by ``compiled.py`` only.
"""

import inspect
from collections.abc import Callable
from typing import Any

try:
    import numba
    from llvmlite import binding, ir
    from numba import types
    from numba.core import cgutils
    from numba.extending import intrinsic
except ImportError as error:
    raise ImportError(
        'impl="compiled" needs the numba package: pip install givens-flows[compiled]'
    ) from error

__all__ = ["VECTOR", "njit", "tile", "turn_lanes"]

# Bytes in a vector register.
VECTOR = 64 if binding.get_host_cpu_features().get("avx512f") else 32


def njit(function: Callable) -> Callable:
    """Compile at the first call, remember on disk where that is possible, let threads run."""
    # Type checkers wrap functions, and numba cannot read the wrapper.
    function, options = inspect.unwrap(function), {"nogil": True, "error_model": "numpy"}
    try:
        return numba.njit(function, cache=True, **options)
    except RuntimeError:  # no folder that may be written to
        return numba.njit(function, **options)


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
