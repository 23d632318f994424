"""Round by round: a round turns all its disjoint planes at once.

The state is (dim, sets, columns): the transformed axis first, so that a round gathers whole
rows, then one row per set of angles, then the columns that share those angles. The backward
pass un-rotates the output and its gradient together, so that memory does not depend on the
number of rounds (README.md).

An engine is a faster way to do the same: a module with functions ``turn`` and ``pull`` like
those below. It serves the forward pass and the first derivative; derivatives of derivatives,
forward mode and the compiler go by the rounds.
"""

import inspect
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flows.givens.schedule import Schedule

__all__ = ["matrix", "rotate"]


def rotate(
    x: Tensor,
    angles: Tensor,
    schedule: Schedule,
    *,
    inverse: bool = False,
    engine: ModuleType | None = None,
) -> Tensor:
    """Turn the last axis of x; angles (num_angles,) for all rows, or one set per row of x."""
    sets, n = angles.reshape(-1, schedule.num_angles), schedule.dim
    rows = x.reshape(1, -1, n) if angles.ndim == 1 else x.reshape(-1, 1, n)
    return _apply(rows, sets, schedule, inverse, engine).reshape(x.shape)


def matrix(angles: Tensor, schedule: Schedule, *, engine: ModuleType | None = None) -> Tensor:
    """U for each set of angles: the rotations applied to the columns of the identity."""
    n, sets = schedule.dim, angles.reshape(-1, schedule.num_angles)
    return _apply(None, sets, schedule, False, engine).reshape(*angles.shape[:-1], n, n)


def _apply(
    x: Tensor | None,
    angles: Tensor,
    schedule: Schedule,
    inverse: bool,
    engine: ModuleType | None,
) -> Tensor:
    # The compiler derives a backward pass of its own, and decides itself what to keep.
    if torch.compiler.is_compiling():
        return turn(x, angles, schedule, inverse)
    return _Rotate.apply(x, angles, schedule, inverse, engine)


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

    def apply(self, x: Tensor, step: _Round, *, inverse: bool) -> Tensor:
        c = self.cos.index_select(0, step.angle)
        s = self.sin.index_select(0, step.angle) * step.sign
        return torch.addcmul(c * x, s, x.index_select(0, step.partner), value=-1 if inverse else 1)

    def order(self, *, inverse: bool) -> tuple[_Round, ...]:
        return self.rounds[::-1] if inverse else self.rounds


def _state(x: Tensor, columns: bool) -> Tensor:
    """Columns (sets, dim, columns), or rows (sets, rows, dim), as a state."""
    return x.transpose(0, 1) if columns else x.permute(2, 0, 1)


def _unstate(state: Tensor, columns: bool) -> Tensor:
    return state.transpose(0, 1) if columns else state.permute(1, 2, 0)


def turn(x: Tensor | None, angles: Tensor, schedule: Schedule, inverse: bool) -> Tensor:
    """Rows x (sets, rows, dim), turned by the angles (sets, num_angles) of their set.

    Without x, the columns of the identity, as the matrix of each set (sets, dim, dim).
    """
    if x is None:
        identity = torch.eye(schedule.dim, dtype=angles.dtype, device=angles.device)
        state = identity.unsqueeze(1).expand(-1, len(angles), -1)
    else:
        state = _state(x, False)
    turns = _Turns(angles.mT, schedule)
    for step in turns.order(inverse=inverse):
        state = turns.apply(state, step, inverse=inverse)
    return _unstate(state, x is None)


