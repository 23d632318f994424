"""Masked autoregressive splines, for vectors."""

from functools import partial

from flows.checks import check_at_least
from flows.distributions import Normal
from flows.flow import Flow
from flows.nets import MADE
from flows.recipes.context import embed_context
from flows.recipes.mixing import Mixing, choose_mixing
from flows.transforms import (
    ActNorm,
    Composite,
    MaskedAutoregressiveSpline,
    Standardize,
)
from flows.transforms.composite import Memory

__all__ = ["MaskedSplineFlow"]


class MaskedSplineFlow(Flow):
    r"""The autoregressive neural spline flow: :math:`y_d = g(x_d; \theta(x_1, ..., x_{d-1}))`.

    g is a rational-quadratic spline. Densities take one pass of every conditioner, samples
    one per feature. Successive layers take the features in opposite orders, and a fixed
    random permutation after every two makes other orders. A leading Standardize brings the
    data to the splines' interval, so data, context and samples keep their own units.

    Args:
        features: Size of the vectors, at least 1.
        layers: Autoregressive layers.
        bins: Bins per spline.
        tail_bound: The splines act on [-tail_bound, tail_bound].
        hidden_features: Width of the conditioners, at least ``features``.
        blocks: Residual blocks of the conditioners.
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
        >>> from flows.recipes import MaskedSplineFlow
        >>> flow = MaskedSplineFlow(features=3, layers=2)
        >>> flow.sample(5).shape
        torch.Size([5, 3])
    """

    def __init__(
        self,
        features: int,
        *,
        layers: int = 4,
        bins: int = 8,
        tail_bound: float = 4.0,
        hidden_features: int = 64,
        blocks: int = 2,
        context_features: int = 0,
        classes: int | None = None,
        dropout: float = 0.0,
        memory: Memory = "store",
        mixing: Mixing = "permutation",
    ) -> None:
        check_at_least(1, features=features, layers=layers)
        embedding, width = embed_context(context_features, classes)
        net = partial(
            MADE,
            hidden_features=hidden_features,
            blocks=blocks,
            context_features=width,
            dropout=dropout,
        )
        mix = choose_mixing(mixing, init="haar")
        transforms = [Standardize(features), ActNorm(features)]
        for layer in range(layers):
            if layer and layer % 2 == 0:
                transforms.append(mix(features))
            transforms.append(
                MaskedAutoregressiveSpline(
                    features, net, bins=bins, tail_bound=tail_bound, reverse=layer % 2 == 1
                )
            )
        super().__init__(Composite(transforms, memory=memory), Normal(features), embedding)
