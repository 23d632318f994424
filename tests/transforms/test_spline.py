"""Elementwise splines: whose spline maps what; the splines themselves are in tests/splines."""

import math
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from flows.nets import MLP
from flows.splines import rational_quadratic_spline, spline_parameters
from flows.transforms import ElementwiseSpline

BINS = 6
BOUND = 3.0
CONTEXT_NET = partial(MLP, hidden_features=4, context_features=1)


def inside(*shape: int) -> Tensor:
    return BOUND * (2 * torch.rand(*shape, dtype=torch.float64) - 1)


def spline(inputs: Tensor, raw: Tensor) -> tuple[Tensor, Tensor]:
    return rational_quadratic_spline(inputs, raw, tail_bound=BOUND)


def test_layer_maps_every_channel_by_its_own_spline():
    layer = ElementwiseSpline(2, bins=BINS, tail_bound=BOUND).double()
    raw = torch.randn(2, spline_parameters(BINS), dtype=torch.float64)
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