def pull(
    y: Tensor,
    grad: Tensor,
    angles: Tensor,
    schedule: Schedule,
    inverse: bool,
    *,
    columns: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients of x and angles from what ``turn`` returned and its gradient.

    ``columns`` tells that these are columns of matrices; a gradient of x has no meaning then.
    """
    # Every operation is out of place and differentiable: nothing is written into the
    # incoming gradient, and a second backward runs through this code.
    turns = _Turns(angles.mT, schedule)
    both = torch.cat([_state(y, columns), _state(grad, columns)], dim=-1)
    grads = []
    for step in turns.order(inverse=not inverse):
        y, grad = both.tensor_split(2, dim=-1)
        # dy_i/dt = -y_j and dy_j/dt = y_i, so dL/dt = sum of y_i g_j - y_j g_i.
        products = (y * grad.index_select(0, step.partner)).sum(-1)
        grads.append(products.index_select(0, step.i) - products.index_select(0, step.j))
        both = turns.apply(both, step, inverse=not inverse)
    grad_angles = torch.cat(grads if inverse else grads[::-1]).mT
    dx = _unstate(both[..., y.shape[-1] :], columns)
    return dx, -grad_angles if inverse else grad_angles


def _push(
    y: Tensor,
    angles: Tensor,
    dx: Tensor | None,
    dangles: Tensor | None,
    schedule: Schedule,
    inverse: bool,
    columns: bool,
) -> Tensor:
    """The tangent of what ``turn`` returned, from those of x and angles."""
    turns, y = _Turns(angles.mT, schedule), _state(y, columns)
    for step in turns.order(inverse=not inverse):
        y = turns.apply(y, step, inverse=not inverse)
    dy = torch.zeros_like(y) if dx is None else _state(dx, columns)
    dangles = torch.zeros_like(angles) if dangles is None else dangles
    dangles = torch.cat([dangles.mT, torch.zeros_like(dangles.mT[:1])]).unsqueeze(-1)
    for step in turns.order(inverse=inverse):
        y = turns.apply(y, step, inverse=inverse)
        dy = turns.apply(dy, step, inverse=inverse)
        speed = dangles.index_select(0, step.angle) * step.sign
        speed = -speed if inverse else speed
        dy = torch.addcmul(dy, speed, y.index_select(0, step.partner))
    return _unstate(dy, columns)


class _Rotate(torch.autograd.Function):
    """``turn`` and its derivatives."""

    @staticmethod
    def forward(
        x: Tensor | None,
        angles: Tensor,
        schedule: Schedule,
        inverse: bool,
        engine: ModuleType | None,
    ) -> Tensor:
        if engine is not None:
            return engine.turn(x, angles, schedule, inverse)
        # Contiguous, as forward mode wants an output that is no view.
        return turn(x, angles, schedule, inverse).clone(memory_format=torch.contiguous_format)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        x, angles, ctx.schedule, ctx.inverse, ctx.engine = inputs
        ctx.columns = x is None
        ctx.save_for_backward(output, angles)
        ctx.save_for_forward(output, angles)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor, None, None, None]:
        y, angles = ctx.saved_tensors
        fast = ctx.engine is not None and not torch.is_grad_enabled() and _in_memory(grad)
        dx, dangles = (ctx.engine.pull if fast else pull)(
            y, grad, angles, ctx.schedule, ctx.inverse, columns=ctx.columns
        )
        return None if ctx.columns else dx, dangles, None, None, None

    @staticmethod
    def jvp(ctx: Any, dx: Tensor | None, dangles: Tensor | None, *_: None) -> Tensor:
        given = *ctx.saved_tensors, dx, dangles, ctx.schedule, ctx.inverse
        return _push(*given, ctx.columns)

    @staticmethod
    def vmap(info: Any, in_dims: tuple, x: Tensor | None, angles: Tensor, *rest: Any):
        x_dim, angles_dim = in_dims[:2]
        if angles_dim is None:  # more rows with the same angles
            x = x.movedim(x_dim, 1)
            y = _Rotate.apply(x.flatten(1, 2), angles, *rest)
            return y.unflatten(1, x.shape[1:3]), 1
        angles = angles.movedim(angles_dim, 0)
        if x is not None:
            x = x.unsqueeze(0) if x_dim is None else x.movedim(x_dim, 0)
            x = x.expand(info.batch_size, -1, -1, -1).flatten(0, 1)
        y = _Rotate.apply(x, angles.flatten(0, 1), *rest)
        return y.unflatten(0, angles.shape[:2]), 0


# Torch asks for the signature in every call, which takes as long as a small rotation.
_Rotate.forward.__signature__ = inspect.signature(_Rotate.forward)


def _in_memory(tensor: Tensor) -> bool:
    """Whether there are numbers to read: not so for the wrappers of a batched backward."""
    try:
        tensor.data_ptr()
    except RuntimeError:
        return False
    return True
