"""Glow with exactly orthogonal 1x1 convolutions, for images."""

import math
from functools import partial
from typing import Literal

from flows.checks import check_at_least
from flows.distributions import DiagonalNormal, Normal
from flows.flow import Flow
from flows.nets import MLP, ConvNet
from flows.recipes.context import embed_context
from flows.recipes.mixing import Mixing, choose_mixing
from flows.transforms import (
    ActNorm,
    AffineCoupling,
    Composite,
    Dequantize,
    EmpiricalCDF,
    Logit,
    Multiscale,
    SplineCoupling,
    VariationalDequantize,
)
from flows.transforms.composite import Memory

__all__ = ["Glow"]


class Glow(Flow):
    """Multiscale image flow: at every level steps of ActNorm, Rotation1x1 and coupling.

    Rotations start at the identity and the couplings of successive steps exchange the halves
    of the channels: on digits that ended lower and varied less with the seed than couplings
    between random permutations or random orthogonal matrices.

    With ``classes`` the density is that of an image given its label: ``flow(images, labels)``
    and ``flow.sample(n, labels)``, labels being integers (batch,). They reach every
    conditioner, and mean and scale of the base distribution.

    Args:
        shape: Shape (channels, height, width) of one image, height and width divisible by
            2**levels.
        grey_levels: Number of grey levels of the pixels, at least 2.
        levels: Halvings of height and width.
        steps: Steps per level.
        hidden_features: Channels inside the conditioners.
        coupling: ``"spline"`` or ``"affine"``.
        marginals: How [0, 1] is mapped to the real line: ``"logit"``, or ``"empirical"`` for
            each pixel's training distribution, which suits small data.
        dequantize: Noise between the grey levels: ``"uniform"``, or ``"variational"`` for noise
            that a small flow learns, a tighter bound at more time per step.
        dropout: Dropout in the conditioners.
        kernel_sizes: Of the conditioners' three convolutions, as in ``ConvNet``.
        memory: What the steps of a level keep for the backward pass, as in
            :class:`~flows.transforms.Composite`.
        mixing: What turns the channels, by :func:`~flows.recipes.mixing.choose_mixing`:
            ``"angles"``, ``"householder"``, ``"lu"`` or ``"permutation"``.
        context_features: Columns of the context; 0 for none.
        classes: Number of classes, whose labels are the context instead; None for none.

    Shape:
        inputs (batch, channels, height, width), pixels k / grey_levels, context
        (batch, context_features) or labels (batch,), to log_prob (batch,) in nats

    Raises:
        ValueError: If sizes do not fit, an option is none of those named, or there are both
            context columns and classes.
        InputOutsideDomain: For inputs outside [0, 1].

    Reference:
        Kingma and Dhariwal (2018), arXiv 1807.03039; there with
        ``mixing="lu"`` from random orthogonal matrices.

    Example:
        >>> import torch
        >>> from flows.recipes import Glow
        >>> flow = Glow((3, 8, 8), levels=2, steps=1, hidden_features=8, classes=10)
        >>> flow.sample(5, torch.tensor([3, 7])).shape
        torch.Size([2, 5, 3, 8, 8])
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
        dequantize: Literal["uniform", "variational"] = "uniform",
        dropout: float = 0.0,
        kernel_sizes: tuple[int, int, int] = (3, 1, 3),
        memory: Memory = "store",
        mixing: Mixing = "angles",
        context_features: int = 0,
        classes: int | None = None,
    ) -> None:
        shape = tuple(shape)
        check_at_least(1, steps=steps)
        check_at_least(2, grey_levels=grey_levels)
        if coupling not in ("spline", "affine"):
            raise ValueError(f"coupling must be 'spline' or 'affine', got {coupling!r}.")
        if marginals not in ("logit", "empirical"):
            raise ValueError(f"marginals must be 'logit' or 'empirical', got {marginals!r}.")
        if dequantize not in ("uniform", "variational"):
            raise ValueError(f"dequantize must be 'uniform' or 'variational', got {dequantize!r}.")
        embedding, width = embed_context(context_features, classes)
        net = partial(
            ConvNet,
            hidden_features=hidden_features,
            context_features=width,
            dropout=dropout,
            kernel_sizes=kernel_sizes,
        )
        couple = {"spline": SplineCoupling, "affine": AffineCoupling}[coupling]
        to_reals = Logit() if marginals == "logit" else EmpiricalCDF(shape, bins=grey_levels)

        mix = choose_mixing(mixing, images=True)

        def level(channels: int) -> Composite:
            transforms = [
                transform
                for step in range(steps)
                for transform in (
                    ActNorm(channels),
                    mix(channels),
                    couple(channels, net, flip=step % 2 == 1),
                )
            ]
            return Composite(transforms, memory=memory)

        transforms = [level(channels) for channels, _, _ in Multiscale.shapes(shape, levels)]
        if width:
            base_net = partial(
                MLP, hidden_features=hidden_features, blocks=0, context_features=width
            )
            base = DiagonalNormal(math.prod(shape), net=base_net)
        else:
            base = Normal(math.prod(shape))
        multiscale = Multiscale(shape, transforms)
        if dequantize == "uniform":
            to_continuous = Dequantize(grey_levels)
        else:
            to_continuous = VariationalDequantize(shape[0], net, grey_levels, squeeze=True)
        super().__init__(Composite([to_continuous, to_reals, multiscale]), base, embedding)
