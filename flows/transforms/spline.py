"""Monotonic rational-quadratic splines with linear tails."""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from flows.checks import check_at_least, check_positive
from flows.transforms.base import Transform, check_features, sum_features

__all__ = ["ElementwiseSpline", "rational_quadratic_spline", "spline_parameters"]

# Smallest bin, as a fraction of the mean bin, and smallest slope at a knot.
MIN_BIN = 0.02
MIN_SLOPE = 1e-3


def spline_parameters(bins: int) -> int:
    """Unconstrained parameters of one spline: widths, heights and the inner knots' slopes."""
    check_at_least(2, bins=bins)
    return 3 * bins - 1


def rational_quadratic_spline(
    inputs: Tensor, parameters: Tensor, *, tail_bound: float, inverse: bool = False
) -> tuple[Tensor, Tensor]:
    r"""Elementwise spline on [-B, B] with slope 1 at both ends, the identity outside.

    In a bin of width w, height h and slope m = h / w, whose left knot is :math:`(x_k, y_k)`
    and whose knots have slopes :math:`d_k, d_{k+1}`, with :math:`\xi = (x - x_k) / w`:

    .. math::
        y = y_k + h \frac{m \xi^2 + d_k \xi (1 - \xi)}
                         {m + (d_k + d_{k+1} - 2 m)\, \xi (1 - \xi)}

    All-zero parameters give the identity. Gradients outside the interval are safe: the
    spline is evaluated at the clamped input and then discarded.

    Args:
        inputs: Values, any shape.
        parameters: Unconstrained, shape (*inputs.shape, 3 * bins - 1) or broadcasting to it.
        tail_bound: Half-width B of the interval.
        inverse: Apply the inverse function.

    Returns:
        Outputs and the elementwise log derivative, both of the shape of inputs.

    Reference:
        Durkan et al. (2019), Neural Spline Flows, arXiv 1906.04032
    """
    bins = (parameters.shape[-1] + 1) // 3
    raw_widths, raw_heights, raw_slopes = parameters.split([bins, bins, bins - 1], dim=-1)
    inside = inputs.abs() <= tail_bound
    values = inputs.clamp(-tail_bound, tail_bound)

    x_left, widths = _knots(raw_widths, tail_bound)
    y_left, heights = _knots(raw_heights, tail_bound)
    # softplus(0 + offset) = 1 - MIN_SLOPE, so that zero parameters mean slope 1.
    offset = math.log(math.expm1(1 - MIN_SLOPE))
    slopes = functional.pad(MIN_SLOPE + functional.softplus(raw_slopes + offset), (1, 1), value=1)

    left = y_left if inverse else x_left
    index = (values.unsqueeze(-1) >= left[..., 1:]).sum(-1, keepdim=True)

    def chosen(table: Tensor) -> Tensor:
        return table.expand(*index.shape[:-1], -1).gather(-1, index).squeeze(-1)

    x_k, w, y_k, h = map(chosen, (x_left, widths, y_left, heights))
    d_left, d_right = chosen(slopes[..., :-1]), chosen(slopes[..., 1:])
    m = h / w
    curvature = d_left + d_right - 2 * m

    if inverse:
        rise = values - y_k
        a = h * (m - d_left) + rise * curvature
        b = h * d_left - rise * curvature
        c = -m * rise
        # Rounding may push the discriminant of a monotone spline just below zero.
        root = (b.square() - 4 * a * c).clamp_min(0).sqrt()
        xi = (2 * c / (-b - root)).clamp(0, 1)
        outputs = x_k + xi * w
    else:
        xi = (values - x_k) / w
    mixed = xi * (1 - xi)
    denominator = m + curvature * mixed
    if not inverse:
        outputs = y_k + h * (m * xi.square() + d_left * mixed) / denominator
    slope = m.square() * (d_right * xi.square() + 2 * m * mixed + d_left * (1 - xi).square())
    log_slope = slope.log() - 2 * denominator.log()

    log_slope = torch.where(inside, -log_slope if inverse else log_slope, 0.0)
    return torch.where(inside, outputs, inputs), log_slope


def _knots(raw: Tensor, tail_bound: float) -> tuple[Tensor, Tensor]:
    """Left ends and sizes of bins that fill [-tail_bound, tail_bound]."""
    fractions = MIN_BIN / raw.shape[-1] + (1 - MIN_BIN) * raw.softmax(-1)
    sizes = 2 * tail_bound * fractions
    ends = sizes.cumsum(-1) - tail_bound
    return functional.pad(ends[..., :-1], (1, 0), value=-tail_bound), sizes


class ElementwiseSpline(Transform):
    r"""Every feature through a rational-quadratic spline of its own.

    Args:
        features: Size of axis 1: features of vectors, channels of images.
        bins: Number of bins of every spline.
        tail_bound: Half-width B of the interval; the identity outside.
        net: ``net(0, out_features)`` makes a module that is called as
            ``module(inputs without features, context)`` and returns the parameters of all
            splines, (batch, features * spline_parameters(bins)): they then depend on the
            context. By default they are learned, and the same for every sample.

    Shape:
        inputs (batch, features, ...) to outputs of the same shape, logabsdet (batch,).

    Reference:
        Durkan et al. (2019), Neural Spline Flows, arXiv 1906.04032
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
        parameters = self.net(inputs.new_zeros(len(inputs), 0), context)
        between = [1] * (inputs.ndim - 2)
        return parameters.reshape(
            len(inputs), *between, self.features, spline_parameters(self.bins)
        )

    def extra_repr(self) -> str:
        return f"features={self.features}, bins={self.bins}, tail_bound={self.tail_bound}"
