"""The matrix from products: small orthogonal blocks merge into larger ones, a level at a time.

The recursions of ``cosine_sine`` and ``crossing`` are unrolled into levels. A level holds the
blocks of at most a few sizes, all blocks of a size in one tensor (blocks, sets of angles, size,
size), so that merging a level takes a few batched products. README.md derives the recursions.
"""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flows.givens.schedule import Schedule

__all__ = ["matrix", "rotate"]

Kind = tuple[int, ...]  # (m,) is a block of the recursion, (a, b) an exchange X of a and b axes
Parts = list[tuple[Kind, Tensor]]


def matrix(angles: Tensor, schedule: Schedule) -> Tensor:
    """U for each set of angles; 2 n^3 flops for ``cosine_sine``, 3 n^3 for ``crossing``."""
    n, plan = schedule.dim, _plan(schedule, angles.device)
    u = _build(angles.reshape(-1, schedule.num_angles), plan)
    return u.reshape(*angles.shape[:-1], n, n)


def rotate(x: Tensor, angles: Tensor, schedule: Schedule, *, inverse: bool = False) -> Tensor:
    """The rows of x times U^T, or times U for the inverse; one set of angles for all rows."""
    if angles.ndim > 1:
        raise ValueError(
            "the product form turns all vectors by the same angles, expected "
            f"{(schedule.num_angles,)}, got {tuple(angles.shape)}."
        )
    u = matrix(angles, schedule)
    return _product(x.reshape(-1, schedule.dim), u if inverse else u.mT).reshape(x.shape)


# --- exact products ---------------------------------------------------------------------------


@contextmanager
def _full_precision(like: Tensor) -> Iterator[None]:
    """Products in IEEE arithmetic of their own dtype, whatever the user has asked for."""
    device = like.device.type
    backend = torch.backends.cuda if device == "cuda" else torch.backends.mkldnn
    before = backend.matmul.fp32_precision
    reduced = before not in ("none", "ieee")
    if reduced:
        backend.matmul.fp32_precision = "ieee"
    try:
        with torch.autocast(device, enabled=False):
            yield
    finally:
        if reduced:
            # An inherited setting is inherited again, an explicit one is put back.
            backend.matmul.fp32_precision = "none"
            if backend.matmul.fp32_precision != before:
                backend.matmul.fp32_precision = before


