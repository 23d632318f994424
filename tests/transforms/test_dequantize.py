"""Uniform dequantization."""

import math

import pytest
import torch

from flows.transforms import Dequantize, InputOutsideDomain

each_count = pytest.mark.parametrize("grey_levels", [2, 17, 49, 256])
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)


def levels(grey_levels: int, dtype: torch.dtype, rows: int = 1) -> torch.Tensor:
    return (torch.arange(grey_levels, dtype=dtype) / grey_levels).repeat(rows, 1)


@each_count
@each_dtype
def test_inverse_gives_back_the_level(grey_levels, dtype):
    layer, x = Dequantize(grey_levels), levels(grey_levels, dtype, rows=200)
    noisy, logabsdet = layer(x)
    assert torch.equal(layer.inverse(noisy)[0], x)
    assert torch.equal(logabsdet, torch.zeros(200, dtype=dtype))
    assert noisy.min() >= 0 and noisy.max() <= 1


@each_count
@each_dtype
@pytest.mark.parametrize("noise", ["smallest", "largest"])
def test_extreme_noise_stays_in_the_bin(monkeypatch, grey_levels, dtype, noise):
    u = 0.0 if noise == "smallest" else 1 - torch.finfo(dtype).eps / 2
    monkeypatch.setattr(torch, "rand_like", lambda x: torch.full_like(x, u))
    layer, x = Dequantize(grey_levels), levels(grey_levels, dtype)
    noisy, _ = layer(x)
    assert (noisy >= x).all() and noisy.max() <= 1
    assert torch.equal(layer.inverse(noisy)[0], x)


def test_noise_is_uniform_over_the_bin():
    x = torch.full((50_000, 1), 3 / 8)
    u, _ = (8 * (Dequantize(8)(x)[0] - x)).sort(dim=0)
    even = torch.linspace(0, 1, len(u))[:, None]
    assert (u - even).abs().max() < 1.95 / math.sqrt(len(u))  # Kolmogorov-Smirnov, p = 0.001


def test_every_call_draws_new_noise():
    layer, x = Dequantize(4).eval(), levels(4, torch.float32)
    assert not torch.equal(layer(x)[0], layer(x)[0])


def test_inverse_of_noise_outside_is_the_nearest_level():
    x = torch.tensor([[-0.3, 0.0, 0.99, 1.0, 1.7]])
    assert Dequantize(4).inverse(x)[0].tolist() == [[0.0, 0.0, 0.75, 0.75, 0.75]]


@pytest.mark.parametrize("value", [-0.1, 2.0, math.nan])
def test_values_outside_the_unit_interval_are_refused(value):
    with pytest.raises(InputOutsideDomain, match=r"^inputs must lie in \[0, 1\], got "):
        Dequantize()(torch.tensor([[0.5, value]]))


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match=r"^grey_levels must be at least 2, got 1\.$"):
        Dequantize(1)
