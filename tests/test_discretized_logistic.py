"""Grey levels as integrals of logistics."""

import pytest
import torch
from scipy.stats import logistic

from flows.distributions.discretized_logistic import (
    discretized_logistic_log_prob,
    discretized_logistic_sample,
    logistic_parameters,
)

LEVELS = 17


def levels() -> torch.Tensor:
    return torch.arange(LEVELS).double() / LEVELS


def test_one_component_is_a_difference_of_distribution_functions():
    parameters = torch.tensor([[0.3, -0.2, 0.7]], dtype=torch.float64)  # logit, mean, raw scale
    x = levels()[:, None]
    log_prob = discretized_logistic_log_prob(x, parameters[..., None], LEVELS)
    quarter = torch.tensor(0.25, dtype=torch.float64).expm1().log()
    scale = torch.nn.functional.softplus(0.7 + quarter) + 0.02 / LEVELS
    law = logistic(loc=0.5 - 0.2, scale=scale.item())
    edges = law.cdf((torch.arange(1, LEVELS) / LEVELS).double().numpy())
    expected = torch.diff(torch.tensor([0.0, *edges, 1.0], dtype=torch.float64)).log()
    torch.testing.assert_close(log_prob[:, 0], expected)


def test_probabilities_of_all_levels_add_up_to_one():
    parameters = 3 * torch.randn(4, logistic_parameters(5), 2, 3, dtype=torch.float64)
    x = levels()[:, None, None, None].expand(-1, 4, 2, 3)
    total = sum(discretized_logistic_log_prob(k, parameters, LEVELS).exp() for k in x)
    torch.testing.assert_close(total, torch.ones_like(total))


@pytest.mark.parametrize("size", [1.0, 30.0, 1e3])
def test_float32_gradients_stay_finite(size):
    parameters = (size * torch.randn(LEVELS, logistic_parameters(3), 50)).requires_grad_()
    x = (torch.arange(LEVELS) / LEVELS)[:, None].expand(-1, 50)
    log_prob = discretized_logistic_log_prob(x, parameters, LEVELS)
    log_prob.sum().backward()
    assert log_prob.isfinite().all() and parameters.grad.isfinite().all()


def test_samples_follow_the_probabilities():
    parameters = torch.randn(1, logistic_parameters(3), 1, dtype=torch.float64)
    draws = discretized_logistic_sample(parameters.expand(40_000, -1, -1), LEVELS)
    counts = torch.bincount((draws * LEVELS).round().long().flatten(), minlength=LEVELS)
    expected = discretized_logistic_log_prob(
        levels()[:, None], parameters.expand(LEVELS, -1, -1), LEVELS
    ).exp()
    error = (expected * (1 - expected) / 40_000).sqrt()
    assert ((counts / 40_000 - expected[:, 0]).abs() < 4.5 * error[:, 0] + 1e-4).all()


def test_samples_are_levels_also_without_noise():
    parameters = 2 * torch.randn(100, logistic_parameters(2), 3)
    for temperature in (0.0, 1.0, 5.0):
        draws = discretized_logistic_sample(parameters, LEVELS, temperature=temperature)
        assert torch.isin(draws, torch.arange(LEVELS) / LEVELS).all()
