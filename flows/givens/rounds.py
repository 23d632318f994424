"""Round by round: a round turns all its disjoint planes at once.

The state is (dim, sets, columns): the transformed axis first, so that a round gathers whole
rows, then one row per set of angles, then the columns that share those angles. The backward
pass un-rotates the output and its gradient together, so that memory does not depend on the
number of rounds (README.md).

An engine is a faster way to do the same: a module with functions ``turn`` and ``pull`` like
those below. It serves the forward pass and the first derivative; derivatives of derivatives,
forward mode and the compiler go by the rounds.

A unitary differs in its table: the angles are followed by their phases, and the state is complex.
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
    phases: Tensor | None = None,
    inverse: bool = False,
    engine: ModuleType | None = None,
) -> Tensor:
    """Turn the last axis of x; angles (num_angles,) for all rows, or one set per row of x.

    With phases (num_angles + dim,) or one set per row, x must be complex.
    """
    if phases is not None:
        angles, last = _with_phases(angles, phases, schedule)
        x = x * _unit(-last) if inverse else x
    sets, n = angles.reshape(-1, angles.shape[-1]), schedule.dim
    rows = x.reshape(1, -1, n) if angles.ndim == 1 else x.reshape(-1, 1, n)
    y = _apply(rows, sets, schedule, inverse, engine).reshape(x.shape)
    return y if phases is None or inverse else y * _unit(last)


def matrix(
    angles: Tensor,
    schedule: Schedule,
    *,
    phases: Tensor | None = None,
    engine: ModuleType | None = None,
) -> Tensor:
    """U for each set of angles: the rotations applied to the columns of the identity."""
    if phases is not None:
        angles, last = _with_phases(angles, phases, schedule)
    n, sets = schedule.dim, angles.reshape(-1, angles.shape[-1])
    u = _apply(None, sets, schedule, False, engine).reshape(*angles.shape[:-1], n, n)
    return u if phases is None else _unit(last).unsqueeze(-1) * u


def _with_phases(angles: Tensor, phases: Tensor, schedule: Schedule) -> tuple[Tensor, Tensor]:
    """Angles followed by the phases of their planes, and the phases of the diagonal."""
    turned, last = phases.tensor_split([schedule.num_angles], dim=-1)
    return torch.cat([angles, turned], dim=-1), last


def _unit(phases: Tensor) -> Tensor:
    return torch.complex(phases.cos(), phases.sin())


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
        self.sin = _padded(angles.sin())

    def apply(self, x: Tensor, step: _Round, *, inverse: bool) -> Tensor:
        c = self.cos.index_select(0, step.angle)
        s = self.signed(self.sin, step)
        return torch.addcmul(c * x, s, x.index_select(0, step.partner), value=-1 if inverse else 1)

    def signed(self, table: Tensor, step: _Round) -> Tensor:
        """What multiplies the partner of each axis, from a table of the planes."""
        return table.index_select(0, step.angle) * step.sign

    def order(self, *, inverse: bool) -> tuple[_Round, ...]:
        return self.rounds[::-1] if inverse else self.rounds

    def read(self, y: Tensor, grad: Tensor, step: _Round) -> Tensor:
        """What the gradient of a round's angles is made of, (planes, ...), from its output."""
        # dy_i/dt = -y_j and dy_j/dt = y_i, so dL/dt = sum of y_i g_j - y_j g_i.
        products = (y * grad.index_select(0, step.partner)).sum(-1)
        return products.index_select(0, step.i) - products.index_select(0, step.j)

    def gradient(self, readings: Tensor, *, inverse: bool) -> Tensor:
        """Gradient of the table of angles, from the readings of all rounds."""
        return -readings if inverse else readings

    def tangents(self, dangles: Tensor) -> tuple[Tensor, ...]:
        """Tables that ``push`` needs."""
        return (_padded(dangles),)

    def push(
        self, dy: Tensor, y: Tensor, tangents: tuple[Tensor, ...], step: _Round, *, inverse: bool
    ) -> Tensor:
        """The tangent after a round, from what the round makes of it, and the round's output."""
        speed = self.signed(tangents[0], step)
        speed = -speed if inverse else speed
        return torch.addcmul(dy, speed, y.index_select(0, step.partner))


