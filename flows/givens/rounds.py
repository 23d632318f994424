"""Round by round: a round turns all its disjoint planes at once.

State is kept as (dim, rows, columns): the transformed axis first, so that a round gathers
whole rows, then one row per set of angles, then the columns that share those angles. The
backward pass un-rotates the output and its gradient together, so that memory does not
depend on the number of rounds (README.md). A unitary differs in its table: the angles are
followed by their phases, and the state is complex.
"""

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
) -> Tensor:
    """Turn the last axis of x; angles (num_angles,) for all rows, or one set per row of x.

    With phases (num_angles + dim,) or one set per row, x must be complex.
    """
    if phases is not None:
        angles, last = _with_phases(angles, phases, schedule)
        x = x * _unit(-last) if inverse else x
    per_row = angles.ndim > 1
    state = x.reshape(-1, x.shape[-1]).mT.unsqueeze(-1 if per_row else 1)
    table = angles.reshape(-1, angles.shape[-1]).mT
    y = _apply(state, table, schedule, inverse)
    y = y.reshape(schedule.dim, -1).mT.reshape(x.shape)
    return y if phases is None or inverse else y * _unit(last)


def matrix(angles: Tensor, schedule: Schedule, *, phases: Tensor | None = None) -> Tensor:
    """U for each set of angles: the rotations applied to the columns of the identity."""
    n, dtype = schedule.dim, angles.dtype
    if phases is not None:
        angles, last = _with_phases(angles, phases, schedule)
        last = _unit(last).unsqueeze(-1)
        dtype = last.dtype
    table = angles.reshape(-1, angles.shape[-1]).mT
    identity = torch.eye(n, dtype=dtype, device=angles.device)
    state = identity.unsqueeze(1).expand(n, table.shape[1], n)
    y = _apply(state, table, schedule, False)
    u = y.movedim(0, 1).reshape(*angles.shape[:-1], n, n)
    return u if phases is None else last * u


def _with_phases(angles: Tensor, phases: Tensor, schedule: Schedule) -> tuple[Tensor, Tensor]:
    """Angles followed by the phases of their planes, and the phases of the diagonal."""
    turned, last = phases.tensor_split([schedule.num_angles], dim=-1)
    return torch.cat([angles, turned], dim=-1), last


def _unit(phases: Tensor) -> Tensor:
    return torch.complex(phases.cos(), phases.sin())


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
        self.sin = _padded(angles.sin())

    def apply(self, x: Tensor, turn: _Round, *, inverse: bool) -> Tensor:
        c = self.cos.index_select(0, turn.angle)
        s = self.signed(self.sin, turn)
        return torch.addcmul(c * x, s, x.index_select(0, turn.partner), value=-1 if inverse else 1)

    def signed(self, table: Tensor, turn: _Round) -> Tensor:
        """What multiplies the partner of each axis, from a table of the planes."""
        return table.index_select(0, turn.angle) * turn.sign

    def order(self, *, inverse: bool) -> tuple[_Round, ...]:
        return self.rounds[::-1] if inverse else self.rounds

    def read(self, y: Tensor, grad: Tensor, turn: _Round) -> Tensor:
        """What the gradient of a round's angles is made of, (planes, ...), from its output."""
        # dy_i/dt = -y_j and dy_j/dt = y_i, so dL/dt = sum of y_i g_j - y_j g_i.
        products = (y * grad.index_select(0, turn.partner)).sum(-1)
        return products.index_select(0, turn.i) - products.index_select(0, turn.j)

    def gradient(self, readings: Tensor, *, inverse: bool) -> Tensor:
        """Gradient of the table of angles, from the readings of all rounds."""
        return -readings if inverse else readings

    def tangents(self, dangles: Tensor) -> tuple[Tensor, ...]:
        """Tables that ``push`` needs."""
        return (_padded(dangles),)

    def push(
        self, dy: Tensor, y: Tensor, tangents: tuple[Tensor, ...], turn: _Round, *, inverse: bool
    ) -> Tensor:
        """The tangent after a round, from what the round makes of it, and the round's output."""
        speed = self.signed(tangents[0], turn)
        speed = -speed if inverse else speed
        return torch.addcmul(dy, speed, y.index_select(0, turn.partner))


