import pytest
import torch
from torch.distributions import Independent
from torch.distributions import Normal as TorchNormal

from flows.distributions import Normal


@pytest.mark.parametrize("shape", [(1,), (5,), (3, 2, 2)], ids=str)
def test_log_prob_is_that_of_torch(shape):
    x = 2 * torch.randn(6, *shape, dtype=torch.float64)
    zeros = torch.zeros(shape, dtype=torch.float64)
    expected = Independent(TorchNormal(zeros, zeros + 1), len(shape)).log_prob(x)
    torch.testing.assert_close(Normal(shape).log_prob(x), expected)


def test_an_int_is_the_shape_of_vectors():
    assert Normal(3).shape == Normal((3,)).shape == Normal([3]).shape == (3,)


@pytest.mark.parametrize("shape", [(2,), (3, 2, 2)], ids=str)
@pytest.mark.parametrize("num_samples", [0, 1, 7])
def test_samples_have_one_shape_with_and_one_without_context(shape, num_samples):
    normal = Normal(shape)
    assert normal.sample(num_samples).shape == (num_samples, *shape)
    context = torch.randn(4, 9)
    assert normal.sample(num_samples, context).shape == (4, num_samples, *shape)
    assert normal.sample(num_samples, context[:0]).shape == (0, num_samples, *shape)


@pytest.mark.parametrize("temperature", [1.0, 0.5, 0.0])
def test_temperature_is_the_standard_deviation(temperature):
    x = Normal(2).sample(20_000, temperature=temperature)
    assert x.mean(0).abs().max() <= 0.03 * temperature
    assert (x.std(0) - temperature).abs().max() <= 0.03 * temperature


def test_samples_of_different_contexts_are_independent():
    x = Normal(1).sample(1000, torch.zeros(2, 3)).squeeze(-1)
    assert x.corrcoef()[0, 1].abs() < 0.15


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_samples_follow_the_dtype_of_the_module(dtype):
    normal = Normal(2).to(dtype)
    assert normal.sample(3).dtype == normal.log_prob(normal.sample(3)).dtype == dtype


def test_saves_nothing():
    assert not Normal(2).state_dict() and not list(Normal(2).parameters())


def test_no_rows_have_no_log_prob():
    assert Normal((3, 2)).log_prob(torch.empty(0, 3, 2)).shape == (0,)


@pytest.mark.parametrize("shape", [(4, 3), (4, 2, 2), (4,)], ids=str)
def test_inputs_of_another_shape_are_refused(shape):
    with pytest.raises(ValueError, match=r"^inputs must be \(batch, 2\), got "):
        Normal(2).log_prob(torch.zeros(shape))
