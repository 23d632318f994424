"""Standardize: fixed units taken from the first batch, without loss for large offsets."""

import math

import numpy as np
import pytest
import torch

from flows import Flow
from flows.distributions import Normal
from flows.nets import StandardizedContext
from flows.transforms import Composite, Standardize


def columns(rows: int, seed: int = 0) -> np.ndarray:
    """Columns of very different mean and deviation, float64."""
    generator = np.random.default_rng(seed)
    return generator.normal(size=(rows, 3)) * [1e-4, 3.0, 5e5] + [1e-3, -70.0, 1e6]


def test_flow_has_the_density_of_independent_normals_in_the_units_of_the_data():
    train, test = columns(500), columns(40, seed=1)
    flow = Flow(Standardize(3), Normal(3)).double()
    flow.train()(torch.from_numpy(train))
    mean, deviation = train.mean(0), train.std(0)
    z = (test - mean) / deviation
    expected = (-0.5 * z**2 - 0.5 * math.log(2 * math.pi) - np.log(deviation)).sum(1)
    log_prob = flow.eval().log_prob(torch.from_numpy(test))
    np.testing.assert_allclose(log_prob.numpy(), expected, rtol=1e-12)
    np.testing.assert_allclose(flow.float().log_prob(torch.from_numpy(test)), expected, rtol=1e-5)
    samples = flow.sample(20_000).numpy()
    np.testing.assert_allclose((samples.mean(0) - mean) / deviation, 0, atol=0.04)
    np.testing.assert_allclose(samples.std(0) / deviation, 1, atol=0.03)


def test_images_have_a_mean_and_deviation_per_channel():
    x = torch.randn(30, 2, 4, 3, dtype=torch.float64) * torch.tensor([2.0, 30.0]).view(2, 1, 1) + 5
    layer = Standardize(2).double()
    outputs, logabsdet = layer(x)
    statistics = x.transpose(0, 1).flatten(1)
    torch.testing.assert_close(layer.mean + layer.mean_rest, statistics.mean(1))
    torch.testing.assert_close(layer.deviation, statistics.std(1, correction=0))
    assert outputs[:, 1].std() < 1.1
    expected = -12 * layer.deviation.log().sum()
    torch.testing.assert_close(logabsdet, expected.expand(30), rtol=1e-12, atol=0)


def test_is_fitted_once_and_only_in_training():
    layer = Standardize(3)
    x = torch.from_numpy(columns(50)).float()
    layer.eval()(x)
    layer.train().inverse(x)
    layer(x[:0])
    assert not layer.initialized
    outputs, logabsdet = layer.eval()(x)
    assert torch.equal(outputs, x) and not logabsdet.any()
    layer.train()(x)
    kept = {name: value.clone() for name, value in layer.state_dict().items()}
    layer(10 * x + 7)
    loaded = Standardize(3)
    loaded.load_state_dict(kept)
    loaded.train()(10 * x + 7)
    for same in (layer, loaded):
        assert all(torch.equal(value, kept[name]) for name, value in same.state_dict().items())


def test_has_nothing_to_train():
    assert not list(Standardize(3).parameters())


@pytest.mark.parametrize("offset", [1e6, -1.7e9, 1e12])
def test_large_offsets_in_float64_lose_nothing_in_a_float32_flow(offset):
    small = torch.randn(200, 1, dtype=torch.float64)
    x = small + offset
    layer = Standardize(1)
    outputs, _ = layer(x)
    assert outputs.dtype == torch.float32
    expected = (small - small.mean()) / small.std(correction=0)
    # What float64 itself has lost by the addition, and rounding to float32.
    tolerance = 4 * abs(offset) * torch.finfo(torch.float64).eps + 1e-6
    torch.testing.assert_close(outputs.double(), expected, atol=tolerance, rtol=1e-6)
    back, _ = layer.double().inverse(outputs.double())
    torch.testing.assert_close(back, x, atol=tolerance + 1e-6, rtol=0)


def test_units_found_in_float64_outlast_a_move_to_float32():
    x = torch.randn(200, 1, dtype=torch.float64) + 1.2345678912e9
    layer = Standardize(1).double()
    exact, _ = layer(x)
    loaded = Standardize(1)
    loaded.load_state_dict(layer.state_dict())
    for coarse in (loaded, layer.float()):
        torch.testing.assert_close(coarse(x)[0], exact.float(), atol=1e-5, rtol=0)


def test_integers_have_units_too():
    x = torch.tensor([[3, 7], [5, 7], [10, 7]])
    outputs, _ = Standardize(2)(x)
    torch.testing.assert_close(outputs, Standardize(2)(x.float())[0])


def test_float64_data_pass_into_a_float32_flow():
    flow = Flow(Composite([Standardize(3), Composite([])]), Normal(3))
    x = torch.from_numpy(columns(100))
    log_prob = flow.train()(x)
    assert flow.transform_to_noise(x).dtype == torch.float32
    torch.testing.assert_close(log_prob, flow.double()(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_constant_feature_is_only_centred(dtype):
    x = torch.stack([torch.full((50,), 0.1), 100 * torch.randn(50)], dim=1).to(dtype)
    x[::2, 0] = x[0, 0].nextafter(x.new_tensor(1.0))  # but for rounding
    layer = Standardize(2).to(dtype)
    outputs, _ = layer(x)
    assert layer.deviation[0] == 1 and layer.deviation[1] > 50
    assert outputs[:, 0].abs().max() < 1e-8


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_first_batch_that_is_not_finite_is_refused(bad):
    x = torch.zeros(4, 2)
    x[2, 1] = bad
    with pytest.raises(ValueError, match="first batch must be finite"):
        Standardize(2)(x)


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match=r"^features must be at least 1, got 0\.$"):
        Standardize(0)
    with pytest.raises(ValueError, match=r"3 features on axis 1, got \(5, 2\)"):
        Standardize(3)(torch.zeros(5, 2))


# Contexts


def test_contexts_are_standardized_by_the_first_training_context():
    context = torch.from_numpy(columns(60))
    net = StandardizedContext(3)
    net.train()(context)
    other = torch.from_numpy(columns(20, seed=2))
    outputs = net.eval()(other)
    expected = (other - context.mean(0)) / context.std(0, correction=0)
    torch.testing.assert_close(outputs, expected.float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [(5, 2), (3,)], ids=str)
def test_contexts_of_other_width_are_refused(shape):
    with pytest.raises(ValueError, match=r"context must have 3 features, got"):
        StandardizedContext(3)(torch.zeros(shape))