def _multiply(a: Tensor, b: Tensor) -> Tensor:
    with _full_precision(a):
        return a @ b


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b in full precision, and so are its derivatives of any order."""
    return (_compiled_product if torch.compiler.is_compiling() else _Product.apply)(a, b)


def _save_inputs(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)
    ctx.save_for_forward(*inputs)


def _product_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
    a, b = ctx.saved_tensors
    return (
        _product(grad, b.mT) if ctx.needs_input_grad[0] else None,
        _product(a.mT, grad) if ctx.needs_input_grad[1] else None,
    )


class _Product(torch.autograd.Function):
    generate_vmap_rule = True
    forward = staticmethod(_multiply)
    setup_context = staticmethod(_save_inputs)
    backward = staticmethod(_product_backward)

    @staticmethod
    def jvp(ctx: Any, da: Tensor, db: Tensor) -> Tensor:
        a, b = ctx.saved_tensors
        return _product(da, b) + _product(a, db)


# What the compiler is given instead: it cannot look inside, so that the precision stays.
_compiled_product = torch.library.custom_op("flows::product", _multiply, mutates_args=())
_compiled_product.register_fake(torch.matmul)
_compiled_product.register_autograd(
    _product_backward, setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs)
)


# --- merges -----------------------------------------------------------------------------------


def _merge_cosine_sine(kind: Kind, parts: list[Tensor], turns: Tensor) -> Tensor:
    if kind == (2,):
        return turns
    function = _Merge.forward if torch.compiler.is_compiling() else _Merge.apply
    return function(turns, *parts)


class _Merge(torch.autograd.Function):
    """Q = (U1 + U2) CS (V1 + V2), a product of U and M = T V, where T turns the rows of V.

    ``parts`` is one tensor of all factors, in the order (U or V, block, half), or one for each
    half, the second of size q = p - 1: it gets a coordinate more, which is left out in the end.
    """

    generate_vmap_rule = True

    @staticmethod
    def sides(turns: Tensor, parts: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, Tensor]:
        """U (block, half, set, p, p), V (block, 1, set, p, half, p), T (block, 2, set, p, 2, 1)."""
        sets, p = parts[0].shape[1:3]
        if len(parts) == 1:
            x = parts[0].unflatten(0, (2, -1, 2))
        else:
            second = torch.nn.functional.pad(parts[1], (0, 1, 0, 1))
            x = torch.stack([half.unflatten(0, (2, -1)) for half in (parts[0], second)], 2)
        u, v = x.unbind(0)
        t = turns.unflatten(0, (-1, p)).permute(0, 3, 2, 1, 4).unsqueeze(-1)
        return u, v.permute(0, 2, 3, 1, 4).unsqueeze(1), t

    @staticmethod
    def middle(v: Tensor, t: Tensor) -> Tensor:
        return (t * v).flatten(-2)

    @staticmethod
    def whole(q: Tensor, odd: bool) -> Tensor:
        q = q.transpose(1, 2).flatten(2, 3)
        return q[..., :-1, :-1].contiguous() if odd else q

    @staticmethod
    def forward(turns: Tensor, *parts: Tensor) -> Tensor:
        u, v, t = _Merge.sides(turns, parts)
        return _Merge.whole(_product(u, _Merge.middle(v, t)), len(parts) == 2)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        turns, *parts = ctx.saved_tensors
        u, v, t = _Merge.sides(turns, parts)
        p = u.shape[-1]
        grad = grad if len(parts) == 1 else torch.nn.functional.pad(grad, (0, 1, 0, 1))
        grad = grad.unflatten(-2, (2, p)).transpose(1, 2)
        du = _product(grad, _Merge.middle(v, t).mT)
        dm = _product(u.mT, grad).unflatten(-1, (2, p))
        dt = (dm * v).sum(-1).permute(0, 3, 2, 1, 4).reshape(turns.shape)
        dv = torch.addcmul(dm[:, 0] * t[:, 0], dm[:, 1], t[:, 1]).permute(0, 3, 1, 2, 4)
        dx = torch.stack([du, dv])
        if len(parts) == 1:
            return dt, dx.flatten(0, 2)
        return dt, dx[:, :, 0].flatten(0, 1), dx[:, :, 1, :, :-1, :-1].flatten(0, 1)

    @staticmethod
    def jvp(ctx: Any, dturns: Tensor, *dparts: Tensor) -> Tensor:
        turns, *parts = ctx.saved_tensors
        u, v, t = _Merge.sides(turns, parts)
        du, dv, dt = _Merge.sides(dturns, dparts)
        dm = _Merge.middle(dv, t) + _Merge.middle(v, dt)
        dq = _product(du, _Merge.middle(v, t)) + _product(u, dm)
        return _Merge.whole(dq, len(parts) == 2)


def _merge_crossing(kind: Kind, parts: list[Tensor], turns: Tensor) -> Tensor:
    if kind == (1, 1):
        return turns
    if len(kind) == 1:
        # T = X(A, B) (T(A) + T(B))
        x, *halves = parts
        columns = x.split([half.shape[-1] for half in halves], -1)
        return torch.cat([_product(c, t) for c, t in zip(columns, halves, strict=True)], -1)
    # X(A, B) from X(A2, B1), X(A1, B1), X(A2, B2), X(A1, B2), the first acting first. After the
    # first three the rows A1, B1 are in left, A2, B2 in right; columns A1, (A2, B1), B2.
    f21, f11, f22, f12 = parts
    (a1, a2), (b1, b2) = map(_halves, kind)
    f21a, f21b = f21.split([a2, b1], -2)
    f11a, f11b = f11.split([a1, b1], -1)
    f22a, f22b = f22.split([a2, b2], -1)
    left = torch.nn.functional.pad(torch.cat([f11a, _product(f11b, f21b)], -1), (0, b2))
    right = torch.nn.functional.pad(torch.cat([_product(f22a, f21a), f22b], -1), (a1, 0))
    function = _Turn.forward if torch.compiler.is_compiling() else _Turn.apply
    return function(f12, left, right, a1, a2)


class _Turn(torch.autograd.Function):
    """The last factor Q of X turns the rows A1, B2 of (A1, B1), (A2, B2).

    Keeps Q and the result, which the next merge keeps, too: the rows that were turned are
    Q^T times the rows of the result, as Q is orthogonal.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(q: Tensor, left: Tensor, right: Tensor, a1: int, a2: int) -> Tensor:
        outer = _product(q, torch.cat([left[..., :a1, :], right[..., a2:, :]], -2))
        rows = outer[..., :a1, :], right[..., :a2, :], left[..., a1:, :], outer[..., a1:, :]
        return torch.cat(rows, -2)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        q, left, right, ctx.a1, ctx.a2 = inputs
        ctx.save_for_backward(q, output)
        ctx.save_for_forward(q, left, right)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, x = ctx.saved_tensors
        a1, b2 = ctx.a1, q.shape[-1] - ctx.a1
        sizes = [a1, ctx.a2, x.shape[-1] - q.shape[-1] - ctx.a2, b2]
        (x_a1, _, _, x_b2), (grad_a1, grad_a2, grad_b1, grad_b2) = (
            rows.split(sizes, -2) for rows in (x, grad)
        )
        outer = torch.cat([grad_a1, grad_b2], -2)
        dq = _product(_product(outer, torch.cat([x_a1, x_b2], -2).mT), q)
        grad_a1, grad_b2 = _product(q.mT, outer).split([a1, b2], -2)
        left, right = torch.cat([grad_a1, grad_b1], -2), torch.cat([grad_a2, grad_b2], -2)
        return dq, left, right, None, None

    @staticmethod
    def jvp(ctx: Any, dq: Tensor, dleft: Tensor, dright: Tensor, *_: None) -> Tensor:
        q, left, right = ctx.saved_tensors
        a1, a2 = ctx.a1, ctx.a2
        by_rows = _Turn.forward(q, dleft, dright, a1, a2)
        outer = _product(dq, torch.cat([left[..., :a1, :], right[..., a2:, :]], -2))
        top, bottom = outer.split([a1, outer.shape[-2] - a1], -2)
        inner = torch.zeros_like(by_rows[..., a1 : by_rows.shape[-2] - bottom.shape[-2], :])
        return by_rows + torch.cat([top, inner, bottom], -2)


