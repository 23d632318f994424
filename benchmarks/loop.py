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
    n, count = schedule.dim, schedule.num_angles
    rounds = []
    planes = iter(enumerate(schedule.planes.tolist()))
    for size in map(len, schedule.rounds):
        partner, angle, sign = list(range(n)), [count] * n, [0.0] * n
        for _ in range(size):
            k, (i, j) = next(planes)
            partner[i], partner[j] = j, i
            angle[i] = angle[j] = k
            sign[i], sign[j] = -1.0, 1.0
        lists = (partner, angle, sign)
        rounds.append([torch.tensor(entries, device=device) for entries in lists])

    def rotate(x: Tensor, angles: Tensor) -> Tensor:
        angles = torch.cat([angles, angles.new_zeros(*angles.shape[:-1], 1)], -1)  # axes that rest
        cos, sin = angles.cos(), angles.sin()
        for partner, angle, sign in rounds:
            s = sin[..., angle] * sign.to(x.dtype)
            x = cos[..., angle] * x + s * x[..., partner]
        return x

    return rotate
