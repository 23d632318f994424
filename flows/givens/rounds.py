"""Round by round: a round turns all its disjoint planes at once.

The state is (dim, sets, columns): the transformed axis first, so that a round gathers whole
rows, then one row per set of angles, then the columns that share those angles. Every
operation is out of place and differentiable. A unitary differs in its table: the angles are
followed by their phases, and the state is complex.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from flows.givens.schedule import Schedule

__all__ = ["pull", "push", "turn", "unit"]


def unit(phases: Tensor) -> Tensor:
    """e^(i phase)."""
    return torch.complex(phases.cos(), phases.sin())


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
        self.unit = unit(phases)
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


def push(
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
