"""Flows that preserve volume, for images."""

import math
from functools import partial
from typing import Literal

from flows.checks import check_at_least
from flows.distributions import GaussianMixture
from flows.flow import Flow
from flows.nets import MLP, ConvNet
from flows.recipes.context import embed_context
from flows.recipes.mixing import Mixing, choose_mixing
from flows.transforms import (
    AdditiveCoupling,
    Composite,
    Dequantize,
    EmpiricalCDF,
    IncompressibleCoupling,
    Multiscale,
    RotationCoupling,
)
from flows.transforms.composite import Memory

__all__ = ["VolumePreservingGlow"]

COUPLINGS = {
    "additive": AdditiveCoupling,
    "incompressible": IncompressibleCoupling,
    "rotation": RotationCoupling,
}


class VolumePreservingGlow(Flow):
    """Each pixel through its training CDF, then a multiscale flow that preserves volume.

    Behind the fixed :class:`EmpiricalCDF` nothing changes volume: at every level there are
    steps of Rotation1x1 and a volume-preserving coupling, and the base distribution is a
    learned Gaussian mixture, as in :class:`VolumePreservingFlow`, over all features. The
    density of an image is that of its noise times the slopes of the fixed step.

    Args:
        shape: Shape (channels, height, width) of one image, height and width divisible by
            2**levels.
        grey_levels: Number of grey levels of the pixels, at least 2.
        levels: Halvings of height and width.
        steps: Steps per level; 0 leaves the mixture alone.
        hidden_features: Channels inside the conditioners.
        coupling: ``"incompressible"``, ``"additive"`` or ``"rotation"``.
        components: Components of the mixture.
        dropout: Dropout in the conditioners.
        memory: What the steps of a level keep for the backward pass, as in
            :class:`~flows.transforms.Composite`.
        mixing: What turns the channels, by :func:`~flows.recipes.mixing.choose_mixing`:
            ``"angles"``, ``"householder"`` or ``"permutation"``; ``"lu"`` changes volume.
        context_features: Columns of the context; 0 for none.
        classes: Number of classes, whose labels are the context instead; None for none.

    Shape:
        inputs (batch, channels, height, width), pixels k / grey_levels, context
        (batch, context_features) or labels (batch,), to log_prob (batch,) in nats

    Raises:
        ValueError: If sizes do not fit, an option is none of those named, or ``mixing`` may change
            volume.
        InputOutsideDomain: For inputs outside [0, 1].

    Reference:
        Sorrenson et al. (2020), GIN, arXiv 2001.04872, for the incompressible coupling

    Example:
        >>> import torch
        >>> from flows.recipes import VolumePreservingGlow
        >>> flow = VolumePreservingGlow((1, 4, 4), grey_levels=16, levels=1, hidden_features=8)
        >>> flow.transform.transforms[2](torch.randn(2, 1, 4, 4))[1]
        tensor([0., 0.])
    """

    def __init__(
        self,
        shape: tuple[int, int, int],
        *,
        grey_levels: int = 256,
        levels: int = 2,
        steps: int = 4,
        hidden_features: int = 64,
        coupling: Literal["additive", "incompressible", "rotation"] = "incompressible",
        components: int = 32,
        dropout: float = 0.0,
        memory: Memory = "store",
        mixing: Mixing = "angles",
        context_features: int = 0,
        classes: int | None = None,
    ) -> None:
        shape = tuple(shape)
        if coupling not in COUPLINGS:
            raise ValueError(f"coupling must be one of {list(COUPLINGS)}, got {coupling!r}.")
        check_at_least(2, grey_levels=grey_levels)
        check_at_least(0, steps=steps)
        check_at_least(1, components=components)
        embedding, width = embed_context(context_features, classes)
        net = partial(
            ConvNet, hidden_features=hidden_features, context_features=width, dropout=dropout
        )

        mix = choose_mixing(mixing, images=True, volume_preserving=True)

        def level(channels: int) -> Composite:
            transforms = [
                transform
                for step in range(steps)
                for transform in (
                    mix(channels),
                    COUPLINGS[coupling](channels, net, flip=step % 2 == 1),
                )
            ]
            return Composite(transforms, memory=memory)

        transforms = [level(channels) for channels, _, _ in Multiscale.shapes(shape, levels)]
        base_net = partial(MLP, hidden_features=hidden_features, blocks=0, context_features=width)
        base = GaussianMixture(math.prod(shape), components, net=base_net if width else None)
        layers = [
            Dequantize(grey_levels),
            EmpiricalCDF(shape, bins=grey_levels),
            Multiscale(shape, transforms),
        ]
        super().__init__(Composite(layers), base, embedding)