# --- recursions as levels ---------------------------------------------------------------------


class _Group(NamedTuple):
    """All blocks of a kind on a level; they are made from ``below``, parts of the level below."""

    kind: Kind
    count: int
    turns: int
    below: tuple[tuple[Kind, int], ...]


class _Plan(NamedTuple):
    """Levels, smallest blocks first; ``index`` tells the angle of each turn, the last is zero."""

    levels: tuple[tuple[_Group, ...], ...]
    index: Tensor
    merge: Callable[[Kind, list[Tensor], Tensor], Tensor]


def _build(angles: Tensor, plan: _Plan) -> Tensor:
    """(sets, num_angles) -> (1, sets, n, n)."""
    table = torch.nn.functional.pad(angles, (0, 1)).mT.index_select(0, plan.index)
    c, s = table.cos(), table.sin()
    turns = torch.stack([c, -s, s, c], -1).unflatten(-1, (2, 2))
    turns_of = iter(turns.split([group.turns for level in plan.levels for group in level]))
    below: dict[Kind, Tensor] = {}
    for level in plan.levels:
        sizes: dict[Kind, list[int]] = {}
        for kind, size in (part for group in level for part in group.below):
            sizes.setdefault(kind, []).append(size)
        parts = {kind: iter(below[kind].split(of)) for kind, of in sizes.items()}
        blocks = {}
        for group in level:
            t = next(turns_of)
            if sum(group.kind) == 1:
                blocks[group.kind] = turns.new_ones(group.count, len(angles), 1, 1)
            else:
                found = [next(parts[kind]) for kind, _ in group.below]
                blocks[group.kind] = plan.merge(group.kind, found, t)
        below = blocks
    (u,) = below.values()
    return u


def _plan(schedule: Schedule, device: torch.device) -> _Plan:
    return schedule.remember(("product", device), lambda: _new_plan(schedule, device))


