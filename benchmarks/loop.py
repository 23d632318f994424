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
    n, sizes = schedule.dim, schedule.round_sizes
    (i, j), r = schedule.planes.unbind(-1), schedule.round_of_plane
    k = torch.cat([torch.arange(size) for size in sizes])  # place of an angle in its round
    partner = torch.arange(n).repeat(len(schedule), 1)
    partner[r, i], partner[r, j] = j, i
    place = torch.zeros_like(partner)
    place[r, i] = place[r, j] = k
    sign = torch.zeros(len(schedule), n, dtype=torch.float32)  # zero for axes that rest
    sign[r, i], sign[r, j] = -1.0, 1.0
    tables = [table.to(device) for table in (partner, place, sign, sign.abs(), 1 - sign.abs())]

    def rotate(x: Tensor, angles: Tensor) -> Tensor:
        # Split once: indexing all angles in each round would cost the backward all of them.
        cosines, sines = (f.split(sizes, -1) for f in (angles.cos(), angles.sin()))
        rows = zip(*(table.unbind() for table in tables), strict=True)
        for c, s, (partner, place, sign, turns, rests) in zip(cosines, sines, rows, strict=True):
            c = torch.addcmul(rests.to(x.dtype), c[..., place], turns.to(x.dtype))
            s = s[..., place] * sign.to(x.dtype)
            x = c * x + s * x[..., partner]
        return x

    return rotate
