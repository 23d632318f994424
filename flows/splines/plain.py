"""Splines by tensor operations: the definition, for every device and every derivative."""

import math

import torch
from torch import Tensor
from torch.nn import functional

__all__ = ["MIN_BIN", "MIN_SLOPE", "SLOPE_OFFSET", "spline"]

# Smallest bin, as a fraction of the mean bin, and smallest slope at a knot.
MIN_BIN = 0.005
MIN_SLOPE = 1e-3
# softplus(0 + offset) = 1 - MIN_SLOPE, so that zero parameters mean slope 1.
SLOPE_OFFSET = math.log(math.expm1(1 - MIN_SLOPE))


def spline(
    inputs: Tensor, parameters: Tensor, tail_bound: float, inverse: bool
) -> tuple[Tensor, Tensor]:
    """Outputs and log slopes; parameters have one axis more than inputs, and broadcast."""
    # Tables lie before the inputs' axes: neighbours in memory are neighbouring splines.
    rows = parameters.movedim(-1, 0)
    bins = (len(rows) + 1) // 3
    inside = inputs.abs() <= tail_bound
    values = inputs.clamp(-tail_bound, tail_bound)

    shares = rows[: 2 * bins].unflatten(0, (2, bins)).softmax(1)  # of widths and of heights
    sizes = 2 * tail_bound * (MIN_BIN / bins + (1 - MIN_BIN) * shares)
    with torch.no_grad():
        ends = sizes[1 if inverse else 0, :-1].cumsum(0) - tail_bound
        passed = values >= ends
        index = passed.sum(0, keepdim=True)
    # The left end is the sum of what is passed: cheaper to differentiate than running sums.
    x_k, y_k = ((sizes[:, :-1] * passed).sum(1) - tail_bound).unbind(0)
    w, h = _chosen(sizes, 1, index.expand(2, *index.shape)).squeeze(1).unbind(0)
    # The ends' slopes are 1, which is what a raw slope of zero means.
    end = torch.zeros_like(rows[:1])
    raw_slopes = torch.cat([end, rows[2 * bins :], end])
    chosen = _chosen(raw_slopes, 0, torch.cat([index, index + 1]))
    # The default threshold, 20, would be exact in single precision only.
    slopes = MIN_SLOPE + functional.softplus(chosen + SLOPE_OFFSET, threshold=40)
    d_left, d_right = slopes.unbind(0)
    m = h / w
    curvature = d_left + d_right - 2 * m

    if inverse:
        rise = values - y_k
        a = h * (m - d_left) + rise * curvature
        b = h * d_left - rise * curvature
        # Rounding may push the discriminant of a monotone spline below zero.
        tiny = torch.finfo(inputs.dtype).tiny
        root = (b.square() + 4 * a * m * rise).clamp_min(tiny).sqrt()
        # Of the two ways to write the solution the one without a difference of equals.
        rising = b > 0
        xi = torch.where(rising, 2 * m * rise, root - b) / torch.where(rising, root + b, 2 * a)
    else:
        xi = (values - x_k) / w
    # Rounding may put it outside its bin, where the slope need not be positive.
    xi = xi + (xi.clamp(0, 1) - xi).detach()
    rest = 1 - xi
    mixed = xi * rest
    denominator = m + curvature * mixed
    if inverse:
        outputs = x_k + xi * w
    else:
        outputs = y_k + h * (m * xi.square() + d_left * mixed) / denominator
    slope = d_right * xi.square() + 2 * m * mixed + d_left * rest.square()
    log_slope = slope.log() + 2 * (m / denominator).log()

    log_slope = torch.where(inside, -log_slope if inverse else log_slope, 0.0)
    return torch.where(inside, outputs, inputs), log_slope


def _chosen(table: Tensor, axis: int, index: Tensor) -> Tensor:
    """Entries along an axis, where the axes behind it may broadcast."""
    behind = index.shape[axis + 1 :]
    return table.expand(*table.shape[: axis + 1], *behind).gather(axis, index)