def _new_plan(schedule: Schedule, device: torch.device) -> _Plan:
    n = schedule.dim
    made = re.match(r"(crossing|cosine_sine)\(\d+\)(\.|$)", schedule.name)
    if made is None:
        raise ValueError(
            "the product form exists for crossing, cosine_sine and restrictions of these, "
            f"got {schedule}."
        )
    if made[1] == "crossing":
        merge, expand, whole = _merge_crossing, _expand_crossing, torch.arange(n)[None]
        place = torch.full((n * n,), schedule.num_angles)
        place[schedule.planes @ torch.tensor([n, 1])] = torch.arange(schedule.num_angles)
    else:
        merge, expand, whole = _merge_cosine_sine, _expand_cosine_sine, torch.zeros(1).long()
        place = _places_of_cosine_sine(schedule)
    levels, slots = [], []
    level = {(n,): whole}
    while level:
        groups, turns, below = [], [], {}
        for kind, blocks in level.items():
            parts, slot = expand(kind, blocks, n)
            turns.append(slot.flatten())
            sizes = tuple((of, len(some)) for of, some in parts)
            groups.append(_Group(kind, len(blocks), slot.numel(), sizes))
            for of, some in parts:
                below.setdefault(of, []).append(some)
        levels.append(tuple(groups))
        slots.append(torch.cat(turns))
        level = {of: torch.cat(some) for of, some in below.items()}
    index = place[torch.cat(slots[::-1])].to(device)
    return _Plan(tuple(levels[::-1]), index, merge)


def _halves(m: int) -> tuple[int, int]:
    return (m + 1) // 2, m // 2


def _expand_crossing(kind: Kind, axes: Tensor, n: int) -> tuple[Parts, Tensor]:
    """What blocks with these axes are made of, and their slots: the plane (i, j) has i n + j."""
    none = axes.new_empty(0)
    if sum(kind) == 1:
        return [], none
    if kind == (1, 1):
        return [], axes @ axes.new_tensor([n, 1])
    if len(kind) == 1:
        b, a = _halves(*kind)
        return [((a, b), axes), ((a,), axes[:, :a]), ((b,), axes[:, a:])], none
    a1, a2, b1, b2 = axes.split([*_halves(kind[0]), *_halves(kind[1])], 1)
    pairs = (a2, b1), (a1, b1), (a2, b2), (a1, b2)
    return [((a.shape[1], b.shape[1]), torch.cat([a, b], 1)) for a, b in pairs], none


def _expand_cosine_sine(kind: Kind, first: Tensor, n: int) -> tuple[Parts, Tensor]:
    """What blocks are made of, and their slots: the angles of V1, V2, CS, U1, U2 in turn.

    A block is given by the first of its slots. For odd sizes the last turn rests.
    """
    if kind == (1,):
        return [], first.new_empty(0)
    if kind == (2,):
        return [], first
    p, q = _halves(*kind)
    of_p, of_q = p * (p - 1) // 2, q * (q - 1) // 2
    middle = first + of_p + of_q
    slots = middle[:, None] + torch.arange(p)
    factors = torch.stack([middle + q, first])
    if p == q:
        return [((p,), torch.stack([factors, factors + of_p], -1).flatten())], slots
    slots[:, q:] = -1
    return [((p,), factors.flatten()), ((q,), factors.flatten() + of_p)], slots


def _places_of_cosine_sine(schedule: Schedule) -> Tensor:
    """For each slot its angle, ``num_angles`` if the restriction left it out, and behind all.

    Restrictions drop a plane wherever it occurs, or all rounds from some round on. So the k-th
    occurrence of a plane in the schedule is its k-th in the recursion, where V precedes U.
    """
    n = schedule.dim

    @cache
    def planes(m: int) -> Tensor:
        if m == 1:
            return torch.empty(0, 2, dtype=torch.int64)
        p, q = _halves(m)
        sides, k = torch.cat([planes(p), planes(q) + p]), torch.arange(q)
        return torch.cat([sides, torch.stack([k, p + k], 1), sides])

    def keys(planes: Tensor) -> Tensor:
        plane = planes @ torch.tensor([n, 1])
        order = plane.argsort(stable=True)
        ordered = plane[order]
        occurrence = torch.empty_like(plane)
        occurrence[order] = torch.arange(len(plane)) - torch.searchsorted(ordered, ordered)
        return plane + n**2 * occurrence

    slots, order = keys(planes(n)).sort()
    place = torch.full((len(slots) + 1,), schedule.num_angles)
    place[order[torch.searchsorted(slots, keys(schedule.planes))]] = torch.arange(
        schedule.num_angles
    )
    return place
