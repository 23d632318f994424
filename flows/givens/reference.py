"""The definition: one rotation after another, slow and exact, for any dtype.

Everything fast is judged against this file.
"""

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
    """Turn the last axis of x plane by plane; leading axes of x, angles and phases broadcast."""
    c, s = angles.cos(), angles.sin()
    if phases is not None:
        turned, last = phases.tensor_split([schedule.num_angles], dim=-1)
        s = s * _unit(turned)
        x = x * _unit(-last) if inverse else x
    turns = list(zip(schedule.planes.tolist(), c.unbind(-1), s.unbind(-1), strict=True))
    if inverse:
        turns = [(plane, c, -s) for plane, c, s in reversed(turns)]
    y = list(x.unbind(-1))
    for (i, j), c, s in turns:
        y[i], y[j] = c * y[i] - s.conj() * y[j], s * y[i] + c * y[j]
    result = torch.stack(torch.broadcast_tensors(*y), dim=-1)
    return result if phases is None or inverse else result * _unit(last)


def matrix(angles: Tensor, schedule: Schedule, *, phases: Tensor | None = None) -> Tensor:
    """U with U x = all rotations applied to the column x, first round first."""
    identity = torch.eye(schedule.dim, dtype=angles.dtype, device=angles.device)
    phases = None if phases is None else phases.unsqueeze(-2)
    return rotate(identity, angles.unsqueeze(-2), schedule, phases=phases).mT


def _unit(phases: Tensor) -> Tensor:
    return torch.complex(phases.cos(), phases.sin())
