"""Learnable rotations as products of reflections."""

from typing import Literal

import torch
from torch import Tensor, nn

from flows import householder
from flows.checks import check_at_least
from flows.transforms.base import Transform, check_features

__all__ = ["HouseholderRotation"]


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
    """

    volume_preserving = True

    def __init__(
        self,
        features: int,
        reflections: int | None = None,
        *,
        init: Literal["identity", "random"] = "identity",
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
        return self._reflect(inputs, inverse=False)

    def inverse(self, inputs: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self._reflect(inputs, inverse=True)

    def _reflect(self, inputs: Tensor, *, inverse: bool) -> tuple[Tensor, Tensor]:
        check_features(inputs, self.features, axis=-1)
        if 2 * len(self.vectors) <= self.features:
            outputs = householder.reflect(inputs, self.vectors, inverse=inverse)
        else:
            outputs = inputs @ (self.matrix() if inverse else self.matrix().mT)
        return outputs, inputs.new_zeros(inputs.shape[0])

    def extra_repr(self) -> str:
        return f"features={self.features}, reflections={len(self.vectors)}"
