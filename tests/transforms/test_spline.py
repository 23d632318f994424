"""Rational-quadratic splines, against their definition and nflows' implementation."""

import math
from functools import partial

import pytest
import torch
from nflows.transforms.splines import unconstrained_rational_quadratic_spline
from torch import Tensor, nn

from flows.nets import MLP
from flows.splines import rational_quadratic_spline, spline_parameters
from flows.splines.plain import MIN_BIN, MIN_SLOPE
from flows.transforms import ElementwiseSpline

BINS = 6
BOUND = 3.0
CONTEXT_NET = partial(MLP, hidden_features=4, context_features=1)
each_direction = pytest.mark.parametrize("inverse", [False, True], ids=["forward", "inverse"])


def parameters(*shape: int, scale: float = 1.0, dtype: torch.dtype = torch.float64) -> Tensor:
    return scale * torch.randn(*shape, spline_parameters(BINS), dtype=dtype)


def inside(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return BOUND * (2 * torch.rand(*shape, dtype=dtype) - 1)


def spline(inputs: Tensor, raw: Tensor, inverse: bool = False) -> tuple[Tensor, Tensor]:
    return rational_quadratic_spline(inputs, raw, tail_bound=BOUND, inverse=inverse)


def nflows_spline(inputs: Tensor, raw: Tensor, inverse: bool = False) -> tuple[Tensor, Tensor]:
    """The same knots and slopes from nflows, whose raw slopes have another origin."""
    widths, heights, slopes = raw.split([BINS, BINS, BINS - 1], dim=-1)
    return unconstrained_rational_quadratic_spline(
        inputs,
        widths,
        heights,
        slopes + math.log(math.expm1(1 - MIN_SLOPE)),
        inverse=inverse,
        tail_bound=BOUND,
        min_bin_width=MIN_BIN / BINS,
        min_bin_height=MIN_BIN / BINS,
        min_derivative=MIN_SLOPE,
    )


@each_direction
def test_zero_parameters_are_the_identity(inverse):
    x = 1.5 * inside(200)
    y, log_slope = spline(x, torch.zeros(spline_parameters(BINS)).double(), inverse)
    torch.testing.assert_close(y, x, atol=1e-12, rtol=0)
    torch.testing.assert_close(log_slope, torch.zeros_like(x), atol=1e-12, rtol=0)


@each_direction
@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_equals_the_spline_of_nflows(inverse, scale):
    x, raw = 1.2 * inside(2000), parameters(2000, scale=scale)
    results, expected = spline(x, raw, inverse), nflows_spline(x, raw, inverse)
    torch.testing.assert_close(results, expected, atol=1e-10, rtol=1e-10)


@each_direction
def test_float32_is_as_close_to_float64_as_that_of_nflows(inverse):
    x, raw = 1.2 * inside(20_000, dtype=torch.float32), parameters(20_000, dtype=torch.float32)
    exact = spline(x.double(), raw.double(), inverse)
    ours, theirs = spline(x, raw, inverse), nflows_spline(x, raw, inverse)
    for fast, plain, truth in zip(ours, theirs, exact, strict=True):
        budget = 2 * ((plain - truth).abs().mean() + torch.finfo(torch.float32).eps * BOUND)
        assert (fast - truth).abs().mean() <= budget


@each_direction
def test_rises_strictly_and_fills_the_interval(inverse):
    x = torch.linspace(-BOUND, BOUND, 5001, dtype=torch.float64)
    y, log_slope = spline(x.expand(20, -1), parameters(20, 1, scale=2.0), inverse)
    assert (y.diff() > 0).all() and log_slope.isfinite().all()
    torch.testing.assert_close(y[:, [0, -1]], x[[0, -1]].expand(20, 2))


@each_direction
@pytest.mark.parametrize("side", [-1, 1])
def test_joins_the_identity_smoothly(inverse, side):
    raw = parameters(200)
    end = torch.full((200,), side * BOUND, dtype=torch.float64)
    y, log_slope = spline(end * (1 - 1e-10), raw, inverse)
    torch.testing.assert_close(y, end, atol=1e-8, rtol=0)
    torch.testing.assert_close(log_slope, torch.zeros_like(end), atol=1e-6, rtol=0)


@each_direction
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_is_exactly_the_identity_outside(inverse, dtype):
    ends = torch.tensor([BOUND * (1 + 1e-6), 10.0, 1e6, 1e30, math.inf], dtype=dtype)
    x = torch.cat([ends, -ends])
    y, log_slope = spline(x, parameters(len(x), dtype=dtype), inverse)
    assert torch.equal(y, x) and torch.equal(log_slope, torch.zeros_like(x))


@each_direction
@pytest.mark.parametrize("scale", [1.0, 10.0, 1e4])
def test_gradients_are_finite_at_the_bounds_and_outside(inverse, scale):
    below = math.nextafter(BOUND, 0)
    # From 1e30 on an unclamped spline would overflow, and its gradient be NaN behind the mask.
    ends = torch.tensor([0.0, below, BOUND, BOUND * (1 + 1e-6), 10.0, 1e6, 1e30, math.inf])
    x = torch.cat([ends, -ends]).requires_grad_()
    raw = parameters(len(x), scale=scale, dtype=torch.float32).requires_grad_()
    y, log_slope = spline(x, raw, inverse)
    (y.sum() + log_slope.sum()).backward()
    assert x.grad.isfinite().all() and raw.grad.isfinite().all()
    outside = x.abs() > BOUND
    assert (x.grad[outside] == 1).all() and (raw.grad[outside] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("scale", [10.0, 1e4])
def test_inverse_survives_extreme_parameters(scale, dtype):
    y = inside(20_000, dtype=dtype).requires_grad_()
    raw = parameters(20_000, scale=scale, dtype=dtype).requires_grad_()
    x, log_slope = spline(y, raw, inverse=True)
    (x.sum() + log_slope.sum()).backward()
    for tensor in (x, log_slope, y.grad, raw.grad):
        assert tensor.isfinite().all()
    eps = torch.finfo(dtype).eps
    assert x.abs().max() <= BOUND * (1 + 4 * eps)
    if scale == 10:  # slopes of several hundred, from bins of very different shape
        assert (spline(x, raw)[0] - y).abs().max() <= 1e5 * eps * BOUND


def test_nan_stays_nan():
    x = torch.tensor([math.nan, 0.5], dtype=torch.float64)
    y, _ = spline(x, parameters(2))
    assert y.isnan().tolist() == [True, False]


def test_parameters_broadcast_over_the_inputs():
    x, raw = inside(4, 5, 3), parameters(3)
    expected = spline(x, raw.expand(4, 5, 3, -1).contiguous())
    torch.testing.assert_close(spline(x, raw), expected, atol=1e-12, rtol=1e-12)


def test_layer_maps_every_channel_by_its_own_spline():
    layer = ElementwiseSpline(2, bins=BINS, tail_bound=BOUND).double()
    raw = parameters(2)
    layer.raw_knots.data.copy_(raw)
    images = inside(3, 2, 4, 5)
    outputs, logabsdet = layer(images)
    total = 0
    for channel in range(2):
        expected, log_slope = spline(images[:, channel], raw[channel])
        torch.testing.assert_close(outputs[:, channel], expected)
        total = total + log_slope.sum((1, 2))
    torch.testing.assert_close(logabsdet, total)


@pytest.mark.parametrize("shape", [(2,), (2, 4, 5)], ids=["vectors", "images"])
def test_layer_takes_the_splines_of_each_sample_from_the_context(shape):
    layer = ElementwiseSpline(2, bins=BINS, tail_bound=BOUND, net=CONTEXT_NET).double()
    nn.init.normal_(layer.net.last.weight)
    inputs, context = inside(3, *shape), torch.randn(3, 1, dtype=torch.float64)
    outputs, logabsdet = layer(inputs, context)
    raw = layer.net(torch.empty(3, 0).double(), context).unflatten(1, (2, -1))
    for sample in range(3):
        total = 0
        for channel in range(2):
            expected, log_slope = spline(inputs[sample, channel], raw[sample, channel])
            torch.testing.assert_close(outputs[sample, channel], expected)
            total = total + log_slope.sum()
        torch.testing.assert_close(logabsdet[sample], total)


@pytest.mark.parametrize("net", [None, CONTEXT_NET], ids=["learned", "from the context"])
def test_layer_starts_as_the_identity(net):
    x = 2 * torch.randn(50, 3)
    outputs, logabsdet = ElementwiseSpline(3, net=net)(x, torch.randn(50, 1))
    torch.testing.assert_close(outputs, x, atol=1e-5, rtol=0)
    torch.testing.assert_close(logabsdet, torch.zeros(50), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"features": 0}, "features"),
        ({"features": 2, "bins": 1}, "bins"),
        ({"features": 2, "tail_bound": 0.0}, "tail_bound"),
        ({"features": 2, "tail_bound": math.nan}, "tail_bound"),
    ],
    ids=str,
)
def test_bad_arguments_are_refused(options, name):
    with pytest.raises(ValueError, match=f"^{name} must be .*, got "):
        ElementwiseSpline(**options)
