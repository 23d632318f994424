"""The matrix from products: small orthogonal blocks merge into larger ones, a level at a time.

The recursions of ``cosine_sine`` and ``crossing`` are unrolled into levels. Halving n again and
again gives on each level two sizes at most, and all blocks of a size are one tensor (blocks,
sets of angles, size, size): merging a level takes a few batched products. README.md derives the
recursions, their backward pass and their cost.
"""

import re
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flows.givens.exact import matmul
from flows.givens.schedule import Schedule

__all__ = ["matrix", "rotate"]

# Blocks of up to this size are made entry by entry; larger ones would take too many operations.
_SMALL = 4

Kind = tuple[int, ...]  # (m,) is a block of the recursion, (a, b) an exchange X of a and b axes
Planes = tuple[tuple[int, int], ...]
Sizes = tuple[int, int, int, int]  # of A1, A2, B1, B2
Expanded = tuple[Planes, Tensor, list[tuple[Kind, Tensor]]]  # planes, slots, parts


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
    return matmul(x.reshape(-1, schedule.dim), u if inverse else u.mT).reshape(x.shape)


# --- derivatives ------------------------------------------------------------------------------


def _save_inputs(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)
    ctx.save_for_forward(*inputs)


def _call(function: type[torch.autograd.Function], *args: Any) -> Tensor:
    """The compiler gets the plain operations, and derives a backward pass of its own."""
    return (function.forward if torch.compiler.is_compiling() else function.apply)(*args)


def _push(function: Callable[..., Tensor], inputs: Sequence, tangents: Sequence) -> Tensor:
    """The derivative along tangents: to pull back is linear, and its own pull-back pushes."""
    output, pull = torch.func.vjp(function, *inputs)
    _, push = torch.func.vjp(pull, torch.zeros_like(output))
    return push(tuple(tangents))[0]


# --- leaves -----------------------------------------------------------------------------------


class _Leaves(torch.autograd.Function):
    """Small blocks, plane by plane: angles (planes, blocks, sets) -> (blocks, sets, m, m).

    Each entry of all blocks is one long vector. Keeps the angles only; the backward pass starts
    again from these.
    """

    generate_vmap_rule = True

    @staticmethod
    def entries(angles: Tensor, planes: Planes, m: int) -> tuple[Tensor, ...]:
        """The m^2 entries of all blocks, row by row; zeros are None until the end."""
        one = angles.new_ones(angles.shape[1:])
        rows = [[one if i == k else None for k in range(m)] for i in range(m)]
        for (i, j), c, s in zip(planes, angles.cos(), angles.sin(), strict=True):
            pairs = list(zip(rows[i], rows[j], strict=True))
            rows[i] = [_mix(c, x, -s, y) for x, y in pairs]
            rows[j] = [_mix(s, x, c, y) for x, y in pairs]
        return tuple(torch.zeros_like(one) if x is None else x for row in rows for x in row)

    @staticmethod
    def forward(angles: Tensor, planes: Planes, m: int) -> Tensor:
        entries = torch.stack(_Leaves.entries(angles, planes, m), -1)
        return entries.reshape(*angles.shape[1:], m, m)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        angles, ctx.planes, ctx.m = inputs
        ctx.save_for_backward(angles)
        ctx.save_for_forward(angles)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (angles,) = ctx.saved_tensors
        _, pull = torch.func.vjp(partial(_Leaves.entries, planes=ctx.planes, m=ctx.m), angles)
        grads = grad.reshape(*angles.shape[1:], ctx.m**2).movedim(-1, 0).contiguous()
        return *pull(grads.unbind(0)), None, None

    @staticmethod
    def jvp(ctx: Any, dangles: Tensor, *_: None) -> Tensor:
        function = partial(_Leaves.forward, planes=ctx.planes, m=ctx.m)
        return _push(function, ctx.saved_tensors, (dangles,))


def _mix(c: Tensor, x: Tensor | None, s: Tensor, y: Tensor | None) -> Tensor | None:
    """c x + s y."""
    if x is None:
        return None if y is None else s * y
    return c * x if y is None else torch.addcmul(c * x, s, y)


# --- merges -----------------------------------------------------------------------------------


def _merge_cosine_sine(kind: Kind, parts: list[Tensor], angles: Tensor) -> Tensor:
    return _call(_Merge, angles, *parts)


