"""Round by round: a round turns all its disjoint planes at once.

State is kept as (dim, rows, columns): the transformed axis first, so that a round gathers
whole rows, then one row per set of angles, then the columns that share those angles. The
backward pass un-rotates the output and its gradient together, so that memory does not
depend on the number of rounds (README.md).
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from flows.givens.schedule import Schedule

__all__ = ["matrix", "rotate"]


def rotate(x: Tensor, angles: Tensor, schedule: Schedule, *, inverse: bool = False) -> Tensor:
    """Turn the last axis of x; angles (num_angles,) for all rows, or one set per row of x."""
    per_row = angles.ndim > 1
    state = x.reshape(-1, x.shape[-1]).mT.unsqueeze(-1 if per_row else 1)
    table = angles.reshape(-1, schedule.num_angles).mT
    y = _apply(state, table, schedule, inverse)
    return y.reshape(schedule.dim, -1).mT.reshape(x.shape)


def matrix(angles: Tensor, schedule: Schedule) -> Tensor:
    """U for each set of angles: the rotations applied to the columns of the identity."""
    n = schedule.dim
    table = angles.reshape(-1, schedule.num_angles).mT
    identity = torch.eye(n, dtype=angles.dtype, device=angles.device)
    state = identity.unsqueeze(1).expand(n, table.shape[1], n)
    y = _apply(state, table, schedule, False)
    return y.movedim(0, 1).reshape(*angles.shape[:-1], n, n)


def _apply(state: Tensor, angles: Tensor, schedule: Schedule, inverse: bool) -> Tensor:
    # The compiler derives a backward pass of its own, and decides itself what to keep.
    function = _Rotate.forward if torch.compiler.is_compiling() else _Rotate.apply
    return function(state, angles, schedule, inverse)


class _Round(NamedTuple):
    partner: Tensor  # (dim,) the axis that an axis meets, itself if it rests
    angle: Tensor  # (dim,) its row in the padded tables of cosines and sines; the last rests
    sign: Tensor  # (dim, 1, 1) -1 for the first axis of a plane, +1 for the second
    i: Tensor  # (planes,)
    j: Tensor  # (planes,)


def _rounds(schedule: Schedule, device: torch.device, dtype: torch.dtype) -> tuple[_Round, ...]:
    """The schedule as index tensors on a device, first round first."""
    n, rounds, count = schedule.dim, len(schedule), schedule.num_angles
    (i, j), r = schedule.planes.unbind(1), schedule.round_of_plane
    partner = torch.arange(n).repeat(rounds, 1)
    partner[r, i], partner[r, j] = j, i
    angle = torch.full((rounds, n), count)
    angle[r, i] = angle[r, j] = torch.arange(count)
    sign = torch.zeros(rounds, n)
    sign[r, i], sign[r, j] = -1.0, 1.0
    return tuple(
        map(
            _Round,
            partner.to(device),
            angle.to(device),
            sign.to(device, dtype)[..., None, None],
            i.to(device).split(schedule.round_sizes),
            j.to(device).split(schedule.round_sizes),
        )
    )


class _Turns:
    """The rotations of one set of rounds, ready to be applied forwards or backwards."""

    def __init__(self, angles: Tensor, schedule: Schedule) -> None:
        key = ("rounds", angles.device, angles.dtype)
        self.rounds = schedule.remember(
            key, lambda: _rounds(schedule, angles.device, angles.dtype)
        )
        # The extra row holds for axes that rest in a round.
        self.cos = torch.cat([angles.cos(), torch.ones_like(angles[:1])]).unsqueeze(-1)
        self.sin = torch.cat([angles.sin(), torch.zeros_like(angles[:1])]).unsqueeze(-1)

    def apply(self, x: Tensor, turn: _Round, *, inverse: bool) -> Tensor:
        c = self.cos.index_select(0, turn.angle)
        s = self.sin.index_select(0, turn.angle) * turn.sign
        return torch.addcmul(c * x, s, x.index_select(0, turn.partner), value=-1 if inverse else 1)

    def order(self, *, inverse: bool) -> tuple[_Round, ...]:
        return self.rounds[::-1] if inverse else self.rounds


class _Rotate(torch.autograd.Function):
    """state (dim, rows, columns), angles (num_angles, rows) -> state after all rounds."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, angles: Tensor, schedule: Schedule, inverse: bool) -> Tensor:
        turns = _Turns(angles, schedule)
        for turn in turns.order(inverse=inverse):
            x = turns.apply(x, turn, inverse=inverse)
        return x

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        _, angles, ctx.schedule, ctx.inverse = inputs
        ctx.save_for_backward(output, angles)
        ctx.save_for_forward(output, angles)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        # Every operation is out of place and differentiable: nothing is written into the
        # incoming gradient, and a second backward runs through this code.
        y, angles = ctx.saved_tensors
        turns = _Turns(angles, ctx.schedule)
        both = torch.cat([y, grad], dim=-1)
        grads = []
        for turn in turns.order(inverse=not ctx.inverse):
            y, grad = both.tensor_split(2, dim=-1)
            # dy_i/dt = -y_j and dy_j/dt = y_i, so dL/dt = sum of y_i g_j - y_j g_i.
            products = (y * grad.index_select(0, turn.partner)).sum(-1)
            grads.append(products.index_select(0, turn.i) - products.index_select(0, turn.j))
            both = turns.apply(both, turn, inverse=not ctx.inverse)
        grad_angles = torch.cat(grads if ctx.inverse else grads[::-1])
        grad = both[..., y.shape[-1] :]
        return grad, -grad_angles if ctx.inverse else grad_angles, None, None

    @staticmethod
    def jvp(ctx: Any, dx: Tensor | None, dangles: Tensor | None, *_: None) -> Tensor:
        y, angles = ctx.saved_tensors
        turns = _Turns(angles, ctx.schedule)
        for turn in turns.order(inverse=not ctx.inverse):
            y = turns.apply(y, turn, inverse=not ctx.inverse)
        dy = torch.zeros_like(y) if dx is None else dx
        dangles = torch.zeros_like(angles) if dangles is None else dangles
        dangles = torch.cat([dangles, torch.zeros_like(dangles[:1])]).unsqueeze(-1)
        for turn in turns.order(inverse=ctx.inverse):
            y = turns.apply(y, turn, inverse=ctx.inverse)
            dy = turns.apply(dy, turn, inverse=ctx.inverse)
            speed = dangles.index_select(0, turn.angle) * turn.sign
            speed = -speed if ctx.inverse else speed
            dy = torch.addcmul(dy, speed, y.index_select(0, turn.partner))
        return dy
