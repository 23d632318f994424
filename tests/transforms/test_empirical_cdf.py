"""EmpiricalCDF: with one bin per grey level it is the model of independent histograms."""

import math

import numpy as np
import pytest
import torch
from scipy.stats import norm

from flows import Flow
from flows.distributions import Normal
from flows.transforms import Composite, Dequantize, EmpiricalCDF, InputOutsideDomain


def grey(rows: int, *shape: int, grey_levels: int) -> torch.Tensor:
    """Dark levels are common, bright ones rare, and some are missing."""
    u = torch.rand(rows, *shape, dtype=torch.float64)
    return (grey_levels * u**3).floor() / grey_levels


@pytest.mark.parametrize("grey_levels", [2, 17, 256])
@pytest.mark.parametrize("shape", [(3,), (2, 3, 2)], ids=str)
def test_is_the_model_of_independent_histograms(shape, grey_levels):
    train, test = (grey(rows, *shape, grey_levels=grey_levels) for rows in (200, 50))
    layer = EmpiricalCDF(shape, bins=grey_levels, smoothing=0.3).double()
    flow = Flow(Composite([Dequantize(grey_levels), layer]), Normal(shape)).double()
    flow.train()(train)

    train_levels, test_levels = (
        np.rint(x.flatten(1).numpy() * grey_levels).astype(int) for x in (train, test)
    )
    expected = np.zeros(len(test))
    for feature in range(math.prod(shape)):
        counts = np.bincount(train_levels[:, feature], minlength=grey_levels) + 0.3
        density = counts / counts.sum() * grey_levels  # of a value within its bin
        expected += np.log(density[test_levels[:, feature]])
    # The masses were made to sum to 1 in float64, so nothing is lost but rounding.
    np.testing.assert_allclose(flow.eval()(test).detach().numpy(), expected, atol=1e-9)
    rounded = flow.float()(test.float()).detach().numpy()
    np.testing.assert_allclose(rounded, expected, atol=1e-3, rtol=1e-4)


def test_is_the_normal_quantile_before_it_is_fitted():
    layer = EmpiricalCDF(2, bins=4).double().eval()
    x = torch.rand(50, 2, dtype=torch.float64)
    np.testing.assert_allclose(layer(x)[0].numpy(), norm.ppf(x.numpy()), atol=1e-12)
    assert not layer.initialized


def test_is_fitted_once_and_only_in_training():
    layer = EmpiricalCDF(2, bins=4)
    x = torch.rand(50, 2) ** 2
    before = layer.mass.clone()
    layer.eval()(x)
    layer.train().inverse(torch.randn(5, 2))
    layer(x[:0])
    assert torch.equal(layer.mass, before) and not layer.initialized
    layer(x)
    fitted = layer.mass.clone()
    assert layer.initialized and not torch.equal(fitted, before)
    layer(1 - x)
    assert torch.equal(layer.mass, fitted)
    loaded = EmpiricalCDF(2, bins=4)
    loaded.load_state_dict(layer.state_dict())
    loaded.train()(1 - x)
    assert torch.equal(loaded.mass, fitted)


def test_has_nothing_to_train():
    assert not list(EmpiricalCDF(2).parameters())


def test_makes_the_training_data_normal():
    x = torch.rand(20_000, 2, dtype=torch.float64).sqrt()
    z, _ = EmpiricalCDF(2, bins=200, smoothing=0.1).double()(x)
    probabilities = torch.linspace(0.01, 0.99, 25, dtype=torch.float64)
    quantiles = z.quantile(probabilities, dim=0)
    expected = torch.from_numpy(norm.ppf(probabilities.numpy()))
    assert (quantiles - expected[:, None]).abs().max() < 0.01


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_ends_of_the_interval_map_to_finite_noise(dtype):
    layer = EmpiricalCDF(2, bins=4).to(dtype)
    layer(torch.rand(50, 2, dtype=dtype))
    z, logabsdet = layer(torch.tensor([[0.0, 1.0]], dtype=dtype))
    assert z.isfinite().all() and logabsdet.isfinite().all()
    assert z[0, 0] < -5 and z[0, 1] > 5
    back, _ = layer.inverse(z)
    torch.testing.assert_close(back, torch.tensor([[0.0, 1.0]], dtype=dtype), atol=1e-5, rtol=0)


def test_inverse_stays_in_the_unit_interval():
    # Last bins so light that the rounding of the masses before them counts.
    layer = EmpiricalCDF(100, bins=256)
    layer(torch.rand(2000, 100) ** 8)
    far = torch.tensor([-math.inf, -40.0, -6.0, 0.0, 6.0, 40.0, math.inf])
    x, _ = layer.inverse(far[:, None].expand(-1, 100))
    assert 0 <= x.min() and x.max() <= 1 and (x.diff(dim=0) >= 0).all()
    expected = torch.tensor([[0.0], [1.0]]).expand(2, 100)
    torch.testing.assert_close(x[[0, -1]], expected, atol=1e-3, rtol=0)


@pytest.mark.parametrize("value", [-1e-3, 1.001, math.nan, math.inf])
def test_values_outside_the_unit_interval_are_refused(value):
    x = torch.full((3, 2), 0.5)
    x[1, 1] = value
    with pytest.raises(InputOutsideDomain, match=r"^inputs must lie in \[0, 1\], got "):
        EmpiricalCDF(2)(x)


@pytest.mark.parametrize(
    ("options", "name"),
    [({"bins": 1}, "bins"), ({"smoothing": 0.0}, "smoothing"), ({"smoothing": -1.0}, "smoothing")],
    ids=str,
)
def test_bad_arguments_are_refused(options, name):
    with pytest.raises(ValueError, match=f"^{name} must be .*, got "):
        EmpiricalCDF(2, **options)
