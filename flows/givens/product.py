"""The matrix from products: small orthogonal blocks merge into larger ones, a level at a time.

A recursion is a list of steps; a step makes all blocks of one size from smaller ones. Small
blocks are kept as (size, size, blocks, sets of angles), so that elementwise operations run over
all of them at once, large ones as (blocks, sets, size, size), for batched products. All steps
run inside one autograd function, whose outputs are the values of the steps: the backward pass
reads them, and being made of differentiable operations can be differentiated again. README.md
derives the recursions.
"""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from flows.givens.schedule import Schedule, cosine_sine

__all__ = ["matrix", "rotate"]

# Blocks of up to this size are made elementwise, larger ones by batched products.
_SMALL = {"cosine_sine": 8, "crossing": 16}
# Up to this n a tree of products of the rounds takes the fewest operations.
_TREE = 32


def matrix(angles: Tensor, schedule: Schedule) -> Tensor:
    """U for each set of angles; 2 n^3 flops for ``cosine_sine``, 3 n^3 for ``crossing``."""
    n = schedule.dim
    plan = _plan(schedule, angles.device)
    flat = angles.reshape(-1, schedule.num_angles)
    if isinstance(plan, _Rounds):
        return _tree(flat, plan).reshape(*angles.shape[:-1], n, n)
    _, values = _build(flat, plan)
    return values[-1].reshape(*angles.shape[:-1], n, n)


def rotate(x: Tensor, angles: Tensor, schedule: Schedule, *, inverse: bool = False) -> Tensor:
    """The rows of x times U^T, or times U for the inverse; one set of angles for all rows.

    Few rows are multiplied by the factors of the last merge, which then is not carried out.
    """
    n = schedule.dim
    if angles.ndim > 1:
        raise ValueError(
            "the product form turns all vectors by the same angles, expected "
            f"{(schedule.num_angles,)}, got {tuple(angles.shape)}."
        )
    plan, rows = _plan(schedule, angles.device), x.reshape(-1, n)
    if isinstance(plan, _Rounds) or plan.last.layout is _small or len(rows) >= plan.thin * n:
        u = matrix(angles, schedule)
        return _product(rows, u if inverse else u.mT).view(x.shape)
    plan = plan.without_last()
    turns, values = _build(angles[None], plan)
    return plan.last.apply(rows, *_arguments(plan.last, values, turns), inverse).view(x.shape)


# --- exact products ---------------------------------------------------------------------------


@contextmanager
def _full_precision(like: Tensor) -> Iterator[None]:
    """Products in IEEE arithmetic of their own dtype, whatever the user has asked for."""
    if torch.compiler.is_compiling():
        yield
        return
    device = like.device.type
    backend = torch.backends.cuda if device == "cuda" else torch.backends.mkldnn
    before = backend.matmul.fp32_precision if like.dtype == torch.float32 else "ieee"
    reduced = before not in ("none", "ieee")
    if reduced:
        backend.matmul.fp32_precision = "ieee"
    try:
        if torch.is_autocast_enabled(device):
            with torch.autocast(device, enabled=False):
                yield
        else:
            yield
    finally:
        if reduced:
            # An inherited setting is inherited again, an explicit one is put back.
            backend.matmul.fp32_precision = "none"
            if backend.matmul.fp32_precision != before:
                backend.matmul.fp32_precision = before


def _may_write() -> bool:
    """Whether results may be written into memory of ours: nobody differentiates or maps this."""
    return not (
        torch.compiler.is_compiling()
        or torch.is_grad_enabled()
        or torch._C._are_functorch_transforms_active()
    )


class _Product(torch.autograd.Function):
    """a @ b in full precision, and so are its derivatives."""

    generate_vmap_rule = True

    @staticmethod
    def forward(a: Tensor, b: Tensor) -> Tensor:
        with _full_precision(a):
            return a @ b

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        a, b = ctx.saved_tensors
        return (
            _product(grad, b.mT) if ctx.needs_input_grad[0] else None,
            _product(a.mT, grad) if ctx.needs_input_grad[1] else None,
        )


class _ProductEager(_Product):
    """The same with a forward-mode derivative, which the compiler refuses."""

    @staticmethod
    def jvp(ctx: Any, da: Tensor | None, db: Tensor | None) -> Tensor | None:
        a, b = ctx.saved_tensors
        terms = [_product(*f) for f in ((da, b), (a, db)) if None not in map(type, f)]
        return sum(terms[1:], terms[0])


def _product(a: Tensor, b: Tensor) -> Tensor:
    return (_Product if torch.compiler.is_compiling() else _ProductEager).apply(a, b)


# --- layouts ----------------------------------------------------------------------------------


