"""Learnable rotations of feature vectors and of image channels as products of reflections."""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn

from flows import householder
from flows.checks import check_at_least
from flows.transforms.base import Transform, check_features

__all__ = ["Householder1x1", "HouseholderRotation"]

Init = Literal["identity", "random"]


class HouseholderRotation(Transform):
    r"""Volume-preserving map :math:`y = W x`, :math:`W = H(v_1) \cdots H(v_k)`.

    W is orthogonal, of determinant :math:`(-1)^k`. Up to k = features / 2 the reflections are
    applied to the inputs without building W. Fewer of them than the default reach only some
    rotations. The scale of the vectors does not matter, so weight decay on them changes
    nothing but the effective learning rate: leave it out.

    Args:
        features: Size of the last axis, at least 2.
        reflections: Their number k; by default the largest even number up to features, which
            reaches every rotation (Cartan and Dieudonné).
        init: Where W starts: ``"identity"``, of pairs of equal random vectors, which needs an
            even k; or ``"random"``, of independent normal vectors.

    Shape:
        inputs (batch, ..., features) to outputs of the same shape, logabsdet (batch,), zero.

    Raises:
        ValueError: If sizes or ``init`` do not fit.

    Reference:
        Likhosherstov et al. (2021), CWY Parametrization, arXiv 2004.08675;
        Tomczak and Welling (2016), Householder flow, arXiv 1611.09630

    Example:
        >>> import torch
        >>> from flows import HouseholderRotation
        >>> layer = HouseholderRotation(4, init="random")
        >>> w = layer.matrix()
        >>> torch.allclose(w @ w.mT, torch.eye(4), atol=1e-5)
        True
        >>> layer(torch.randn(2, 4))[1]
        tensor([0., 0.])
    """

    volume_preserving = True

    def __init__(
        self,
        features: int,
        reflections: int | None = None,
        *,
        init: Init = "identity",
    ) -> None:
        super().__init__()
        check_at_least(2, features=features)
        if reflections is None:
            reflections = features - features % 2
        check_at_least(1, reflections=reflections)
        self.features = features
        match init:
            case "identity":
                if reflections % 2:
                    raise ValueError(
                        "reflections must be even for init='identity', as W has determinant "
                        f"(-1)^reflections, got {reflections}."
                    )
                vectors = torch.randn(reflections // 2, features).repeat_interleave(2, dim=0)
            case "random":
                vectors = torch.randn(reflections, features)
            case _:
                raise ValueError(f"init must be 'identity' or 'random', got {init!r}.")
        self.vectors = nn.Parameter(vectors)

    def matrix(self) -> Tensor:
        """W, shape (features, features)."""
        return householder.cwy(self.vectors)

    def forward(self, inputs: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        check_features(inputs, self.features, axis=-1)
        return self._reflector()(inputs, False), inputs.new_zeros(inputs.shape[0])

    def inverse(self, inputs: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        check_features(inputs, self.features, axis=-1)
        return self._reflector()(inputs, True), inputs.new_zeros(inputs.shape[0])

    def recover(
        self, outputs: Tensor, context: Tensor | None = None, *, inverse: bool = False
    ) -> tuple[Tensor, Tensor, Tensor]:
        """As :meth:`Rotation.recover`; one W serves the way back and the way forth."""
        reflect = self._reflector()
        inputs = reflect(outputs, not inverse).detach().requires_grad_()
        return inputs, reflect(inputs, inverse), inputs.new_zeros(inputs.shape[0])

    def _reflector(self) -> Callable[[Tensor, bool], Tensor]:
        """What takes x and whether to undo W, and applies W to the last axis of x."""
        if 2 * len(self.vectors) <= self.features:
            return lambda x, inverse: householder.reflect(x, self.vectors, inverse=inverse)
        matrix = self.matrix()

        def multiply(x: Tensor, inverse: bool) -> Tensor:
            weight = matrix if inverse else matrix.mT
            with torch.autocast(x.device.type, enabled=False):
                return x @ weight.to(x.dtype)

        return multiply

    def extra_repr(self) -> str:
        return f"features={self.features}, reflections={len(self.vectors)}"


class Householder1x1(Transform):
    """A :class:`HouseholderRotation` of image channels: an orthogonal 1x1 convolution.

    :math:`y = W x` at every pixel, with one W for all of them.

    Args:
        channels: Number of channels, at least 2.
        reflections: As in :class:`HouseholderRotation`.
        init: As in :class:`HouseholderRotation`.

    Shape:
        inputs (batch, channels, height, width) to outputs of the same shape,
        logabsdet (batch,), zero.

    Raises:
        ValueError: If sizes or ``init`` do not fit.

    Reference:
        Likhosherstov et al. (2021), CWY Parametrization, arXiv 2004.08675;
        Kingma and Dhariwal (2018), Glow, arXiv 1807.03039, for the 1x1 convolution

    Example:
        >>> import torch
        >>> from flows import Householder1x1
        >>> layer = Householder1x1(3, init="random", reflections=2)
        >>> images = torch.randn(2, 3, 4, 4)
        >>> outputs, logabsdet = layer(images)
        >>> torch.allclose(outputs.norm(dim=1), images.norm(dim=1), atol=1e-5)  # at every pixel
        True
    """

    volume_preserving = True

    def __init__(
        self, channels: int, reflections: int | None = None, *, init: Init = "identity"
    ) -> None:
        super().__init__()
        check_at_least(2, channels=channels)
        self.rotation = HouseholderRotation(channels, reflections, init=init)

    def forward(self, inputs: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        self._check(inputs)
        outputs, logabsdet = self.rotation(inputs.movedim(1, -1))
        return outputs.movedim(-1, 1), logabsdet

    def inverse(self, inputs: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        self._check(inputs)
        outputs, logabsdet = self.rotation.inverse(inputs.movedim(1, -1))
        return outputs.movedim(-1, 1), logabsdet

    def recover(
        self, outputs: Tensor, context: Tensor | None = None, *, inverse: bool = False
    ) -> tuple[Tensor, Tensor, Tensor]:
        """As :meth:`Rotation.recover`; one W serves the way back and the way forth."""
        reflect = self.rotation._reflector()

        def apply(images: Tensor, inverse: bool) -> Tensor:
            return reflect(images.movedim(1, -1), inverse).movedim(-1, 1)

        inputs = apply(outputs, not inverse).detach().requires_grad_()
        return inputs, apply(inputs, inverse), inputs.new_zeros(inputs.shape[0])

    def matrix(self) -> Tensor:
        """W, shape (channels, channels)."""
        return self.rotation.matrix()

    def _check(self, inputs: Tensor) -> None:
        check_features(inputs, self.rotation.features)
        if inputs.ndim != 4:
            raise ValueError(
                "inputs must be images (batch, channels, height, width), "
                f"got {tuple(inputs.shape)}."
            )
