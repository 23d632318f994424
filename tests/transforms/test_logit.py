"""The logit and its margin."""

import math

import pytest
import torch

from flows.transforms import InputOutsideDomain, Logit


@pytest.mark.parametrize("alpha", [1e-6, 0.05, 0.3])
def test_is_the_formula(alpha):
    x = torch.rand(20, 3, dtype=torch.float64)
    outputs, logabsdet = Logit(alpha)(x)
    p = alpha + (1 - 2 * alpha) * x
    torch.testing.assert_close(outputs, p.log() - (1 - p).log())
    log_slope = math.log(1 - 2 * alpha) - p.log() - (1 - p).log()
    torch.testing.assert_close(logabsdet, log_slope.sum(1))


def test_margin_is_005_by_default():
    outputs, _ = Logit()(torch.tensor([[0.0, 0.5, 1.0]], dtype=torch.float64))
    end = math.log(0.95 / 0.05)
    torch.testing.assert_close(outputs, torch.tensor([[-end, 0.0, end]], dtype=torch.float64))


def test_ends_are_finite_in_float32():
    for result in Logit(1e-6)(torch.tensor([[0.0, 1.0]])):
        assert result.isfinite().all()


def test_logabsdet_is_finite_far_out():
    x, logabsdet = Logit().inverse(torch.tensor([[-1e4, 1e4]]))
    assert x.isfinite().all()
    torch.testing.assert_close(logabsdet, torch.tensor([-2e4]), atol=1, rtol=0)


@pytest.mark.parametrize("value", [-1e-3, 1.001, math.nan, math.inf])
def test_values_outside_the_unit_interval_are_refused(value):
    with pytest.raises(InputOutsideDomain, match=r"^inputs must lie in \[0, 1\], got "):
        Logit()(torch.tensor([[0.5, value]]))


@pytest.mark.parametrize("alpha", [0.0, 0.5, -0.1, math.nan])
def test_bad_margins_are_refused(alpha):
    with pytest.raises(ValueError, match=r"^alpha must lie in \(0, 0\.5\), got "):
        Logit(alpha)
