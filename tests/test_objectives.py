"""bits_per_dim: known answers."""

import math

import pytest
import torch

from flows import Flow, bits_per_dim
from flows.distributions import Normal
from flows.transforms import Composite, Logit


@pytest.mark.parametrize("bits", [1, 5, 8, math.log2(17)])
@pytest.mark.parametrize("dims", [1, 784])
def test_uniform_density_needs_exactly_n_bits(bits, dims):
    assert torch.equal(bits_per_dim(torch.zeros(3), dims, bits=bits), torch.full((3,), bits))


def test_nice_on_mnist():
    assert round(bits_per_dim(1980.50, 784).item(), 2) == 4.36


def test_eight_bits_by_default():
    assert bits_per_dim(0.0, 3).item() == 8


def test_uniform_code_of_the_digits():
    # The densities of 17 levels, one of them certain in every pixel: nothing is left to say.
    certain = torch.tensor(64 * math.log(17), dtype=torch.float64)
    bits = bits_per_dim(certain, 64, bits=math.log2(17))
    torch.testing.assert_close(bits, torch.tensor(0.0, dtype=torch.float64), atol=1e-12, rtol=0)


def test_keeps_shape_dtype_and_gradient():
    log_prob = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    bits = bits_per_dim(log_prob, 10)
    assert bits.shape == (2, 3) and bits.dtype == torch.float64
    bits.sum().backward()
    expected = torch.full((2, 3), -1 / (10 * math.log(2)), dtype=torch.float64)
    torch.testing.assert_close(log_prob.grad, expected)


def test_equals_the_published_formula_for_logits():
    # flow_libraries.md 5, after MAF: with y = logit(a + (1 - 2a) u), u in [0, 1] of 8 bits,
    # -log q(y) / (D ln 2) - log2(1 - 2a) + 8 + mean of log2 sigmoid(y) + log2(1 - sigmoid(y)).
    a, dims = 0.05, 6
    u = torch.rand(20, dims, dtype=torch.float64)
    normal = Normal(dims)
    bits = bits_per_dim(Flow(Composite([Logit(a)]), normal).log_prob(u), dims)
    y = torch.logit(a + (1 - 2 * a) * u)
    log_sigmoids = (y.sigmoid().log2() + (1 - y.sigmoid()).log2()).mean(1)
    nats = normal.log_prob(y)
    expected = -nats / (dims * math.log(2)) - math.log2(1 - 2 * a) + 8 + log_sigmoids
    torch.testing.assert_close(bits, expected)


def test_nan_is_refused():
    with pytest.raises(ValueError, match=r"^log_prob holds 2 NaN\.$"):
        bits_per_dim(torch.tensor([1.0, math.nan, math.nan]), 4)


@pytest.mark.parametrize(("dims", "bits"), [(0, 8), (-1, 8), (4, 0), (4, -1), (4, math.nan)])
def test_bad_arguments_are_refused(dims, bits):
    with pytest.raises(ValueError, match="^dims and bits must be positive, got "):
        bits_per_dim(0.0, dims, bits=bits)
