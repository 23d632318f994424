"""Spline couplings and permutations, for vectors."""

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

__all__ = ["SplineCouplingFlow"]


class SplineCouplingFlow(Flow):
    r"""The neural spline flow with couplings: :math:`y_1 = x_1,\ y_2 = g(x_2; \theta(x_1))`.

    g is a rational-quadratic spline in every feature. Successive couplings exchange the
    halves, so that every two of them bend every feature; a fixed random permutation after
    them makes other halves. A leading Standardize brings the data to the splines' interval, so
    data, context and samples keep their own units.

    What is kept reaches the conditioners as :class:`flows.nets.Hats`, whose knots divide the
    splines' interval, so that sharp edges are learned sooner: four couplings of 16 bins were
    0.017 nats from a checkerboard after 15 s on one CPU core, and 0.029 with the bare numbers.

    The defaults were chosen on densities in the plane, where small networks that see many rows
    come nearer to the truth than larger ones: train with batches of about 2,000 and a learning
    rate around 0.01.

    Args:
        features: Size of the vectors, at least 2.
        layers: Couplings.
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
        mixing: What stands after every two layers, by
            :func:`~flows.recipes.mixing.choose_mixing`: ``"permutation"``, or ``"angles"``,
            ``"householder"`` or ``"lu"``, which start at random orthogonal matrices.

    Shape:
        inputs (batch, features), context (batch, context_features) or labels (batch,), to
        log_prob (batch,) in nats

    Raises:
        ValueError: If a size is too small, or there are both context columns and classes.

    Reference:
        Durkan et al. (2019), Neural Spline Flows, arXiv 1906.04032

    Example:
        >>> from flows.recipes import SplineCouplingFlow
        >>> flow = SplineCouplingFlow(features=3, layers=4)
        >>> flow.sample(5).shape
        torch.Size([5, 3])
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
        mixing: Mixing = "permutation",
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
        mix = choose_mixing(mixing, init="haar")
        transforms = [Standardize(features), ActNorm(features)]
        for layer in range(layers):
            if layer and layer % 2 == 0:
                transforms.append(mix(features))
            transforms.append(
                SplineCoupling(
                    features, net, bins=bins, tail_bound=tail_bound, flip=layer % 2 == 1
                )
            )
        super().__init__(Composite(transforms, memory=memory), Normal(features), embedding)