def _large_mm(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """Batched product over all but the last two axes, which a and b share."""
    batch, (i, k), j = a.shape[:-2], a.shape[-2:], b.shape[-1]
    a, b = a.reshape(-1, i, k), b.reshape(-1, k, j)
    if torch.is_grad_enabled():
        return _product(a, b).view(*batch, i, j)
    return torch.bmm(a, b, out=None if out is None else out.view(-1, i, j)).view(*batch, i, j)


def _small_mm(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """Products of (..., i, k, blocks, sets) and (..., k, j, blocks, sets)."""
    if out is None and _may_write():
        out = a.new_empty(*a.shape[:-3], *b.shape[-3:])
    c = None
    for x, y in zip(a.unsqueeze(-3).unbind(-4), b.unsqueeze(-5).unbind(-4), strict=True):
        c = torch.mul(x, y, out=out) if c is None else torch.addcmul(c, x, y, out=out)
    return c


def _two_products(a: Tensor, b: Tensor, c: Tensor, d: Tensor, out: Tensor | None) -> Tensor:
    return torch.addcmul(torch.mul(a, b, out=out), c, d, out=out)


class _Layout(NamedTuple):
    """Where the axes of blocks are."""

    row: int
    col: int
    block: int

    def mm(self, a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
        return (_small_mm if self.block else _large_mm)(a, b, out)

    def t(self, a: Tensor) -> Tensor:
        return a.transpose(self.row, self.col)

    def grid(self, rows: Sequence[Sequence[Tensor]], out: Tensor | None = None) -> Tensor:
        """One matrix from parts; ``out`` may be given where writing is allowed."""
        if out is None and _may_write():
            shape = list(rows[0][0].shape)
            shape[self.row] = sum(parts[0].shape[self.row] for parts in rows)
            shape[self.col] = sum(part.shape[self.col] for part in rows[0])
            out = rows[0][0].new_empty(shape)
        if out is None:
            return torch.cat([torch.cat(list(parts), self.col) for parts in rows], self.row)
        heights = [parts[0].shape[self.row] for parts in rows]
        for strip, parts in zip(out.split(heights, self.row), rows, strict=True):
            torch.cat(list(parts), self.col, out=strip)
        return out


_small, _large = _Layout(-4, -3, 2), _Layout(-2, -1, 0)


def _to_large(x: Tensor) -> Tensor:
    i, j, blocks, sets = x.shape
    return x.reshape(i * j, blocks * sets).mT.contiguous().view(blocks, sets, i, j)


def _to_small(x: Tensor) -> Tensor:
    blocks, sets, i, j = x.shape
    return x.reshape(blocks * sets, i * j).mT.contiguous().view(i, j, blocks, sets)


class _Crop:
    """Leave out some rows and the same columns, which belong to no axis."""

    def __init__(self, drop: tuple[int, ...], size: int, layout: _Layout) -> None:
        ends = (-1, *drop, size)
        self.runs = [(a + 1, b - a - 1) for a, b in zip(ends, ends[1:], strict=False)]
        self.layout = layout

    def keep(self, y: Tensor) -> Tensor:
        for axis in self.layout[:2]:
            y = torch.cat([y.narrow(axis, *run) for run in self.runs], axis)
        return y

    def spread(self, g: Tensor) -> Tensor:
        """Zeros in the place of what was left out."""
        for axis in self.layout[:2]:
            zero, parts = torch.zeros_like(g.narrow(axis, 0, 1)), []
            for part in g.split([length for _, length in self.runs], axis):
                parts += [part, zero]
            g = torch.cat(parts[:-1], axis)
        return g


# --- steps ------------------------------------------------------------------------------------


class _Source(NamedTuple):
    """Blocks start:stop of the value of an earlier step."""

    value: int
    start: int
    stop: int


class _Step:
    """Makes blocks from the blocks of its sources and its turns t, if it has angles.

    ``forward(*inputs, t)`` is the value; ``tangent(*inputs, t, *dinputs, dt)`` its derivative;
    ``backward(grad, outs, *inputs, t)`` the gradients of the inputs, written into outs unless
    these are None, and of t. The value goes to the large layout afterwards if ``widen``.
    """

    def __init__(
        self,
        layout: _Layout,
        widen: bool,
        *sources: _Source,
        angles: tuple[int, int] | None = None,
    ) -> None:
        self.layout, self.widen, self.sources, self.angles = layout, widen, sources, angles


class _Turns(_Step):
    """Single rotations: blocks of size 2."""

    def forward(self, t: Tensor) -> Tensor:
        return t

    def tangent(self, t: Tensor, dt: Tensor) -> Tensor:
        return dt

    def backward(self, grad: Tensor, outs: list, t: Tensor) -> tuple[tuple, Tensor]:
        return (), grad


class _Points(_Step):
    """Blocks of size 1; no angles, the turns only tell dtype and number of sets."""

    def __init__(self, count: int, widen: bool) -> None:
        super().__init__(_small, widen, angles=(0, 0))
        self.count = count

    def forward(self, t: Tensor) -> Tensor:
        return t.new_ones(1, 1, self.count, t.shape[-1])

    def tangent(self, t: Tensor, dt: Tensor) -> Tensor:
        return torch.zeros_like(self.forward(dt))

    def backward(self, grad: Tensor, outs: list, t: Tensor) -> tuple[tuple, Tensor]:
        return (), t


class _Even(_Step):
    """Q = (U1 + U2) CS (V1 + V2), all four of size h: the product of U and M = T V.

    ``count`` blocks of size 2 h; T holds the 2 x 2 turns of the rows of V. The subclasses
    arrange U, V, T and M in the two layouts.
    """

    def __init__(self, half: int, count: int, *args: Any, angles: tuple[int, int]) -> None:
        super().__init__(*args, angles=angles)
        self.half, self.count = half, count

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        (u, v), t = self._sides(x), self._turn(t)
        return self._whole(self.layout.mm(u, self._middle(v, t)))

    def tangent(self, x: Tensor, t: Tensor, dx: Tensor, dt: Tensor) -> Tensor:
        (u, v), t = self._sides(x), self._turn(t)
        (du, dv), dt = self._sides(dx), self._turn(dt)
        dm = self._middle(v, dt) + self._middle(dv, t)
        return self._whole(self.layout.mm(du, self._middle(v, t)) + self.layout.mm(u, dm))


class _EvenSmall(_Even):
    """x is (h, h, U or V, half, count, sets); the angles are in the order (h, count)."""

    def _sides(self, x: Tensor) -> tuple[Tensor, Tensor]:
        u, v = x.view(self.half, self.half, 2, 2, self.count, x.shape[-1]).unbind(2)
        return u.permute(2, 0, 1, 3, 4), v.permute(0, 2, 1, 3, 4)

    def _turn(self, t: Tensor) -> Tensor:
        return t.reshape(2, 2, self.half, 1, self.count, t.shape[-1]).transpose(1, 2)

    def _middle(self, v: Tensor, t: Tensor) -> Tensor:
        h, p, b = self.half, self.count, v.shape[-1]
        m = torch.mul(t, v, out=v.new_empty(2, h, 2, h, p, b) if _may_write() else None)
        return m.reshape(2, h, 2 * h, p, b)

    def _whole(self, q: Tensor) -> Tensor:
        return q.reshape(2 * self.half, 2 * self.half, self.count, q.shape[-1])

    def backward(
        self, grad: Tensor, outs: list, x: Tensor, t: Tensor
    ) -> tuple[tuple[Tensor], Tensor]:
        h, p, b = self.half, self.count, x.shape[-1]
        (u, v), t = self._sides(x), self._turn(t)
        m, grad = self._middle(v, t), grad.reshape(2, h, 2 * h, p, b)
        dx, du, dv, product = outs[0], None, None, None
        if dx is not None:
            (du, dv), product = self._sides(dx), m.view(2, h, 2, h, p, b)
        du = _small_mm(grad, m.transpose(1, 2), out=du)
        dm = _small_mm(u.transpose(1, 2), grad).reshape(2, h, 2, h, p, b)
        dt = torch.mul(dm, v, out=product).sum(3).transpose(1, 2).reshape(2, 2, h * p, b)
        dv = _two_products(dm[0], t[0], dm[1], t[1], out=dv)
        if dx is None:
            dx = torch.stack([du.permute(1, 2, 0, 3, 4), dv.permute(0, 2, 1, 3, 4)], 2)
        return (dx.reshape(h, h, 4 * p, b),), dt


class _EvenLarge(_Even):
    """x is (U or V, count, half, sets, h, h); the angles are in the order (count, h)."""

    def _sides(self, x: Tensor) -> tuple[Tensor, Tensor]:
        u, v = x.view(2, self.count, 2, x.shape[1], self.half, self.half).unbind(0)
        return u.transpose(1, 2), v.permute(0, 2, 3, 1, 4).unsqueeze(2)

    def _turn(self, t: Tensor) -> Tensor:
        t = t.reshape(2, 2, self.count, self.half, t.shape[-1], 1)
        return t.permute(2, 4, 0, 3, 1, 5)

    def _middle(self, v: Tensor, t: Tensor) -> Tensor:
        h, p, b = self.half, self.count, v.shape[1]
        m = torch.mul(t, v, out=v.new_empty(p, b, 2, h, 2, h) if _may_write() else None)
        return m.reshape(p, b, 2, h, 2 * h)

    def _whole(self, q: Tensor) -> Tensor:
        return q.reshape(self.count, q.shape[1], 2 * self.half, 2 * self.half)

    def backward(
        self, grad: Tensor, outs: list, x: Tensor, t: Tensor
    ) -> tuple[tuple[Tensor], Tensor]:
        h, p, b = self.half, self.count, x.shape[1]
        (u, v), t = self._sides(x), self._turn(t)
        m, grad = self._middle(v, t), grad.reshape(p, b, 2, h, 2 * h)
        dx, du, dv, product = outs[0], None, None, None
        if dx is not None:
            (du, dv), product = self._sides(dx), m.view(p, b, 2, h, 2, h)
            dv = dv.squeeze(2)
        if dx is not None and b == 1:
            _large_mm(grad, m.mT, out=du)
        elif dx is not None:
            du.copy_(_large_mm(grad, m.mT))
        else:
            du = _large_mm(grad, m.mT)
        dm = _large_mm(u.mT, grad).reshape(p, b, 2, h, 2, h)
        dt = torch.mul(dm, v, out=product).sum(5).permute(2, 4, 0, 3, 1).reshape(2, 2, p * h, b)
        dv = _two_products(dm[:, :, 0], t[:, :, 0], dm[:, :, 1], t[:, :, 1], out=dv)
        if dx is None:
            dx = torch.stack([du.transpose(1, 2), dv.permute(0, 3, 1, 2, 4)])
        return (dx.reshape(4 * p, b, h, h),), dt

    def apply(self, rows: Tensor, x: Tensor, t: Tensor, inverse: bool) -> Tensor:
        (u1, u2), (v1, v2) = x[:2, 0], x[2:, 0]
        return _turn_rows(rows, (u1, u2), (v1, v2), t.reshape(2, 2, self.half), inverse)


class _Odd(_Step):
    """The same with U1, V1 of size p = q + 1 and U2, V2 of size q; the last turn of t rests."""

    def __init__(self, p: int, count: int, *args: Any, angles: tuple[int, int]) -> None:
        super().__init__(*args, angles=angles)
        self.p, self.q, self.count = p, p - 1, count

    def _parts(self, x1: Tensor, x2: Tensor, t: Tensor) -> tuple[Tensor, ...]:
        """U1, U2, V1, V2 with a row of zeros below, T ready to scale the rows of V."""
        layout = self.layout
        (u1, v1), (u2, v2) = (x.split(self.count, layout.block) for x in (x1, x2))
        v2 = torch.cat([v2, torch.zeros_like(v2.narrow(layout.row, 0, 1))], layout.row)
        if layout is _small:
            return u1, u2, v1, v2, t.reshape(2, 2, self.p, 1, self.count, t.shape[-1])
        t = t.reshape(2, 2, self.count, self.p, t.shape[-1], 1)
        return u1, u2, v1, v2, t.transpose(3, 4)

    def _middle(self, v1: Tensor, v2: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        row, col, _ = self.layout
        top, bottom = (torch.cat([t[r, 0] * v1, t[r, 1] * v2], col) for r in (0, 1))
        return top, bottom.narrow(row, 0, self.q)

    def forward(self, x1: Tensor, x2: Tensor, t: Tensor) -> Tensor:
        u1, u2, v1, v2, t = self._parts(x1, x2, t)
        m1, m2 = self._middle(v1, v2, t)
        return torch.cat([self.layout.mm(u1, m1), self.layout.mm(u2, m2)], self.layout.row)

    def tangent(
        self, x1: Tensor, x2: Tensor, t: Tensor, dx1: Tensor, dx2: Tensor, dt: Tensor
    ) -> Tensor:
        *u, v1, v2, t = self._parts(x1, x2, t)
        *du, dv1, dv2, dt = self._parts(dx1, dx2, dt)
        mm, m = self.layout.mm, self._middle(v1, v2, t)
        dm = map(torch.add, self._middle(dv1, dv2, t), self._middle(v1, v2, dt))
        sides = zip(u, du, m, dm, strict=True)
        return torch.cat([mm(dw, m) + mm(w, dm) for w, dw, m, dm in sides], self.layout.row)

    def backward(
        self, grad: Tensor, outs: list, x1: Tensor, x2: Tensor, t: Tensor
    ) -> tuple[tuple[Tensor, Tensor], Tensor]:
        (row, col, block), mm, tr = self.layout, self.layout.mm, self.layout.t
        u1, u2, v1, v2, t = self._parts(x1, x2, t)
        m1, m2 = self._middle(v1, v2, t)
        g1, g2 = grad.split([self.p, self.q], row)
        dm2 = mm(tr(u2), g2)
        dm2 = torch.cat([dm2, torch.zeros_like(dm2.narrow(row, 0, 1))], row)
        dm = [d.split([self.p, self.q], col) for d in (mm(tr(u1), g1), dm2)]
        dv1, dv2 = (_two_products(dm[0][c], t[0, c], dm[1][c], t[1, c], None) for c in (0, 1))
        dt = torch.stack([(dm[r][c] * v).sum(col) for r in (0, 1) for c, v in enumerate((v1, v2))])
        dt = dt if self.layout is _small else dt.transpose(2, 3)
        dx1 = torch.cat([mm(g1, tr(m1)), dv1], block, out=outs[0])
        dx2 = torch.cat([mm(g2, tr(m2)), dv2.narrow(row, 0, self.q)], block, out=outs[1])
        return (dx1, dx2), dt.reshape(
            2, 2, self.p * self.count, grad.shape[-1 if self.layout is _small else 1]
        )

    def apply(self, rows: Tensor, x1: Tensor, x2: Tensor, t: Tensor, inverse: bool) -> Tensor:
        (u1, v1), (u2, v2) = x1[:, 0], x2[:, 0]
        return _turn_rows(rows, (u1, u2), (v1, v2), t.reshape(2, 2, self.p), inverse)


def _turn_rows(rows: Tensor, u: tuple, v: tuple, t: Tensor, inverse: bool) -> Tensor:
    """Rows times ((U1 + U2) CS (V1 + V2))^T, or without the transposition for the inverse."""
    if inverse:
        before, after, t = u, v, t.transpose(0, 1)
    else:
        before, after = ([w.mT for w in side] for side in (v, u))
    sizes = [len(w) for w in before]
    z1, z2 = map(_product, rows.split(sizes, 1), before)
    z2 = torch.nn.functional.pad(z2, (0, sizes[0] - sizes[1]))
    y1, y2 = (z1 * c + z2 * s for c, s in t)
    return torch.cat([_product(y1, after[0]), _product(y2[:, : sizes[1]], after[1])], 1)


class _Cross(_Step):
    """X(A, B) from X(A2, B1), X(A1, B1), X(A2, B2), X(A1, B2), the first acting first.

    In the coordinates (A1, A2, B1, B2), h each; A2 and B2 lose their last if ``crop``.
    With F for these four, rows and columns a and b, and the products G1 = F11[:, b] F21[b, :],
    G2 = F22[:, a] F21[a, :] over the columns (A2, B1), the rows of X are

        A1, B2   [F12[:, a] F11[a, a],  F12 [G1[a]; G2[b]],  F12[:, b] F22[b, b]]
        A2       [0,                    G2[a],               F22[a, b]]
        B1       [F11[b, a],            G1[b],               0]
    """

    def __init__(self, h: int, crop: bool, layout: _Layout, widen: bool, source: _Source) -> None:
        super().__init__(layout, widen, source)
        self.h = h
        self.crop = _Crop((2 * h - 1, 4 * h - 1), 4 * h, layout) if crop else None

    def _factors(self, x: Tensor) -> tuple:
        """F21 by rows, F11 and F22 by columns, F12."""
        row, col, block = self.layout
        f21, f11, f22, f12 = x.split(x.shape[block] // 4, block)
        return f21.split(self.h, row), f11.split(self.h, col), f22.split(self.h, col), f12

    def _whole(
        self, r: list[Tensor], g1b: Tensor, g2a: Tensor, f11ba: Tensor, f22ab: Tensor
    ) -> Tensor:
        top, bottom = zip(*(part.split(self.h, self.layout.row) for part in r), strict=True)
        zero = torch.zeros_like(f11ba)
        y = self.layout.grid([top, (zero, g2a, f22ab), (f11ba, g1b, zero), bottom])
        return self.crop.keep(y) if self.crop else y

    def forward(self, x: Tensor) -> Tensor:
        (row, col, _), mm, h = self.layout, self.layout.mm, self.h
        (f21a, f21b), (f11a, f11b), (f22a, f22b), f12 = self._factors(x)
        (f11aa, f11ba), (f22ab, f22bb) = f11a.split(h, row), f22b.split(h, row)
        (g1a, g1b), (g2a, g2b) = mm(f11b, f21b).split(h, row), mm(f22a, f21a).split(h, row)
        f12a, f12b = f12.split(h, col)
        r = [mm(f12a, f11aa), mm(f12, torch.cat([g1a, g2b], row)), mm(f12b, f22bb)]
        return self._whole(r, g1b, g2a, f11ba, f22ab)

    def tangent(self, x: Tensor, dx: Tensor) -> Tensor:
        (row, col, _), mm, h = self.layout, self.layout.mm, self.h
        (f21a, f21b), (f11a, f11b), (f22a, f22b), f12 = self._factors(x)
        (d21a, d21b), (d11a, d11b), (d22a, d22b), d12 = self._factors(dx)
        f11aa, f22bb = f11a.narrow(row, 0, h), f22b.narrow(row, h, h)
        (d11aa, d11ba), (d22ab, d22bb) = d11a.split(h, row), d22b.split(h, row)
        (f12a, f12b), (d12a, d12b) = f12.split(h, col), d12.split(h, col)
        w = torch.cat([mm(f11b.narrow(row, 0, h), f21b), mm(f22a.narrow(row, h, h), f21a)], row)
        d1a, d1b = (mm(d11b, f21b) + mm(f11b, d21b)).split(h, row)
        d2a, d2b = (mm(d22a, f21a) + mm(f22a, d21a)).split(h, row)
        dr = [
            mm(d12a, f11aa) + mm(f12a, d11aa),
            mm(d12, w) + mm(f12, torch.cat([d1a, d2b], row)),
            mm(d12b, f22bb) + mm(f12b, d22bb),
        ]
        return self._whole(dr, d1b, d2a, d11ba, d22ab)

    def backward(self, grad: Tensor, outs: list, x: Tensor) -> tuple[tuple[Tensor], None]:
        (row, col, block), mm, tr, h = self.layout, self.layout.mm, self.layout.t, self.h
        grid, dx = self.layout.grid, outs[0]
        o21, o11, o22, o12 = [None] * 4 if dx is None else dx.split(dx.shape[block] // 4, block)
        grad = self.crop.spread(grad) if self.crop else grad
        (f21a, f21b), (f11a, f11b), (f22a, f22b), f12 = self._factors(x)
        f11aa, f22bb = f11a.narrow(row, 0, h), f22b.narrow(row, h, h)
        f12a, f12b = f12.split(h, col)
        w = torch.cat([mm(f11b.narrow(row, 0, h), f21b), mm(f22a.narrow(row, h, h), f21a)], row)
        top, over, under, bottom = grad.split(h, row)
        r1, r2, r3 = torch.cat([top, bottom], row).split([h, 2 * h, h], col)
        _, dg2a, d22ab = over.split([h, 2 * h, h], col)
        d11ba, dg1b, _ = under.split([h, 2 * h, h], col)
        dg1a, dg2b = mm(tr(f12), r2).split(h, row)
        dg1, dg2 = torch.cat([dg1a, dg1b], row), torch.cat([dg2a, dg2b], row)
        d21 = torch.cat([mm(tr(f22a), dg2), mm(tr(f11b), dg1)], row, out=o21)
        d11a, d11b = mm(dg1, tr(f21b)).split(h, row)
        d11 = grid([(mm(tr(f12a), r1), d11a), (d11ba, d11b)], o11)
        d22a, d22b = mm(dg2, tr(f21a)).split(h, row)
        d22 = grid([(d22a, d22ab), (d22b, mm(tr(f12b), r3))], o22)
        d12 = torch.cat([mm(r1, tr(f11aa)), mm(r3, tr(f22bb))], col)
        d12 = torch.add(d12, mm(r2, tr(w)), out=o12)
        return (torch.cat([d21, d11, d22, d12], block) if dx is None else dx,), None

    def apply(self, rows: Tensor, x: Tensor, inverse: bool) -> Tensor:
        """Rows over (A, B) times X^T, or times X for the inverse."""
        factors = x[:, 0] if inverse else x[:, 0].mT
        h, crop = self.h, int(self.crop is not None)
        a, b = rows.split(2 * h - crop, 1)
        pad = torch.nn.functional.pad
        y = [*pad(a, (0, crop)).split(h, 1), *pad(b, (0, crop)).split(h, 1)]
        order = list(zip(((1, 2), (0, 2), (1, 3), (0, 3)), factors, strict=True))
        for (i, j), f in reversed(order) if inverse else order:
            y[i], y[j] = _product(torch.cat([y[i], y[j]], 1), f).split(h, 1)
        a1, a2, b1, b2 = y
        return torch.cat([a1, a2[:, : h - crop], b1, b2[:, : h - crop]], 1)


class _Join(_Step):
    """T = X(A, B) (T(A) + T(B)), of twice the size m; the coordinate ``drop`` is no axis."""

    def __init__(
        self, m: int, drop: int | None, layout: _Layout, widen: bool, x: _Source, t: _Source
    ) -> None:
        super().__init__(layout, widen, x, t)
        self.m, self.drop = m, drop
        self.crop = None if drop is None else _Crop((drop,), 2 * m, layout)

    def _halves(self, x: Tensor, t: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        _, col, block = self.layout
        return zip(x.split(self.m, col), t.split(t.shape[block] // 2, block), strict=True)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        y = torch.cat([self.layout.mm(f, t) for f, t in self._halves(x, t)], self.layout.col)
        return self.crop.keep(y) if self.crop else y

    def tangent(self, x: Tensor, t: Tensor, dx: Tensor, dt: Tensor) -> Tensor:
        return self.forward(dx, t) + self.forward(x, dt)

    def backward(
        self, grad: Tensor, outs: list, x: Tensor, t: Tensor
    ) -> tuple[tuple[Tensor, Tensor], None]:
        (_, col, block), mm, tr = self.layout, self.layout.mm, self.layout.t
        grad = self.crop.spread(grad) if self.crop else grad
        parts = list(zip(grad.split(self.m, col), self._halves(x, t), strict=True))
        dx = torch.cat([mm(g, tr(t)) for g, (_, t) in parts], col, out=outs[0])
        dt = torch.cat([mm(tr(f), g) for g, (f, _) in parts], block, out=outs[1])
        return (dx, dt), None


class _LastOfCrossing:
    """The last two steps, to be applied to rows."""

    def __init__(self, cross: _Cross, join: _Join) -> None:
        self.cross, self.join = cross, join
        self.sources = *cross.sources, join.sources[1]
        self.layout, self.angles = cross.layout, None

    def apply(self, rows: Tensor, x: Tensor, t: Tensor, inverse: bool) -> Tensor:
        m, drop = self.join.m, self.join.drop
        if drop is not None:
            rows = torch.cat([rows[:, :drop], rows.new_zeros(len(rows), 1), rows[:, drop:]], 1)
        if inverse:
            rows = self.cross.apply(rows, x, True)
        blocks = t[:, 0] if inverse else t[:, 0].mT
        rows = torch.cat(list(map(_product, rows.split(m, 1), blocks)), 1)
        if not inverse:
            rows = self.cross.apply(rows, x, False)
        return rows if drop is None else torch.cat([rows[:, :drop], rows[:, drop + 1 :]], 1)


# --- recursions as lists of steps -------------------------------------------------------------


class _Plan(NamedTuple):
    """Steps in order, each with one value.

    The table of angles that the steps read is ``angles[order]``, where an angle of zero stands
    behind the others if ``padded``; ``inverse`` tells where each angle is in the table. Up to
    ``thin`` n rows are better multiplied by what the ``last`` steps read than by U. Of
    the others the values are ``kept``, the first are made again when needed.
    """

    steps: tuple[_Step, ...]
    kept: tuple[int, ...]
    order: Tensor
    inverse: Tensor
    padded: bool
    last_use: dict[int, int]
    last: Any
    thin: float
    cut: bool = False

    def without_last(self) -> "_Plan":
        stop = -1 if self.last is self.steps[-1] else -2
        return self._replace(
            steps=self.steps[:stop],
            kept=tuple(i for i in self.kept if i < len(self.steps) + stop),
            cut=True,
        )


def _plan(schedule: Schedule, device: torch.device) -> "_Plan | _Rounds":
    """The plan of a schedule, remembered with it for each device."""
    _prepare(schedule, device)
    return schedule._product_plans[device]


def _prepare(schedule: Schedule, device: torch.device) -> bool:
    """Make the plan; the compiler runs this and does not look inside."""
    plans = schedule.__dict__.setdefault("_product_plans", {})
    if device not in plans:
        # What is remembered must be plain tensors, though a function be mapped or in inference.
        with torch._C._DisableFuncTorch(), torch.inference_mode(False):
            plans[device] = _new_plan(schedule, device)
    return True


# What torch.compiler.assume_constant_result does; the decorator loads the whole compiler.
_prepare._dynamo_marked_constant = True


def _new_plan(schedule: Schedule, device: torch.device) -> "_Plan | _Rounds":
    made = re.match(r"(crossing|cosine_sine)\((\d+)\)(\.|$)", schedule.name)
    if made is None:
        raise ValueError(
            "the product form exists for crossing, cosine_sine and restrictions of these, "
            f"got {schedule}."
        )
    if schedule.dim <= _TREE:
        return _new_rounds(schedule, device)
    steps, table = (_crossing if made[1] == "crossing" else _cosine_sine)(schedule)
    crossed = made[1] == "crossing" and schedule.dim > 2
    used = np.flatnonzero(table >= 0)
    inverse = np.empty(schedule.num_angles, np.int64)
    inverse[table[used]] = used
    order = np.where(table < 0, schedule.num_angles, table)
    leaves = {index for index, step in enumerate(steps) if not step.sources}
    made_again = {
        i for i, step in enumerate(steps) if leaves.issuperset(s.value for s in step.sources)
    }
    kept = tuple(i for i in range(len(steps)) if i not in made_again or i == len(steps) - 1)
    return _Plan(
        steps=tuple(steps),
        kept=kept,
        order=torch.from_numpy(order).to(device),
        inverse=torch.from_numpy(inverse).to(device),
        padded=len(used) < len(table),
        last_use={s.value: index for index, step in enumerate(steps) for s in step.sources},
        last=_LastOfCrossing(*steps[-2:]) if crossed else steps[-1],
        thin=1.5 if crossed else 4.0,
    )


def _cosine_sine(schedule: Schedule) -> tuple[list[_Step], np.ndarray]:
    """Steps, and for each row of the table its angle, -1 for an angle of zero."""
    n, limit = schedule.dim, _SMALL["cosine_sine"]
    # Downwards: of every block the number of its first angle, where the angles of a block are
    # those of V1, V2, CS, U1, U2 in turn, and the round that it starts with. A level has blocks
    # of one or two sizes.
    levels = [{n: (np.zeros(1, np.int64), np.zeros(1, np.int64))}]
    rounds = np.zeros(n * (n - 1) // 2, np.int64)
    while max(levels[-1]) > 2:
        below: dict[int, list[tuple[np.ndarray, np.ndarray]]] = {}
        for size, (first, start) in levels[-1].items():
            if size == 2:
                rounds[first] = start
            if size <= 2:
                continue
            p, q, middle, end = _angle_counts(size)
            depth = _depth(p)
            rounds[first[:, None] + np.arange(middle, end)] = start[:, None] + depth
            firsts = np.stack([first + end, first])
            starts = np.stack([start + depth + 1, start])
            halves = [(firsts, starts), (firsts + p * (p - 1) // 2, starts)]
            if p == q:
                axis = 1 if max(levels[-1]) <= limit else 2
                halves = [tuple(np.stack(pair, axis) for pair in zip(*halves, strict=True))]
            for part, half in zip((p, q), halves, strict=False):
                below.setdefault(part, []).append(half)
        levels.append(
            {
                size: tuple(
                    np.concatenate([x.ravel() for x in xs]) for xs in zip(*of, strict=True)
                )
                for size, of in below.items()
            }
        )
    if 2 in levels[-1]:
        rounds[levels[-1][2][0]] = levels[-1][2][1]
    place = np.empty_like(rounds)
    place[np.argsort(rounds, kind="stable")] = np.arange(len(rounds))
    place = _kept(schedule, cosine_sine(n))[place]

    steps: list[_Step] = []
    table: list[np.ndarray] = []
    values: dict[int, int] = {}
    filled = 0
    for depth in reversed(range(len(levels))):
        level, taken = levels[depth], dict.fromkeys(values, 0)
        layout = _small if max(level) <= limit else _large
        grows = depth == 0 or max(levels[depth - 1]) > limit
        widen = layout is _small and grows
        made: dict[int, int] = {}
        for size, (first, _) in level.items():
            count = len(first)
            p, q, middle, end = _angle_counts(size)
            if size == 1:
                step: _Step = _Points(count, grows)
            else:
                rows = np.full((count, p), -1)
                rows[:, :q] = place[first[:, None] + np.arange(middle, end)]
                table.append((rows.T if layout is _small else rows).ravel())
                angles = filled, filled + rows.size
                filled += rows.size
                sources = []
                for part in dict.fromkeys((p, q)) if size > 2 else ():
                    stop = taken[part] + (4 if p == q else 2) * count
                    sources.append(_Source(values[part], taken[part], stop))
                    taken[part] = stop
                args = layout, widen, *sources
                if size == 2:
                    step = _Turns(_small, grows, angles=angles)
                elif p == q:
                    kind = _EvenSmall if layout is _small else _EvenLarge
                    step = kind(p, count, *args, angles=angles)
                else:
                    step = _Odd(p, count, *args, angles=angles)
            made[size] = len(steps)
            steps.append(step)
        values = made
    return steps, np.concatenate(table)


def _angle_counts(size: int) -> tuple[int, int, int, int]:
    """p, q, and the range of the CS angles among those of a block."""
    p, q = (size + 1) // 2, size // 2
    middle = (p * (p - 1) + q * (q - 1)) // 2
    return p, q, middle, middle + q


def _depth(n: int) -> int:
    """Rounds of ``cosine_sine(n)``."""
    return 0 if n == 1 else 2 * _depth((n + 1) // 2) + 1


def _kept(schedule: Schedule, whole: Schedule) -> np.ndarray:
    """For each plane of the whole schedule its place in the restriction, -1 if left out.

    Restrictions keep or drop a plane wherever it occurs, up to some round, so that its k-th
    occurrence here is the k-th occurrence there.
    """
    keys = []
    for planes in (whole.planes.numpy(), schedule.planes.numpy()):
        plane = planes @ [whole.dim, 1]
        order = np.argsort(plane, kind="stable")
        occurrence = np.empty_like(plane)
        occurrence[order] = np.arange(len(plane)) - np.searchsorted(plane[order], plane[order])
        keys.append(occurrence * whole.dim**2 + plane)
    place = np.full(len(keys[0]), -1)
    order = np.argsort(keys[0])
    place[order[np.searchsorted(keys[0][order], keys[1])]] = np.arange(len(keys[1]))
    return place


def _crossing(schedule: Schedule) -> tuple[list[_Step], np.ndarray]:
    """Steps, and for each row of the table its angle, -1 for an angle of zero."""
    n, limit = schedule.dim, _SMALL["crossing"]
    place = np.full((n + 1, n + 1), -1)
    i, j = schedule.planes.numpy().T
    place[i, j] = np.arange(len(i))
    # The blocks T of a level are of one size or one smaller: these have a dummy axis, n in the
    # lists of axes below, at the same place in all of them.
    sizes = [n]
    while sizes[-1] > 1:
        sizes.append((sizes[-1] + 1) // 2)
    dummies = [0]
    for size, half in zip(sizes[-2::-1], sizes[:0:-1], strict=True):
        dummies.insert(0, dummies[0] + (half - 1 if size < 2 * half else 0))
    # Downwards: the axes of all T, and the axes (A, B) of all X; first those that join two T.
    trees, pairs = [np.arange(n)[None]], []
    for size, half, dummy in zip(sizes[:-1], sizes[1:], dummies[1:], strict=True):
        tree = np.insert(trees[-1], dummy, n, axis=1) if size < 2 * half else trees[-1]
        a, b = tree[:, :half], tree[:, half:]
        trees.append(np.concatenate([a, b]))
        crossings = [(a, b)]
        if pairs:
            pad = (0, 0), (0, 2 * half - size)
            wide = (np.pad(axes, pad, constant_values=n) for axes in pairs[-1])
            (a1, a2), (b1, b2) = ((axes[:, :half], axes[:, half:]) for axes in wide)
            crossings += [(a2, b1), (a1, b1), (a2, b2), (a1, b2)]
        pairs.append(tuple(np.concatenate(axes) for axes in zip(*crossings, strict=True)))

    a, b = pairs[-1]
    table = place[a[:, 0], b[:, 0]]
    steps: list[_Step] = [
        _Points(len(trees[-1]), False),
        _Turns(_small, False, angles=(0, len(table))),
    ]
    t, x = 0, 1
    for level in reversed(range(len(sizes) - 1)):
        size, half, joins = sizes[level], sizes[level + 1], 2**level
        layout = _small if 4 * half <= limit else _large
        widen = layout is _small and (level == 0 or 4 * size > limit)
        odd = size < 2 * half
        sources = _Source(x, 0, joins), _Source(t, 0, 2 * joins)
        t = len(steps)
        steps.append(_Join(half, dummies[level + 1] if odd else None, layout, widen, *sources))
        if level:
            source = _Source(x, joins, len(pairs[level][0]))
            x = len(steps)
            steps.append(_Cross(half, odd, layout, widen, source))
    return steps, table


# --- small matrices ---------------------------------------------------------------------------


class _Rounds(NamedTuple):
    """The rounds of a small schedule as dense matrices, 2^depth of them with the identity.

    ``entries`` tells which of the cosines, sines and negative sines of the angles, each with
    that of a zero behind, is at every place; ``places`` where c, -s, s and c of each angle are.
    """

    dim: int
    depth: int
    entries: Tensor
    places: Tensor


def _new_rounds(schedule: Schedule, device: torch.device) -> _Rounds:
    n, count, depth = schedule.dim, schedule.num_angles, (len(schedule) - 1).bit_length()
    (i, j), r = schedule.planes.numpy().T, schedule.round_of_plane.numpy()
    places = np.stack([(r * n + a) * n + b for a, b in ((i, i), (i, j), (j, i), (j, j))])
    entries = np.tile(np.where(np.eye(n, dtype=bool), count, 2 * count + 1).ravel(), 2**depth)
    entries[places] = np.array([[0], [2], [1], [0]]) * (count + 1) + np.arange(count)
    entries, places = (torch.from_numpy(x.ravel()).to(device) for x in (entries, places))
    return _Rounds(n, depth, entries, places)


def _tree(angles: Tensor, rounds: _Rounds) -> Tensor:
    """(sets, num_angles) -> (sets, n, n): products of pairs of rounds, of pairs of these, ..."""
    return (_Tree if torch.compiler.is_compiling() else _TreeEager).apply(angles, rounds)


def _levels(angles: Tensor, rounds: _Rounds) -> list[Tensor]:
    """All rounds of all sets one below the other, half as many products, and so on."""
    angles = torch.nn.functional.pad(angles, (0, 1))
    c, s = angles.cos(), angles.sin()
    entries = torch.cat([c, s, -s], 1).index_select(1, rounds.entries)
    levels = [entries.view(len(c) << rounds.depth, rounds.dim, rounds.dim)]
    for _ in range(rounds.depth):
        first, second = _pairs(levels[-1])
        levels.append(_large_mm(second, first))
    return levels


def _pairs(x: Tensor) -> tuple[Tensor, ...]:
    return x.reshape(x.shape[0] // 2, 2, *x.shape[1:]).unbind(1)


class _Tree(torch.autograd.Function):
    """As :func:`_tree`; keeps the angles only."""

    @staticmethod
    def forward(angles: Tensor, rounds: _Rounds) -> Tensor:
        with _full_precision(angles):
            return _levels(angles, rounds)[-1]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, _Rounds], output: Tensor) -> None:
        angles, ctx.rounds = inputs
        ctx.save_for_backward(angles)
        ctx.save_for_forward(angles)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (angles,) = ctx.saved_tensors
        with _full_precision(angles):
            for level in _levels(angles, ctx.rounds)[-2::-1]:
                first, second = _pairs(level)
                pairs = _large_mm(second.mT, grad), _large_mm(grad, first.mT)
                grad = torch.stack(pairs, 1).reshape(level.shape)
        sets, count = angles.shape
        grad = grad.reshape(sets, ctx.rounds.dim**2 << ctx.rounds.depth)
        grad = grad.index_select(1, ctx.rounds.places).view(sets, 4, count)
        ii, ij, ji, jj = grad.unbind(1)
        return angles.cos() * (ji - ij) - angles.sin() * (ii + jj), None


class _TreeEager(_Tree):
    """The same with rules for vmap and forward mode, which the compiler refuses."""

    @staticmethod
    def vmap(info: Any, in_dims: tuple, angles: Tensor, rounds: _Rounds) -> tuple[Tensor, int]:
        angles = angles.movedim(in_dims[0], 0)
        u = _TreeEager.apply(angles.flatten(0, 1), rounds)
        return u.unflatten(0, angles.shape[:2]), 0

    @staticmethod
    def jvp(ctx: Any, dangles: Tensor, _: None) -> Tensor:
        (angles,), rounds = ctx.saved_tensors, ctx.rounds
        c, s = (torch.nn.functional.pad(x * dangles, (0, 1)) for x in (angles.cos(), angles.sin()))
        dlevel = torch.cat([-s, c, -c], 1).index_select(1, rounds.entries)
        with _full_precision(angles):
            levels = _levels(angles, rounds)
            dlevel = dlevel.view(levels[0].shape)
            for level in levels[:-1]:
                (first, second), (dfirst, dsecond) = _pairs(level), _pairs(dlevel)
                dlevel = _large_mm(dsecond, first) + _large_mm(second, dfirst)
        return dlevel


# --- running the steps ------------------------------------------------------------------------


def _build(angles: Tensor, plan: _Plan) -> tuple[Tensor | None, list[Any]]:
    """Turns and values of a plan that is cut, else only the last of the values."""
    if _may_write():
        turns = _turns(angles, plan)
        return turns, _run(turns, plan, keep=False)
    function = _Build if torch.compiler.is_compiling() else _BuildEager
    kept = function.apply(angles, plan)
    if not plan.cut:
        return None, [kept[-1]]
    turns = _turns(angles, plan)
    return turns, _all_values(plan, kept, turns)


def _table(angles: Tensor, plan: _Plan) -> Tensor:
    """The angles (sets, num_angles) in the order of the steps: (rows, sets)."""
    if plan.padded:
        angles = torch.cat([angles, torch.zeros_like(angles[:, :1])], 1)
    if len(angles) == 1:
        return angles[0].index_select(0, plan.order).unsqueeze(1)
    return angles.mT.index_select(0, plan.order)


def _turns(angles: Tensor, plan: _Plan) -> Tensor:
    """[[c, -s], [s, c]] for each row of the table: (2, 2, rows, sets)."""
    table = _table(angles, plan)
    c, s = table.cos(), table.sin()
    return torch.stack([c, -s, s, c]).view(2, 2, *c.shape)


def _arguments(step: Any, values: Sequence[Tensor | None], turns: Tensor) -> list[Tensor]:
    """What a step reads: blocks of earlier values, and its turns."""
    block = step.layout.block
    inputs = [values[i].narrow(block, start, stop - start) for i, start, stop in step.sources]
    if step.angles is not None:
        start, stop = step.angles
        inputs.append(turns.narrow(2, start, stop - start))
    return inputs


def _value(step: Any, values: Sequence[Any], turns: Tensor) -> Tensor:
    value = step.forward(*_arguments(step, values, turns))
    return _to_large(value) if step.widen else value


def _run(turns: Tensor, plan: _Plan, *, keep: bool) -> list[Tensor]:
    """The values of all steps; unless kept, those that no later step reads are let go."""
    values: list[Tensor] = []
    with _full_precision(turns):
        for index, step in enumerate(plan.steps):
            values.append(_value(step, values, turns))
            for source in () if keep else step.sources:
                if plan.last_use[source.value] == index:
                    values[source.value] = turns
    return values


def _all_values(plan: _Plan, kept: Sequence[Any], turns: Tensor) -> list[Any]:
    """The values of all steps: those that were kept, and the others made again."""
    rest, values = dict(zip(plan.kept, kept, strict=True)), []
    for index, step in enumerate(plan.steps):
        values.append(rest[index] if index in rest else _value(step, values, turns))
    return values


class _Build(torch.autograd.Function):
    """(sets, num_angles) -> the values of the steps that are kept.

    Inputs and outputs, not hidden state, are what derivatives of any order may read.
    """

    @staticmethod
    def forward(angles: Tensor, plan: _Plan) -> tuple[Tensor, ...]:
        values = _run(_turns(angles, plan), plan, keep=True)
        return tuple(values[index] for index in plan.kept)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
        angles, ctx.plan = inputs
        kept = list(zip(ctx.plan.kept, output, strict=True))
        ctx.shapes = {index: value.shape for index, value in kept}
        read = {source.value for step in ctx.plan.steps for source in step.sources}
        values = [value if index in read else None for index, value in kept]
        ctx.save_for_backward(angles, *values)
        ctx.save_for_forward(angles, *values)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor, None]:
        angles, *kept = ctx.saved_tensors
        # Gradients that autograd itself has batched, as for is_grads_batched, forbid writing.
        batched = torch._C._functorch.is_legacy_batchedtensor
        outward = not torch.compiler.is_compiling() and any(
            grad is not None and batched(grad) for grad in grads
        )
        with torch.set_grad_enabled(torch.is_grad_enabled() or outward), _full_precision(angles):
            return _pull(ctx.plan, ctx.shapes, angles, kept, grads), None


def _pull(plan: _Plan, shapes: dict, angles: Tensor, kept: Sequence, grads: Sequence) -> Tensor:
    """Gradient of the angles from those of the values that were kept."""
    turns = _turns(angles, plan)
    values = _all_values(plan, kept, turns)
    given = dict(zip(plan.kept, grads, strict=True))
    parts: list[dict[int, Tensor]] = [{} for _ in values]
    buffers: dict[int, Tensor] = {}
    of_turns: list[Tensor] = []
    for index in reversed(range(len(values))):
        step, grad, value = plan.steps[index], given.get(index), values[index]
        block = 0 if step.widen else step.layout.block
        if index in buffers:
            total = buffers.pop(index)
        elif parts[index]:
            found = [parts[index][start] for start in sorted(parts[index])]
            unread = value.shape[block] - sum(part.shape[block] for part in found)
            if unread:
                found.append(torch.zeros_like(value.narrow(block, 0, unread)))
            total = torch.cat(found, block) if len(found) > 1 else found[0]
            parts[index] = {}
        elif grad is None:
            total = turns.new_zeros(value.shape if index not in shapes else shapes[index])
        else:
            total, grad = grad, None
        total = total if grad is None else total + grad
        total = _to_small(total) if step.widen else total
        outs: list[Tensor | None] = [None] * len(step.sources)
        if _may_write():
            for i, (source, start, stop) in enumerate(step.sources):
                if source not in buffers:
                    # Without its last steps a plan does not read all blocks of its values.
                    new = torch.zeros_like if plan.cut else torch.empty_like
                    buffers[source] = new(values[source])
                outs[i] = buffers[source].narrow(step.layout.block, start, stop - start)
        found, of_turn = step.backward(total, outs, *_arguments(step, values, turns))
        for source, part in zip(step.sources, found, strict=True):
            parts[source.value][source.start] = part
        if step.angles is not None:
            of_turns.append(of_turn)
    dt = torch.cat(of_turns[::-1], 2)
    (c, _), (s, _) = turns.narrow(2, 0, dt.shape[2]).unbind(0)
    grad = c * (dt[1, 0] - dt[0, 1]) - s * (dt[0, 0] + dt[1, 1])
    if plan.cut:
        grad = torch.cat([grad, torch.zeros_like(turns[0, 0, dt.shape[2] :])])
    return grad.index_select(0, plan.inverse).mT


class _BuildEager(_Build):
    """The same with rules for vmap and forward mode, which the compiler refuses."""

    @staticmethod
    def vmap(info: Any, in_dims: tuple, angles: Tensor, plan: _Plan) -> tuple:
        angles = angles.movedim(in_dims[0], 0)
        outputs = _BuildEager.apply(angles.flatten(0, 1), plan)
        steps = (plan.steps[index] for index in plan.kept)
        axes = tuple(1 if step.widen or step.layout is _large else 3 for step in steps)
        pairs = zip(outputs, axes, strict=True)
        return tuple(y.unflatten(axis, angles.shape[:2]) for y, axis in pairs), axes

    @staticmethod
    def jvp(ctx: Any, dangles: Tensor, _: None) -> tuple[Tensor, ...]:
        angles, *kept = ctx.saved_tensors
        plan, turns = ctx.plan, _turns(angles, ctx.plan)
        dtable = _table(dangles, plan)
        dc, ds = -turns[1, 0] * dtable, turns[0, 0] * dtable
        dturns = torch.stack([dc, -ds, ds, dc]).view(turns.shape)
        values, tangents = _all_values(plan, kept, turns), []
        with _full_precision(angles):
            for step in plan.steps:
                inputs = _arguments(step, values, turns), _arguments(step, tangents, dturns)
                tangent = step.tangent(*inputs[0], *inputs[1])
                tangents.append(_to_large(tangent) if step.widen else tangent)
        return tuple(tangents[index] for index in plan.kept)
