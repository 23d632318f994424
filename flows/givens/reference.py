"""The definition: one rotation after another, slow and exact, for any dtype.

Everything fast is judged against this file.
"""

import torch
from torch import Tensor

from flows.givens.schedule import Schedule

__all__ = ["matrix", "rotate"]


def rotate(x: Tensor, angles: Tensor, schedule: Schedule, *, inverse: bool = False) -> Tensor:
    """Turn the last axis of x plane by plane; the leading axes of x and angles broadcast."""
    turns = list(zip(schedule.planes.tolist(), angles.unbind(-1), strict=True))
    if inverse:
        turns = [(plane, -angle) for plane, angle in reversed(turns)]
    y = list(x.unbind(-1))
    for (i, j), angle in turns:
        c, s = angle.cos(), angle.sin()
        y[i], y[j] = c * y[i] - s * y[j], s * y[i] + c * y[j]
    return torch.stack(torch.broadcast_tensors(*y), dim=-1)


def matrix(angles: Tensor, schedule: Schedule) -> Tensor:
    """U with U x = all rotations applied to the column x, first round first."""
    identity = torch.eye(schedule.dim, dtype=angles.dtype, device=angles.device)
    return rotate(identity, angles.unsqueeze(-2), schedule).mT
