"""Posteriors in the plane: exact, though only their joint densities are given to training."""

import math
from itertools import product

import pytest
import torch
from torch.distributions import Categorical, MixtureSameFamily, Normal

from datasets.base import seeded_generator
from datasets.posteriors import POSTERIORS, MixtureMeans
from datasets.toy import TwoMeans

SMALL = MixtureMeans((-1.0, 0.3, 2.0), (0.25, 0.75), sd=0.8, prior_sd=2.0)
each_posterior = pytest.mark.parametrize("posterior", [SMALL, *POSTERIORS.values()])


def log_joint(posterior, x):
    """By torch.distributions, a point at a time."""
    prior = Normal(torch.zeros(2, dtype=torch.float64), posterior.prior_sd)
    y = torch.from_numpy(posterior.observations)
    choice = Categorical(torch.from_numpy(posterior.proportions))
    values = []
    for means in x:
        law = MixtureSameFamily(choice, Normal(means, posterior.sd))
        values.append(prior.log_prob(means).sum() + law.log_prob(y).sum())
    return torch.stack(values)


def grid(posterior, points=400):
    """Points of a square that holds all of the posterior, and the area of each."""
    edge = 6 * posterior.prior_sd
    axis = torch.linspace(-edge, edge, points, dtype=torch.float64)
    return torch.cartesian_prod(axis, axis), float(axis[1] - axis[0]) ** 2


@each_posterior
def test_unnormalized_log_prob_is_the_joint_density(posterior):
    x = 3 * torch.randn(50, 2, dtype=torch.float64)
    torch.testing.assert_close(posterior.unnormalized_log_prob(x), log_joint(posterior, x))


@each_posterior
def test_evidence_is_the_integral_of_the_joint_density(posterior):
    # The trapezoidal rule is exact to rounding where the step is a third of a deviation.
    x, area = grid(posterior)
    evidence = (posterior.unnormalized_log_prob(x).logsumexp(0) + math.log(area)).item()
    assert abs(evidence - posterior.log_evidence) < 1e-7


@each_posterior
def test_log_prob_is_that_of_the_mixture_over_all_assignments(posterior):
    x = 3 * torch.randn(200, 2, dtype=torch.float64)
    mixture = super(MixtureMeans, posterior).log_prob(x)
    torch.testing.assert_close(posterior.log_prob(x), mixture, atol=1e-9, rtol=1e-12)


def test_weights_are_those_of_every_assignment():
    # By hand for three observations: the chance of an assignment is its marginal likelihood.
    weights = []
    for assignment in product((0, 1), repeat=3):
        weight = 1.0
        for j in (0, 1):
            y = SMALL.observations[[a == j for a in assignment]]
            law = torch.distributions.MultivariateNormal(
                torch.zeros(len(y), dtype=torch.float64),
                0.8**2 * torch.eye(len(y), dtype=torch.float64) + 2.0**2,
            )
            likelihood = law.log_prob(torch.from_numpy(y)).exp().item() if len(y) else 1.0
            weight *= likelihood * SMALL.proportions[j] ** len(y)
        weights.append(weight)
    assert SMALL.log_evidence == pytest.approx(math.log(sum(weights)), abs=1e-12)
    expected = sorted(weight / sum(weights) for weight in weights)
    assert sorted(SMALL.weights) == pytest.approx(expected, rel=1e-12)


@each_posterior
def test_samples_have_the_moments_of_the_posterior(posterior):
    x, area = grid(posterior)
    p = posterior.log_prob(x).exp() * area
    samples = posterior.sample(100_000, seeded_generator(3)).double()
    for values in (lambda x: x[:, 0], lambda x: x.prod(1), lambda x: (x[:, 0] < x[:, 1]) + 0.0):
        expected, drawn = (p * values(x)).sum().item(), values(samples)
        assert abs(drawn.mean().item() - expected) < 4 * drawn.std().item() / len(samples) ** 0.5


@each_posterior
def test_entropy_and_extent(posterior):
    x, area = grid(posterior)
    log_p = posterior.log_prob(x)
    assert posterior.entropy() == pytest.approx(
        -(log_p.exp() * log_p).sum().item() * area, abs=1e-5
    )
    xmin, xmax, ymin, ymax = posterior.extent
    inside = (x[:, 0] > xmin) & (x[:, 0] < xmax) & (x[:, 1] > ymin) & (x[:, 1] < ymax)
    assert (log_p[inside].exp().sum() * area).item() > 1 - 1e-5


def test_two_means_have_two_modes_of_comparable_mass():
    x = TwoMeans.density.sample(20_000, seeded_generator(0))
    share = (x[:, 0] > x[:, 1]).double().mean().item()
    assert 0.3 < share < 0.45
    between = TwoMeans.density.log_prob(torch.zeros(1, 2)).item()
    modes = torch.tensor([(-2.1, 1.6), (1.6, -2.0)])
    assert (TwoMeans.density.log_prob(modes) - between > 4).all()


def test_float32_and_gradient():
    x = POSTERIORS["two_means"].sample(2000, seeded_generator(1))
    exact = POSTERIORS["two_means"].log_prob(x.double())
    log_p = POSTERIORS["two_means"].log_prob(x)
    assert log_p.dtype == torch.float32 and (log_p - exact).abs().max() < 2e-5
    points = x[:4].double().requires_grad_()
    assert torch.autograd.gradcheck(POSTERIORS["two_means"].log_prob, points)


def test_leading_axes_no_rows_and_one_generator():
    density = POSTERIORS["two_means"]
    x = density.sample(6, seeded_generator(2))
    torch.testing.assert_close(density.log_prob(x.view(2, 3, 2)).flatten(), density.log_prob(x))
    assert density.log_prob(torch.empty(0, 2)).shape == (0,)
    assert density.sample(0).shape == (0, 2)
    assert torch.equal(x, density.sample(6, seeded_generator(2)))
    data = TwoMeans(batch_size=4, val_size=5, test_size=6)
    data.setup()
    assert {name: len(rows) for name, (rows,) in data.splits.items()} == {
        "val": 5,
        "test": 6,
        "train": 4096,
    }
