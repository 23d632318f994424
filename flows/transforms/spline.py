"""Learned monotonic functions of single features."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from flows.checks import check_at_least, check_positive
from flows.splines import rational_quadratic_spline, spline_parameters
from flows.transforms.base import Transform, check_features, sum_features

__all__ = ["ElementwiseSpline"]


class ElementwiseSpline(Transform):
    r"""Every feature through a spline of its own: :math:`y_d = g(x_d;\, \theta_d)`.

    g is rational-quadratic on [-B, B], see :func:`flows.splines.rational_quadratic_spline`,
    and the identity outside. It starts as the identity.

    Args:
        features: Size of axis 1: features of vectors, channels of images.
        bins: Number of bins of every spline.
        tail_bound: Half-width B of the interval; the identity outside.
        net: ``net(0, out_features)`` makes a module that is called as
            ``module(inputs without features, context)`` and returns the parameters of all
            splines, (batch, features * spline_parameters(bins)): they then depend on the
            context. By default they are learned, and the same for every sample.

    Shape:
        inputs (batch, features, ...) to outputs of the same shape, logabsdet (batch,) in nats.

    Raises:
        ValueError: If ``features`` is below 1 or not that of the inputs, ``bins`` is below 2, or
            ``tail_bound`` is not positive.

    Reference:
        Durkan et al. (2019), Neural Spline Flows, arXiv 1906.04032

    Example:
        >>> import torch
        >>> from flows import ElementwiseSpline
        >>> layer = ElementwiseSpline(2, bins=4)
        >>> _ = torch.nn.init.normal_(layer.raw_knots)
        >>> x = torch.randn(3, 2)
        >>> outputs, logabsdet = layer(x)
        >>> torch.allclose(layer.inverse(outputs)[0], x, atol=1e-4)
        True
    """

    def __init__(
        self,
        features: int,
        *,
        bins: int = 8,
        tail_bound: float = 5.0,
        net: Callable[[int, int], nn.Module] | None = None,
    ) -> None:
        super().__init__()
        check_at_least(1, features=features)
        check_positive(tail_bound=tail_bound)
        self.features = features
        self.bins = bins
        self.tail_bound = tail_bound
        count = spline_parameters(bins)
        if net is None:
            self.net = None
            self.raw_knots = nn.Parameter(torch.zeros(features, count))
        else:
            self.net = net(0, features * count)

    def forward(self, inputs: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self._apply_spline(inputs, context, inverse=False)

    def inverse(self, inputs: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self._apply_spline(inputs, context, inverse=True)

    def _apply_spline(
        self, inputs: Tensor, context: Tensor | None, *, inverse: bool
    ) -> tuple[Tensor, Tensor]:
        check_features(inputs, self.features)
        outputs, logabsdet = rational_quadratic_spline(
            inputs.movedim(1, -1),
            self._parameters_of(inputs, context),
            tail_bound=self.tail_bound,
            inverse=inverse,
        )
        return outputs.movedim(-1, 1), sum_features(logabsdet)

    def _parameters_of(self, inputs: Tensor, context: Tensor | None) -> Tensor:
        """Broadcasting against (batch, ..., features, parameters of a spline)."""
        if self.net is None:
            return self.raw_knots
        parameters = self.net(inputs.new_zeros(inputs.shape[0], 0), context)
        between = [1] * (inputs.ndim - 2)
        return parameters.reshape(
            inputs.shape[0], *between, self.features, spline_parameters(self.bins)
        )

    def extra_repr(self) -> str:
        return f"features={self.features}, bins={self.bins}, tail_bound={self.tail_bound}"
