"""Flows that preserve volume, for vectors."""

from collections.abc import Sequence
from functools import partial

from flows.checks import check_at_least
from flows.distributions import GaussianMixture
from flows.flow import Flow
from flows.nets import MLP
from flows.recipes.context import embed_context
from flows.recipes.mixing import Mixing, choose_mixing
from flows.transforms import Composite, RotationCoupling, Transform, Twist
from flows.transforms.base import preserves_volume
from flows.transforms.composite import Memory

__all__ = ["VolumePreservingFlow"]


class VolumePreservingFlow(Flow):
    """Layers of a rotation, a twist and a rotation coupling over a learned Gaussian mixture.

    log|det J| is exactly zero, so the density of x is that of its noise. Volume-preserving
    maps alone are not universal (Draxler et al. 2024, arXiv 2402.06578): the learned mixture
    provides what they cannot change, the distribution of density values. Data should have a
    spread of a few units, for nothing here rescales it.

    Args:
        features: Size of the vectors, at least 2.
        layers: Triples of rotation, twist and coupling.
        hidden_features: Width of the conditioners.
        blocks: Residual blocks of the conditioners.
        components: Components of the mixture.
        context_features: Columns of the context; 0 for none.
        classes: Number of classes, whose labels are the context instead; None for none.
        dropout: Dropout in the conditioners.
        memory: What the layers keep for the backward pass, as in
            :class:`~flows.transforms.Composite`.
        mixing: What turns the features, by :func:`~flows.recipes.mixing.choose_mixing`:
            ``"angles"``, ``"householder"`` or ``"permutation"``; ``"lu"`` changes volume.
        transforms: Layers to use instead of those triples; all must preserve volume. What
            describes the triples, ``mixing`` included, then does not count.

    Shape:
        inputs (batch, features), context (batch, context_features) or labels (batch,), to
        log_prob (batch,) in nats

    Raises:
        ValueError: If a layer of ``transforms``, or ``mixing``, may change volume.

    Reference:
        Hamze (2021), arXiv 2106.00003, for the rotations; Draxler et al. (2024),
        arXiv 2402.06578, for what the mixture is needed for

    Example:
        >>> from flows.recipes import VolumePreservingFlow
        >>> flow = VolumePreservingFlow(features=3, layers=2)
        >>> flow.transform(flow.sample(4))[1]
        tensor([0., 0., 0., 0.])
    """

    def __init__(
        self,
        features: int,
        *,
        layers: int = 8,
        hidden_features: int = 64,
        blocks: int = 2,
        components: int = 16,
        context_features: int = 0,
        classes: int | None = None,
        dropout: float = 0.0,
        memory: Memory = "store",
        mixing: Mixing = "angles",
        transforms: Sequence[Transform] | None = None,
    ) -> None:
        check_at_least(2, features=features)
        check_at_least(1, layers=layers, components=components)
        embedding, width = embed_context(context_features, classes)
        net = partial(
            MLP,
            hidden_features=hidden_features,
            blocks=blocks,
            context_features=width,
            dropout=dropout,
        )
        mix = choose_mixing(mixing, init="haar", volume_preserving=True)
        if transforms is None:
            transforms = [
                transform
                for layer in range(layers)
                for transform in (
                    mix(features),
                    Twist(features, net, matching=layer),
                    RotationCoupling(features, net, flip=layer % 2 == 1),
                )
            ]
        changing = [type(t).__name__ for t in transforms if not preserves_volume(t)]
        if changing:
            raise ValueError(
                f"transforms must all preserve volume, got {', '.join(changing)}, which may not."
            )
        base = GaussianMixture(features, components, net=net if width else None)
        super().__init__(Composite(transforms, memory=memory), base, embedding)
