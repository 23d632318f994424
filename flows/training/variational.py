"""Training by a bound of log Z: the flow learns a density that is known, not from data."""

from collections.abc import Callable
from typing import Literal

import torch
from pytorch_lightning import LightningDataModule
from torch import Tensor, nn

from flows.flow import Flow
from flows.objectives import elbo, iwae, selbo, siwae
from flows.transforms.base import InverseNotAvailable

__all__ = ["BOUNDS", "Objective", "bound", "check_target", "guarded_bound"]

Objective = Literal["elbo", "iwae", "selbo", "siwae"]
BOUNDS: dict[str, Callable[..., Tensor]] = {
    "elbo": elbo,
    "iwae": iwae,
    "selbo": selbo,
    "siwae": siwae,
}


def check_target(flow: nn.Module, data: LightningDataModule, objective: str) -> None:
    """Refuse data without a density, and flows that cannot be drawn from with gradients.

    Raises:
        ValueError: Saying what ``model.objective`` asks for.
    """
    if not isinstance(flow, Flow):
        raise ValueError(
            f"model.objective {objective} needs a Flow as model.flow, got {type(flow).__name__}."
        )
    name = type(data).__name__
    if getattr(data, "density", None) is None:
        raise ValueError(
            f"model.objective {objective} needs data with a density, such as "
            f"datasets.toy.TwoMeans; {name} has none. Leave it out to fit the data instead."
        )
    if len(data.splits["train"]) > 1:
        raise ValueError(
            f"model.objective {objective} needs data without labels or context, {name} has some."
        )
    try:
        with torch.no_grad():
            bound(objective, flow, data, 1, 2)
    except InverseNotAvailable:
        raise ValueError(
            f"model.objective {objective} draws from model.flow, whose transform has no inverse."
        ) from None


def bound(
    objective: str, flow: Flow, data: LightningDataModule, num_samples: int, repeats: int
) -> Tensor:
    """Independent estimates of the bound for the density of the data module, (repeats,)."""
    density = data.density
    log_target = getattr(density, "unnormalized_log_prob", None) or density.log_prob
    return BOUNDS[objective](log_target, flow, num_samples, repeats=repeats)


def guarded_bound(
    objective: str,
    flow: Flow,
    data: LightningDataModule,
    num_samples: int,
    repeats: int,
    what: str,
) -> Tensor:
    """As :func:`bound`, if all are finite.

    Raises:
        FloatingPointError: Saying what diverged, with ``what`` before it.
    """
    try:
        values = bound(objective, flow, data, num_samples, repeats)
    except FloatingPointError as error:
        reason = str(error).rstrip(".")
        raise FloatingPointError(f"{what}: {reason}; lower model.lr or clip gradients") from None
    if repeats and values.isneginf().any():
        advice = "widen the base" if objective in ("iwae", "siwae") else "take iwae or siwae"
        raise FloatingPointError(
            f"{what}: {objective} is -inf, for samples lie where the density is zero; {advice}"
        )
    return values
