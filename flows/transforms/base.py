"""The contract of every layer: nflows' ``Transform``.

``forward(inputs, context=None)`` goes from data to noise, ``inverse`` back; both return
``(outputs, logabsdet)`` with logabsdet a fresh dense tensor of shape (batch,), in nats.

A layer may also have ``recover(outputs, context=None, *, inverse=False)``, which a chain with
``memory="reversible"`` calls in its backward pass: the inputs of ``forward`` (or of ``inverse``)
from its outputs, as a leaf that requires its gradient, then outputs and logabsdet as functions of
it. It pays where the way back and the way forth share work. Without it a chain calls both.
"""

import torch
import torch.distributed as dist
from nflows.transforms.base import InputOutsideDomain, InverseNotAvailable, Transform
from torch import Tensor

__all__ = [
    "InputOutsideDomain",
    "InverseNotAvailable",
    "Transform",
    "any_rows",
    "bounded",
    "check_features",
    "check_unit_interval",
    "check_vectors",
    "mean_and_deviation",
    "preserves_volume",
    "sum_features",
    "sum_over_processes",
]


def preserves_volume(transform: Transform) -> bool:
    """Whether log|det J| is zero for all inputs and all parameters, as the layer declares.

    A layer declares it by ``volume_preserving = True``; nflows' layers declare nothing.
    """
    return getattr(transform, "volume_preserving", False)


def check_features(inputs: Tensor, features: int, *, axis: int = 1) -> None:
    """Refuse inputs whose given axis does not have ``features`` entries."""
    if inputs.ndim < 2 or inputs.shape[axis] != features:
        shape = tuple(inputs.shape)
        raise ValueError(f"inputs must have {features} features on axis {axis}, got {shape}.")


def check_vectors(inputs: Tensor, features: int) -> None:
    """Refuse inputs that are not (batch, features)."""
    check_features(inputs, features)
    if inputs.ndim != 2:
        raise ValueError(f"inputs must be vectors (batch, {features}), got {tuple(inputs.shape)}.")


def check_unit_interval(inputs: Tensor) -> None:
    """Refuse inputs outside [0, 1], NaN included."""
    if torch.compiler.is_exporting():
        inside = ((inputs >= 0) & (inputs <= 1)).all()
        # A branch on values cannot be exported; this stays in the program as an assertion.
        torch._assert_async(inside, "inputs must lie in [0, 1].")
        return
    if inputs.numel() and not (inputs.min() >= 0 and inputs.max() <= 1):
        raise InputOutsideDomain(
            f"inputs must lie in [0, 1], got {inputs.min():.4g} to {inputs.max():.4g}."
        )


def bounded(values: Tensor, bound: float) -> Tensor:
    """Values squeezed smoothly into (-bound, bound): bound * tanh(value / bound)."""
    return bound * torch.tanh(values / bound)


def any_rows(inputs: Tensor) -> bool:
    """Whether there are rows in the batch, or in that of another process."""
    return bool(sum_over_processes(inputs.new_tensor(len(inputs), dtype=torch.int64)))


def mean_and_deviation(inputs: Tensor) -> tuple[Tensor, Tensor]:
    """Statistics of each feature on axis 1 of a first batch, in float64; shape (features,).

    The deviation of a constant feature is 1, so that dividing by it keeps the scale. Where
    several processes train together, the batch is that of all, and all must take part.
    """
    columns = inputs.movedim(1, 0).flatten(1).double()
    count = columns.new_tensor([columns.shape[1]])
    sums = sum_over_processes(torch.cat((columns.sum(1), count)))
    mean, count = sums[:-1] / sums[-1], sums[-1]
    squares = sum_over_processes((columns - mean[:, None]).square().sum(1))
    deviation = (squares / count).sqrt()
    if not (mean.isfinite().all() and deviation.isfinite().all()):
        raise ValueError("the first batch must be finite, got NaN or infinity.")
    # A constant feature deviates by no more than rounding, integers not at all.
    eps = torch.finfo(inputs.dtype).eps if inputs.is_floating_point() else 0.0
    return mean, torch.where(deviation > 8 * eps * mean.abs(), deviation, 1.0)


def sum_over_processes(values: Tensor) -> Tensor:
    """The sum of tensors of one shape, one in each of the processes that train together."""
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        values = values.clone()
        dist.all_reduce(values)
    return values


def sum_features(values: Tensor) -> Tensor:
    """Sum over everything but the batch axis: (batch, ...) -> (batch,)."""
    return values.flatten(1).sum(1)
