"""Linear layers by their LU factors."""

import math
from typing import Literal

import torch
from torch import Tensor, nn

from flows.checks import check_at_least
from flows.transforms.base import Transform, check_features

__all__ = ["LULinear"]


class LULinear(Transform):
    r"""Linear map :math:`y = W x`, :math:`W = P\,L\,(U + \mathrm{diag}(s))`.

    The permutation P and the signs of s stay as they start. One matrix of parameters,
    ``factors``, holds below its diagonal the lower triangular L, whose own diagonal is one,
    above it the strictly upper triangular U, and :math:`\log |s|` on it. The determinant of W
    is :math:`\prod_i s_i` up to its sign, and the inverse solves two triangular systems.

    Args:
        features: Size of axis 1, at least 2: features of vectors, channels of images.
        init: Where W starts: ``"identity"``, or ``"haar"`` (uniform on the orthogonal group),
            with P from a decomposition with pivoting.

    Shape:
        inputs (batch, features, ...) to outputs of the same shape, logabsdet (batch,) in nats:
        the sum of :math:`\log |s|` times the number of positions.

    Raises:
        ValueError: If ``features`` or ``init`` does not fit.

    Reference:
        Kingma and Dhariwal (2018), Glow, arXiv 1807.03039, section 3.2

    Example:
        >>> import torch
        >>> from flows import LULinear
        >>> layer = LULinear(3, init="haar")
        >>> outputs, logabsdet = layer(torch.randn(2, 3))
        >>> torch.allclose(logabsdet, layer.matrix().slogdet()[1].expand(2), atol=1e-5)
        True
    """

    def __init__(self, features: int, *, init: Literal["identity", "haar"] = "identity") -> None:
        super().__init__()
        check_at_least(2, features=features)
        match init:
            case "identity":
                start = torch.eye(features, dtype=torch.float64)
            case "haar":
                start = nn.init.orthogonal_(torch.empty(features, features, dtype=torch.float64))
            case _:
                raise ValueError(f"init must be 'identity' or 'haar', got {init!r}.")
        p, lower, upper = torch.linalg.lu(start)
        scale = upper.diagonal()
        factors = lower.tril(-1) + upper.triu(1) + scale.abs().log().diag()
        self.factors = nn.Parameter(factors.to(torch.get_default_dtype()))
        self.register_buffer("signs", scale.sign().to(torch.get_default_dtype()))
        # Entry i of P z is entry order[i] of z.
        self.register_buffer("order", p.argmax(1))

    def matrix(self) -> Tensor:
        """W, shape (features, features); in full precision under autocast, too."""
        with torch.autocast(self.factors.device.type, enabled=False):
            lower = self.factors.tril(-1) + torch.eye(
                len(self.order), dtype=self.factors.dtype, device=self.factors.device
            )
            return (lower @ self._upper()).index_select(0, self.order)

    def forward(self, inputs: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        check_features(inputs, len(self.order))
        with torch.autocast(inputs.device.type, enabled=False):
            outputs = self.matrix().to(inputs.dtype) @ _columns(inputs)
        return _uncolumns(outputs, inputs), self._logabsdet(inputs)

    def inverse(self, inputs: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        check_features(inputs, len(self.order))
        # No solver takes half precision.
        dtype = torch.promote_types(inputs.dtype, torch.float32)
        factors, upper = self.factors.to(dtype), self._upper().to(dtype)
        with torch.autocast(inputs.device.type, enabled=False):
            z = _columns(inputs).index_select(0, self.order.argsort()).to(dtype)
            # Of the factors the solver takes the part below the diagonal, and L's diagonal as 1.
            z = torch.linalg.solve_triangular(factors, z, upper=False, unitriangular=True)
            z = torch.linalg.solve_triangular(upper, z, upper=True)
        return _uncolumns(z.to(inputs.dtype), inputs), -self._logabsdet(inputs)

    def _upper(self) -> Tensor:
        """U + diag(s)."""
        return self.factors.triu(1) + torch.diag_embed(self.signs * self.factors.diagonal().exp())

    def _logabsdet(self, inputs: Tensor) -> Tensor:
        positions = math.prod(inputs.shape[2:])
        total = positions * self.factors.diagonal().sum()
        return inputs.new_zeros(inputs.shape[0]) + total.to(inputs.dtype)

    def extra_repr(self) -> str:
        return f"features={len(self.order)}"


def _columns(inputs: Tensor) -> Tensor:
    """(batch, features, ...) -> (features, batch * positions): one system for all positions."""
    return inputs.movedim(1, 0).flatten(1)


def _uncolumns(columns: Tensor, like: Tensor) -> Tensor:
    """What :func:`_columns` was given, of the shape of ``like``."""
    return columns.reshape(like.movedim(1, 0).shape).movedim(0, 1)
