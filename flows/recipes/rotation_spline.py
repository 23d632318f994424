"""Rotations and spline couplings, for vectors."""

from functools import partial
from typing import Literal

from flows.checks import check_at_least
from flows.distributions import Normal
from flows.flow import Flow
from flows.nets import MLP
from flows.recipes.context import embed_context
from flows.recipes.mixing import Mixing, choose_mixing
from flows.transforms import ActNorm, Composite, SplineCoupling, Standardize
from flows.transforms.composite import Memory

__all__ = ["RotationSplineFlow"]


class RotationSplineFlow(Flow):
    """Layers of a rotation and a rational-quadratic spline coupling, for vectors.

    The couplings bend, one half of the features in turn; the rotations start at the identity
    and learn how to mix. Starting at random orthogonal matrices instead ended at twice the
    divergence on densities in the plane. A leading Standardize brings the data to the splines'
    interval, so data, context and samples keep their own units.

    What is kept reaches the conditioners as :class:`flows.nets.Hats`, and the defaults were
    chosen on densities in the plane: see :class:`SplineCouplingFlow`.

    Args:
        features: Size of the vectors, at least 2.
        layers: Pairs of rotation and coupling.
        bins: Bins per spline.
        tail_bound: The splines act on [-tail_bound, tail_bound].
        hidden_features: Width of the conditioners.
        blocks: Residual blocks of the conditioners.
        knots: Knots for every feature that a conditioner sees; 0 for the bare number.
        activation: ``"relu"`` or ``"silu"``, in the conditioners.
        context_features: Columns of the context; 0 for none.
        classes: Number of classes, whose labels are the context instead; None for none.
        dropout: Dropout in the conditioners.
        memory: What the layers keep for the backward pass, as in
            :class:`~flows.transforms.Composite`.
        mixing: What turns the features, by :func:`~flows.recipes.mixing.choose_mixing`:
            ``"angles"``, ``"householder"``, ``"lu"`` or ``"permutation"``.

    Shape:
        inputs (batch, features), context (batch, context_features) or labels (batch,), to
        log_prob (batch,) in nats

    Raises:
        ValueError: If a size is too small, or there are both context columns and classes.

    Reference:
        Hamze (2021), arXiv 2106.00003, for the rotations; Durkan et al. (2019), Neural Spline
        Flows, arXiv 1906.04032, for the couplings

    Example:
        >>> from flows.recipes import RotationSplineFlow
        >>> flow = RotationSplineFlow(features=2, layers=4)
        >>> flow.sample(5).shape
        torch.Size([5, 2])
    """

    def __init__(
        self,
        features: int,
        *,
        layers: int = 3,
        bins: int = 32,
        tail_bound: float = 4.0,
        hidden_features: int = 32,
        blocks: int = 2,
        knots: int = 32,
        activation: Literal["relu", "silu"] = "relu",
        context_features: int = 0,
        classes: int | None = None,
        dropout: float = 0.0,
        memory: Memory = "store",
        mixing: Mixing = "angles",
    ) -> None:
        check_at_least(2, features=features)
        check_at_least(1, layers=layers)
        embedding, width = embed_context(context_features, classes)
        net = partial(
            MLP,
            hidden_features=hidden_features,
            blocks=blocks,
            context_features=width,
            dropout=dropout,
            activation=activation,
            knots=knots,
            bound=tail_bound,
        )
        mix = choose_mixing(mixing)
        transforms = [Standardize(features), ActNorm(features)]
        for layer in range(layers):
            flip = layer % 2 == 1
            transforms += [
                mix(features),
                SplineCoupling(features, net, bins=bins, tail_bound=tail_bound, flip=flip),
            ]
        super().__init__(Composite(transforms, memory=memory), Normal(features), embedding)