class _PhasedTurns(_Turns):
    """Complex rotations: s e^(ip) takes the place of s, its conjugate that of s in row i."""

    def __init__(self, table: Tensor, schedule: Schedule) -> None:
        angles, phases = table.tensor_split(2)
        super().__init__(angles, schedule)
        self.unit = _unit(phases)
        self.sines, self.cosines = angles.sin(), angles.cos()
        self.sin = _padded(self.sines * self.unit)

    def signed(self, table: Tensor, step: _Round) -> Tensor:
        # w for the second axis of a plane, -conj(w) for the first.
        w = table.index_select(0, step.angle)
        return torch.complex(w.real * step.sign, w.imag)

    def read(self, y: Tensor, grad: Tensor, step: _Round) -> Tensor:
        # With K_ab = sum of y_a conj(g_b): K_ij - conj(K_ji) and Im(K_ii - K_jj) (README.md).
        across = (y * grad.index_select(0, step.partner).conj()).sum(-1)
        across = across.index_select(0, step.i) - across.index_select(0, step.j).conj()
        along = (y * grad.conj()).sum(-1).imag
        along = along.index_select(0, step.i) - along.index_select(0, step.j)
        return torch.stack([across.real, across.imag, along], dim=1)

    def gradient(self, readings: Tensor, *, inverse: bool) -> Tensor:
        real, imag, along = readings.unbind(1)
        across = self.unit * torch.complex(real, imag)
        s = -self.sines if inverse else self.sines
        of_angles = -across.real if inverse else across.real
        of_phases = s * (s * along - self.cosines * across.imag)
        return torch.cat([of_angles, of_phases])

    def tangents(self, dangles: Tensor) -> tuple[Tensor, ...]:
        dt, dp = dangles.tensor_split(2)
        s, c = self.sines, self.cosines
        return _padded(self.unit * torch.complex(dt, s * c * dp)), _padded(s * s * dp)

    def push(
        self, dy: Tensor, y: Tensor, tangents: tuple[Tensor, ...], step: _Round, *, inverse: bool
    ) -> Tensor:
        dy = super().push(dy, y, tangents, step, inverse=inverse)
        along = tangents[1].index_select(0, step.angle) * step.sign
        return torch.addcmul(dy, torch.complex(torch.zeros_like(along), along), y)


def _padded(table: Tensor) -> Tensor:
    """With a row of zeros for axes that rest, and an axis for the columns."""
    return torch.cat([table, torch.zeros_like(table[:1])]).unsqueeze(-1)


def _turns(angles: Tensor, schedule: Schedule) -> _Turns:
    """The rotations of a table of angles, or of angles followed by as many phases."""
    with_phases = angles.shape[-1] > schedule.num_angles
    return (_PhasedTurns if with_phases else _Turns)(angles.mT, schedule)


def _state(x: Tensor, columns: bool) -> Tensor:
    """Columns (sets, dim, columns), or rows (sets, rows, dim), as a state."""
    return x.transpose(0, 1) if columns else x.permute(2, 0, 1)


def _unstate(state: Tensor, columns: bool) -> Tensor:
    return state.transpose(0, 1) if columns else state.permute(1, 2, 0)


def turn(x: Tensor | None, angles: Tensor, schedule: Schedule, inverse: bool) -> Tensor:
    """Rows x (sets, rows, dim), turned by the angles (sets, num_angles) of their set.

    Without x, the columns of the identity, as the matrix of each set (sets, dim, dim).
    """
    turns = _turns(angles, schedule)
    if x is None:
        identity = torch.eye(schedule.dim, dtype=turns.sin.dtype, device=angles.device)
        state = identity.unsqueeze(1).expand(-1, len(angles), -1)
    else:
        state = _state(x, False)
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
    turns = _turns(angles, schedule)
    both = torch.cat([_state(y, columns), _state(grad, columns)], dim=-1)
    readings = []
    for step in turns.order(inverse=not inverse):
        y, grad = both.tensor_split(2, dim=-1)
        readings.append(turns.read(y, grad, step))
        both = turns.apply(both, step, inverse=not inverse)
    readings = torch.cat(readings if inverse else readings[::-1])
    dx = _unstate(both[..., y.shape[-1] :], columns)
    return dx, turns.gradient(readings, inverse=inverse).mT


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
    turns, y = _turns(angles, schedule), _state(y, columns)
    for step in turns.order(inverse=not inverse):
        y = turns.apply(y, step, inverse=not inverse)
    dy = torch.zeros_like(y) if dx is None else _state(dx, columns)
    tangents = turns.tangents((torch.zeros_like(angles) if dangles is None else dangles).mT)
    for step in turns.order(inverse=inverse):
        y = turns.apply(y, step, inverse=inverse)
        dy = turns.apply(dy, step, inverse=inverse)
        dy = turns.push(dy, y, tangents, step, inverse=inverse)
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
