"""Glow with exactly orthogonal 1x1 convolutions, for images."""

import math
from functools import partial
from typing import Literal

from flows.checks import check_at_least
from flows.distributions import Normal
from flows.flow import Flow
from flows.nets import ConvNet
from flows.transforms import (
    ActNorm,
    AffineCoupling,
    Composite,
    Dequantize,
    EmpiricalCDF,
    Logit,
    Multiscale,
    Rotation1x1,
    SplineCoupling,
)

__all__ = ["Glow"]


class Glow(Flow):
    """Multiscale image flow: at every level steps of ActNorm, Rotation1x1 and coupling.

    Rotations start at the identity and the couplings of successive steps exchange the halves
    of the channels: on digits that ended lower and varied less with the seed than couplings
    between random permutations or random orthogonal matrices.

    Args:
        shape: Shape (channels, height, width) of one image.
        grey_levels: Number of grey levels of the pixels.
        levels: Halvings of height and width.
        steps: Steps per level.
        hidden_features: Channels inside the conditioners.
        coupling: ``"spline"`` or ``"affine"``.
        marginals: How [0, 1] is mapped to the real line: ``"logit"``, or ``"empirical"`` for
            each pixel's training distribution, which suits small data.
        dropout: Dropout in the conditioners.

    Reference:
        Kingma and Dhariwal (2018), arXiv 1807.03039; there the convolutions are LU matrices.
    """

    def __init__(
        self,
        shape: tuple[int, int, int],
        *,
        grey_levels: int = 256,
        levels: int = 2,
        steps: int = 8,
        hidden_features: int = 64,
        coupling: Literal["spline", "affine"] = "affine",
        marginals: Literal["logit", "empirical"] = "logit",
        dropout: float = 0.0,
    ) -> None:
        shape = tuple(shape)
        check_at_least(1, steps=steps)
        if coupling not in ("spline", "affine"):
            raise ValueError(f"coupling must be 'spline' or 'affine', got {coupling!r}.")
        if marginals not in ("logit", "empirical"):
            raise ValueError(f"marginals must be 'logit' or 'empirical', got {marginals!r}.")
        net = partial(ConvNet, hidden_features=hidden_features, dropout=dropout)
        couple = {"spline": SplineCoupling, "affine": AffineCoupling}[coupling]
        to_reals = Logit() if marginals == "logit" else EmpiricalCDF(shape, bins=grey_levels)

        def level(channels: int) -> Composite:
            return Composite(
                transform
                for step in range(steps)
                for transform in (
                    ActNorm(channels),
                    Rotation1x1(channels),
                    couple(channels, net, flip=step % 2 == 1),
                )
            )

        transforms = [level(channels) for channels, _, _ in Multiscale.shapes(shape, levels)]
        super().__init__(
            Composite([Dequantize(grey_levels), to_reals, Multiscale(shape, transforms)]),
            Normal(math.prod(shape)),
        )