class _Merge(torch.autograd.Function):
    """Q = (U1 + U2) CS (V1 + V2), the product of U and M = T V, where T turns the rows of V.

    ``parts`` is one tensor of all factors, in the order (U or V, block, half), or one for each
    half, the second of size q = p - 1: it gets a coordinate more, which is left out in the end.
    Keeps these and the angles (p, blocks, sets).
    """

    generate_vmap_rule = True
    setup_context = staticmethod(_save_inputs)

    @staticmethod
    def sides(parts: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """U (block, half, set, p, p) and V (block, 1, set, p, half, p)."""
        sets, p = parts[0].shape[1:3]
        if len(parts) == 1:
            x = parts[0].reshape(2, len(parts[0]) // 4, 2, sets, p, p)
        else:
            padded = parts[0], torch.nn.functional.pad(parts[1], (0, 1, 0, 1))
            x = torch.stack([half.reshape(2, len(half) // 2, sets, p, p) for half in padded], 2)
        return x[0], x[1].permute(0, 2, 3, 1, 4).unsqueeze(1)

    @staticmethod
    def turns(c: Tensor, s: Tensor) -> Tensor:
        """T (block, 2, set, p, 2, 1), contiguous, so that the products with it will be."""
        t = torch.stack([c, -s, s, c]).reshape(2, 2, *c.shape)
        return t.permute(3, 0, 4, 2, 1).contiguous().unsqueeze(-1)

    @staticmethod
    def forward(angles: Tensor, *parts: Tensor) -> Tensor:
        p, blocks, sets = angles.shape
        (u, v), t = _Merge.sides(parts), _Merge.turns(angles.cos(), angles.sin())
        q = matmul(u, (t * v).reshape(blocks, 2, sets, p, 2 * p))
        q = q.transpose(1, 2).reshape(blocks, sets, 2 * p, 2 * p)
        return q if len(parts) == 1 else q[..., :-1, :-1].contiguous()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        angles, *parts = ctx.saved_tensors
        c, s = angles.cos(), angles.sin()
        p, blocks, sets = angles.shape
        (u, v), t = _Merge.sides(parts), _Merge.turns(c, s)
        grad = grad if len(parts) == 1 else torch.nn.functional.pad(grad, (0, 1, 0, 1))
        grad = grad.reshape(blocks, sets, 2, p, 2 * p).transpose(1, 2)
        du = matmul(grad, (t * v).reshape(grad.shape).mT)
        dm = matmul(u.mT, grad).reshape(blocks, 2, sets, p, 2, p)
        dt = (dm * v).sum(-1).permute(1, 4, 3, 0, 2)
        dangles = c * (dt[1, 0] - dt[0, 1]) - s * (dt[0, 0] + dt[1, 1])
        dv = torch.addcmul(dm[:, 0] * t[:, 0], dm[:, 1], t[:, 1]).permute(0, 3, 1, 2, 4)
        dx = torch.stack([du, dv])
        if len(parts) == 1:
            return dangles, dx.reshape(parts[0].shape)
        dx1, dx2 = dx[:, :, 0], dx[:, :, 1, :, :-1, :-1]
        return dangles, dx1.reshape(parts[0].shape), dx2.reshape(parts[1].shape)

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor) -> Tensor:
        return _push(_Merge.forward, ctx.saved_tensors, tangents)


def _merge_crossing(kind: Kind, parts: list[Tensor], angles: Tensor) -> Tensor:
    if len(kind) == 2:
        (a1, a2), (b1, b2) = map(_halves, kind)
        return _call(_Cross, *parts, (a1, a2, b1, b2))
    # T = X(A, B) (T(A) + T(B))
    x, *halves = parts
    columns = x.split([half.shape[-1] for half in halves], -1)
    return torch.cat([matmul(f, t) for f, t in zip(columns, halves, strict=True)], -1)


class _Cross(torch.autograd.Function):
    """X(A, B) from X(A2, B1), X(A1, B1), X(A2, B2), X(A1, B2), the first acting first.

    With F for these four, rows and columns a and b, and the products G1 = F11[:, b] F21[b, :],
    G2 = F22[:, a] F21[a, :] over the columns (A2, B1), the rows of X are

        A1, B2   [F12[:, a] F11[a, a],  F12 [G1[a]; G2[b]],  F12[:, b] F22[b, b]]
        A2       [0,                    G2[a],               F22[a, b]]
        B1       [F11[b, a],            G1[b],               0]
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(f21: Tensor, f11: Tensor, f22: Tensor, f12: Tensor, sizes: Sizes) -> Tensor:
        a1, a2, b1, b2 = sizes
        (f21a, f21b), (f12a, f12b) = f21.split([a2, b1], -2), f12.split([a1, b2], -1)
        (f11a, f11b), (f22a, f22b) = f11.split([a1, b1], -1), f22.split([a2, b2], -1)
        (f11aa, f11ba), (f22ab, f22bb) = f11a.split([a1, b1], -2), f22b.split([a2, b2], -2)
        g1a, g1b = matmul(f11b, f21b).split([a1, b1], -2)
        g2a, g2b = matmul(f22a, f21a).split([a2, b2], -2)
        outer = matmul(f12a, f11aa), matmul(f12, _rows(g1a, g2b)), matmul(f12b, f22bb)
        top, bottom = zip(*(part.split([a1, b2], -2) for part in outer), strict=True)
        no_a, no_b = f22ab.new_zeros(*f22ab.shape[:-1], a1), f11ba.new_zeros(*f11ba.shape[:-1], b2)
        return _rows(
            _columns(*top),
            _columns(no_a, g2a, f22ab),
            _columns(f11ba, g1b, no_b),
            _columns(*bottom),
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        *factors, ctx.sizes = inputs
        ctx.save_for_backward(*factors)
        ctx.save_for_forward(*factors)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (f21, f11, f22, f12), (a1, a2, b1, b2) = ctx.saved_tensors, ctx.sizes
        (f21a, f21b), (f12a, f12b) = f21.split([a2, b1], -2), f12.split([a1, b2], -1)
        (f11a, f11b), (f22a, f22b) = f11.split([a1, b1], -1), f22.split([a2, b2], -1)
        f11aa, f22bb = f11a[..., :a1, :], f22b[..., a2:, :]
        middle = _rows(matmul(f11b[..., :a1, :], f21b), matmul(f22a[..., a2:, :], f21a))
        top, over, under, bottom = grad.split([a1, a2, b1, b2], -2)
        left, center, right = _rows(top, bottom).split([a1, a2 + b1, b2], -1)
        _, dg2a, df22ab = over.split([a1, a2 + b1, b2], -1)
        df11ba, dg1b, _ = under.split([a1, a2 + b1, b2], -1)
        dg1a, dg2b = matmul(f12.mT, center).split([a1, b2], -2)
        dg1, dg2 = _rows(dg1a, dg1b), _rows(dg2a, dg2b)
        df21 = _rows(matmul(f22a.mT, dg2), matmul(f11b.mT, dg1))
        df11 = _columns(_rows(matmul(f12a.mT, left), df11ba), matmul(dg1, f21b.mT))
        df22 = _columns(matmul(dg2, f21a.mT), _rows(df22ab, matmul(f12b.mT, right)))
        df12 = _columns(matmul(left, f11aa.mT), matmul(right, f22bb.mT))
        return df21, df11, df22, df12 + matmul(center, middle.mT), None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        function = partial(_Cross.forward, sizes=ctx.sizes)
        return _push(function, ctx.saved_tensors, tangents[:4])


def _rows(*parts: Tensor) -> Tensor:
    return torch.cat(parts, -2)


def _columns(*parts: Tensor) -> Tensor:
    return torch.cat(parts, -1)


# --- recursions as levels ---------------------------------------------------------------------


class _Group(NamedTuple):
    """All blocks of a kind on a level: leaves, or made from ``below``, parts of that level."""

    kind: Kind
    count: int
    planes: Planes
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
    turns = iter(
        table.split([group.turns * group.count for level in plan.levels for group in level])
    )
    below: dict[Kind, Tensor] = {}
    for level in plan.levels:
        sizes: dict[Kind, list[int]] = {}
        for kind, size in (part for group in level for part in group.below):
            sizes.setdefault(kind, []).append(size)
        parts = {
            kind: iter(below[kind].split(of) if len(of) > 1 else [below[kind]])
            for kind, of in sizes.items()
        }
        blocks = {}
        for group in level:
            t = next(turns).unflatten(0, (group.turns, group.count))
            if group.below:
                found = [next(parts[kind]) for kind, _ in group.below]
                blocks[group.kind] = plan.merge(group.kind, found, t)
            else:
                blocks[group.kind] = _call(_Leaves, t, group.planes, sum(group.kind))
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
            planes, slot, parts = expand(kind, blocks, n)
            turns.append(slot.flatten())
            sizes = tuple((of, len(some)) for of, some in parts)
            groups.append(_Group(kind, len(blocks), planes, len(slot), sizes))
            for of, some in parts:
                below.setdefault(of, []).append(some)
        levels.append(tuple(groups))
        slots.append(torch.cat(turns))
        level = {of: torch.cat(some) for of, some in below.items()}
    index = place[torch.cat(slots[::-1])].to(device)
    return _Plan(tuple(levels[::-1]), index, merge)


def _halves(m: int) -> tuple[int, int]:
    return (m + 1) // 2, m // 2


def _expand_crossing(kind: Kind, axes: Tensor, n: int) -> Expanded:
    """Planes and slots of leaves with these axes, or the parts that blocks are made of.

    The plane (i, j) has the slot i n + j.
    """
    axes_of = axes.unbind(1)
    if kind in ((1,), (2,)):
        kind = (kind[0] - 1, 1)
    if len(kind) == 1:
        b, a = _halves(*kind)
        parts = [((a, b), axes), ((a,), axes[:, :a]), ((b,), axes[:, a:])]
        return (), axes.new_empty(0, len(axes)), parts
    if max(kind) <= _SMALL // 2:
        planes = tuple((i, kind[0] + j) for i in reversed(range(kind[0])) for j in range(kind[1]))
        slots = [axes_of[i] * n + axes_of[j] for i, j in planes]
        return planes, torch.stack(slots) if slots else axes.new_empty(0, len(axes)), []
    a1, a2, b1, b2 = axes.split([*_halves(kind[0]), *_halves(kind[1])], 1)
    pairs = (a2, b1), (a1, b1), (a2, b2), (a1, b2)
    parts = [((a.shape[1], b.shape[1]), torch.cat([a, b], 1)) for a, b in pairs]
    return (), axes.new_empty(0, len(axes)), parts


def _small_planes(m: int, first: int = 0) -> Planes:
    """The planes of a small block of ``cosine_sine`` in the order of its slots."""
    if m == 1:
        return ()
    p, q = _halves(m)
    sides = _small_planes(p, first) + _small_planes(q, first + p)
    return sides + tuple((first + k, first + p + k) for k in range(q)) + sides


def _expand_cosine_sine(kind: Kind, first: Tensor, n: int) -> Expanded:
    """Planes and slots of leaves, or slots of the CS factor and the parts blocks are made of.

    The angles of a block have the slots from ``first`` on in the order V1, V2, CS, U1, U2. For
    odd sizes the last turn of CS rests.
    """
    (m,) = kind
    if m <= _SMALL:
        planes = _small_planes(m)
        return planes, first + torch.arange(len(planes))[:, None], []
    p, q = _halves(m)
    of_p, of_q = p * (p - 1) // 2, q * (q - 1) // 2
    middle = first + of_p + of_q
    slots = middle + torch.arange(p)[:, None]
    factors = torch.stack([middle + q, first])
    if p == q:
        return (), slots, [((p,), torch.stack([factors, factors + of_p], -1).flatten())]
    slots[q:] = -1
    return (), slots, [((p,), factors.flatten()), ((q,), factors.flatten() + of_p)]


def _places_of_cosine_sine(schedule: Schedule) -> Tensor:
    """For each slot its angle, ``num_angles`` if the restriction left it out, and behind all.

    Restrictions drop a plane wherever it occurs, or all rounds from some round on. So the k-th
    occurrence of a plane in the schedule is its k-th in the recursion, where V precedes U.
    """
    n = schedule.dim

    def planes(m: int) -> dict[int, Tensor]:
        """Those of the slots, for the sizes m and m - 1."""
        if m == 2:
            return {1: torch.empty(0, 2, dtype=torch.int64), 2: torch.tensor([[0, 1]])}
        half, whole = planes((m + 1) // 2), {}
        for size in (m, m - 1):
            p, q = _halves(size)
            sides, k = torch.cat([half[p], half[q] + p]), torch.arange(q)
            whole[size] = torch.cat([sides, torch.stack([k, p + k], 1), sides])
        return whole

    def keys(planes: Tensor) -> Tensor:
        plane = planes @ torch.tensor([n, 1])
        order = plane.argsort(stable=True)
        ordered = plane[order]
        occurrence = torch.empty_like(plane)
        occurrence[order] = torch.arange(len(plane)) - torch.searchsorted(ordered, ordered)
        return plane + n**2 * occurrence

    slots, order = keys(planes(n)[n]).sort()
    place = torch.full((len(slots) + 1,), schedule.num_angles)
    place[order[torch.searchsorted(slots, keys(schedule.planes))]] = torch.arange(
        schedule.num_angles
    )
    return place
