"""Rotations of axis 1 by angles of their own for every sample, or every position of one."""

import torch
from torch import Tensor

from flows import givens
from flows.orthogonal_base import starts_at_random

__all__ = ["count_angles", "rotate_features", "schedule_from_zero"]


def schedule_from_zero(features: int, schedule: givens.Schedule | None) -> givens.Schedule | None:
    """The schedule for angles that start at zero, as conditioners do; None for one feature.

    Args:
        features: Number of features to rotate.
        schedule: Planes in order of application; ``crossing(features)`` by default.

    Raises:
        ValueError: If the schedule has another dimension, or is degenerate at zero.
    """
    if schedule is None:
        return None if features == 1 else givens.crossing(features)
    if schedule.dim != features:
        raise ValueError(f"schedule must have dimension {features}, got {schedule}.")
    if starts_at_random(schedule):
        raise ValueError(
            "schedule must not be degenerate at angles of zero, where conditioners start, "
            f"as cosine_sine is; got {schedule}."
        )
    return schedule


def count_angles(schedule: givens.Schedule | None) -> int:
    """Angles of a schedule; none where a single feature leaves nothing to rotate."""
    return 0 if schedule is None else schedule.num_angles


def rotate_features(
    inputs: Tensor, angles: Tensor, schedule: givens.Schedule | None, *, inverse: bool = False
) -> Tensor:
    """Rotate axis 1, in the dtype of the inputs under autocast, too.

    Args:
        inputs: (batch, features, ...).
        angles: (batch, angles) for one rotation of all positions of a sample, or
            (batch, angles, ...) for one per position.
        schedule: From :func:`schedule_from_zero`.
        inverse: Undo the rotations instead.

    Returns:
        Rotated inputs, in their dtype.
    """
    if schedule is None:
        return inputs
    with torch.autocast(inputs.device.type, enabled=False):
        angles = angles.to(inputs.dtype)
        if angles.ndim < inputs.ndim:
            # For more than a few positions the matrix is sooner built than they are turned.
            u = givens.matrix(angles, schedule)
            return ((u.mT if inverse else u) @ inputs.flatten(2)).reshape(inputs.shape)
        rows, angles = inputs.movedim(1, -1), angles.movedim(1, -1)
        return givens.rotate(rows, angles, schedule, inverse=inverse).movedim(-1, 1)