class _PhasedTurns(_Turns):
    """Complex rotations: s e^(ip) takes the place of s, its conjugate that of s in row i."""

    def __init__(self, table: Tensor, schedule: Schedule) -> None:
        angles, phases = table.tensor_split(2)
        super().__init__(angles, schedule)
        self.unit = _unit(phases)
        self.sines, self.cosines = angles.sin(), angles.cos()
        self.sin = _padded(self.sines * self.unit)

    def signed(self, table: Tensor, turn: _Round) -> Tensor:
        # w for the second axis of a plane, -conj(w) for the first.
        w = table.index_select(0, turn.angle)
        return torch.complex(w.real * turn.sign, w.imag)

    def read(self, y: Tensor, grad: Tensor, turn: _Round) -> Tensor:
        # With K_ab = sum of y_a conj(g_b): K_ij - conj(K_ji) and Im(K_ii - K_jj) (README.md).
        across = (y * grad.index_select(0, turn.partner).conj()).sum(-1)
        across = across.index_select(0, turn.i) - across.index_select(0, turn.j).conj()
        along = (y * grad.conj()).sum(-1).imag
        along = along.index_select(0, turn.i) - along.index_select(0, turn.j)
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
        self, dy: Tensor, y: Tensor, tangents: tuple[Tensor, ...], turn: _Round, *, inverse: bool
    ) -> Tensor:
        dy = super().push(dy, y, tangents, turn, inverse=inverse)
        along = tangents[1].index_select(0, turn.angle) * turn.sign
        return torch.addcmul(dy, torch.complex(torch.zeros_like(along), along), y)


def _padded(table: Tensor) -> Tensor:
    """With a row of zeros for axes that rest, and an axis for the columns."""
    return torch.cat([table, torch.zeros_like(table[:1])]).unsqueeze(-1)


def _turns(table: Tensor, schedule: Schedule) -> _Turns:
    """The rotations of a table of angles, or of angles followed by as many phases."""
    return (_Turns if len(table) == schedule.num_angles else _PhasedTurns)(table, schedule)


class _Rotate(torch.autograd.Function):
    """state (dim, rows, columns), angles (num_angles, rows) -> state after all rounds.

    For a complex state the angles are followed by as many phases.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, angles: Tensor, schedule: Schedule, inverse: bool) -> Tensor:
        turns = _turns(angles, schedule)
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
        turns = _turns(angles, ctx.schedule)
        both = torch.cat([y, grad], dim=-1)
        readings = []
        for turn in turns.order(inverse=not ctx.inverse):
            y, grad = both.tensor_split(2, dim=-1)
            readings.append(turns.read(y, grad, turn))
            both = turns.apply(both, turn, inverse=not ctx.inverse)
        readings = torch.cat(readings if ctx.inverse else readings[::-1])
        grad = both[..., y.shape[-1] :]
        return grad, turns.gradient(readings, inverse=ctx.inverse), None, None

    @staticmethod
    def jvp(ctx: Any, dx: Tensor | None, dangles: Tensor | None, *_: None) -> Tensor:
        y, angles = ctx.saved_tensors
        turns = _turns(angles, ctx.schedule)
        for turn in turns.order(inverse=not ctx.inverse):
            y = turns.apply(y, turn, inverse=not ctx.inverse)
        dy = torch.zeros_like(y) if dx is None else dx
        tangents = turns.tangents(torch.zeros_like(angles) if dangles is None else dangles)
        for turn in turns.order(inverse=ctx.inverse):
            y = turns.apply(y, turn, inverse=ctx.inverse)
            dy = turns.apply(dy, turn, inverse=ctx.inverse)
            dy = turns.push(dy, y, tangents, turn, inverse=ctx.inverse)
        return dy
