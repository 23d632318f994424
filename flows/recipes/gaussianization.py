"""Rotations and elementwise splines, for vectors."""

from functools import partial

from flows.checks import check_at_least
from flows.distributions import Normal
from flows.flow import Flow
from flows.nets import MLP
from flows.recipes.context import embed_context
from flows.recipes.mixing import Mixing, choose_mixing
from flows.transforms import ActNorm, Composite, ElementwiseSpline, Standardize
from flows.transforms.composite import Memory

__all__ = ["GaussianizationFlow"]


class GaussianizationFlow(Flow):
    r"""Layers :math:`y = \Psi(W x)`: rotate, then make every marginal more normal.

    W starts at a random orthogonal matrix and learns its angles; :math:`\Psi` is a learned
    rational-quadratic spline for every feature. No layer has a conditioner, so there are few
    parameters and sampling costs what densities cost. With a context the splines follow it.
    A leading Standardize brings the data to the splines' interval, so data, context and samples
    keep their own units.

    Args:
        features: Size of the vectors, at least 2.
        layers: Pairs of rotation and splines.
        bins: Bins per spline.
        tail_bound: The splines act on [-tail_bound, tail_bound].
        hidden_features: Width of the networks that map the context to splines.
        blocks: Residual blocks of these networks.
        context_features: Columns of the context; 0 for none.
        classes: Number of classes, whose labels are the context instead; None for none.
        dropout: Dropout in these networks.
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
        Meng et al. (2020), Gaussianization Flows, arXiv 2003.01941; there the marginal maps
        are mixtures of logistics.

    Example:
        >>> from flows.recipes import GaussianizationFlow
        >>> flow = GaussianizationFlow(features=3, layers=4)
        >>> flow.sample(5).shape
        torch.Size([5, 3])
    """

    def __init__(
        self,
        features: int,
        *,
        layers: int = 16,
        bins: int = 16,
        tail_bound: float = 4.0,
        hidden_features: int = 64,
        blocks: int = 2,
        context_features: int = 0,
        classes: int | None = None,
        dropout: float = 0.0,
        memory: Memory = "store",
        mixing: Mixing = "angles",
    ) -> None:
        check_at_least(2, features=features)
        check_at_least(1, layers=layers, hidden_features=hidden_features)
        check_at_least(0, blocks=blocks)
        embedding, width = embed_context(context_features, classes)
        net = None
        if width:
            net = partial(
                MLP,
                hidden_features=hidden_features,
                blocks=blocks,
                context_features=width,
                dropout=dropout,
            )
        mix = choose_mixing(mixing, init="haar")
        transforms = [Standardize(features), ActNorm(features)]
        for _ in range(layers):
            transforms += [
                mix(features),
                ElementwiseSpline(features, bins=bins, tail_bound=tail_bound, net=net),
            ]
        super().__init__(Composite(transforms, memory=memory), Normal(features), embedding)
