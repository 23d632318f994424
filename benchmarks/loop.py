"""What one writes first: a loop over the rounds, differentiated by autograd."""

from collections.abc import Callable

import torch
from torch import Tensor

from flows.givens import Schedule

__all__ = ["SAVED_PER_ROUND", "plain_loop"]

# Numbers that autograd keeps per round, in units of the state x (measured; see tests).
SAVED_PER_ROUND = 4


def plain_loop(schedule: Schedule, device: str) -> Callable[[Tensor, Tensor], Tensor]:
    """(x, angles) -> rotated x: in each round gather, multiply and add.

    ``angles`` has one axis for all rows of x, or one set per row.
    """
    n, count, shape = schedule.dim, schedule.num_angles, (len(schedule), schedule.dim)
    (i, j), r, k = schedule.planes.unbind(-1), schedule.round_of_plane, torch.arange(count)
    partner = torch.arange(n).repeat(len(schedule), 1)
    partner[r, i], partner[r, j] = j, i
    angle = torch.full(shape, count)
    angle[r, i] = angle[r, j] = k
    sign = torch.zeros(shape, dtype=torch.float32)
    sign[r, i], sign[r, j] = -1.0, 1.0
    tables = [table.to(device).unbind() for table in (partner, angle, sign)]
    rounds = list(zip(*tables, strict=True))

    def rotate(x: Tensor, angles: Tensor) -> Tensor:
        angles = torch.cat([angles, angles.new_zeros(*angles.shape[:-1], 1)], -1)  # axes that rest
        cos, sin = angles.cos(), angles.sin()
        for partner, angle, sign in rounds:
            s = sin[..., angle] * sign.to(x.dtype)
            x = cos[..., angle] * x + s * x[..., partner]
        return x

    return rotate
