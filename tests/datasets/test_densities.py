import math
from functools import cache

import numpy as np
import pytest
import torch
from scipy.integrate import simpson
from scipy.special import i0e
from scipy.stats import chi2
from sklearn import datasets as sklearn_datasets
from torch.distributions import Categorical, MixtureSameFamily, MultivariateNormal

from datasets.base import seeded_generator
from datasets.densities import DENSITIES, NoisyCurves

each_density = pytest.mark.parametrize("name", DENSITIES)
CELLS, FINE = 8, 30  # the extent is cut into CELLS^2 cells of FINE^2 points


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@cache
def draw(name, n=50_000):
    return DENSITIES[name].sample(n, seeded_generator(11))


@cache
def cell_probabilities(name):
    """Integral of the density over each cell of its extent, by the midpoint rule."""
    density = DENSITIES[name]
    xmin, xmax, ymin, ymax = density.extent
    middles = (torch.arange(CELLS * FINE, dtype=torch.float64) + 0.5) / (CELLS * FINE)
    points = torch.cartesian_prod(xmin + (xmax - xmin) * middles, ymin + (ymax - ymin) * middles)
    p = density.log_prob(points).exp().reshape(CELLS, FINE, CELLS, FINE)
    return p.sum((1, 3)) * (xmax - xmin) * (ymax - ymin) / (CELLS * FINE) ** 2


def in_extent(name, n=200):
    """Points spread evenly over the extent, float64."""
    xmin, xmax, ymin, ymax = DENSITIES[name].extent
    u = torch.rand(n, 2, generator=seeded_generator(5), dtype=torch.float64)
    return torch.stack((xmin + (xmax - xmin) * u[:, 0], ymin + (ymax - ymin) * u[:, 1]), dim=-1)


@each_density
def test_density_integrates_to_one_over_its_extent(name):
    # These two have an extent for the eye; the other smooth ones reach five sd out.
    missing = {"pinwheel": 1e-4, "banana": 5e-4, "checkerboard": 1e-12}.get(name, 1e-5)
    assert abs(cell_probabilities(name).sum().item() - 1) < missing


@each_density
def test_samples_fill_the_cells_of_a_grid_as_the_density_says(name):
    x, (xmin, xmax, ymin, ymax) = draw(name), DENSITIES[name].extent
    edges = np.linspace(xmin, xmax, CELLS + 1), np.linspace(ymin, ymax, CELLS + 1)
    counts = np.histogram2d(*x.double().numpy().T, bins=edges)[0].ravel()
    expected = len(x) * cell_probabilities(name).numpy().ravel()
    big = expected >= 5
    counts = np.append(counts[big], len(x) - counts[big].sum())
    expected = np.append(expected[big], max(len(x) - expected[big].sum(), 0))
    if expected[-1] < 5:
        assert counts[-1] < 25
        counts, expected = counts[:-1], expected[:-1]
    assert chi2.sf(((counts - expected) ** 2 / expected).sum(), len(counts) - 1) > 1e-4


@each_density
def test_entropy_is_the_mean_of_minus_log_prob(name):
    surprise = -DENSITIES[name].log_prob(draw(name))
    error = surprise.std().item() / len(surprise) ** 0.5
    assert abs(surprise.mean().item() - DENSITIES[name].entropy()) < 4 * error + 1e-5


@pytest.mark.parametrize(
    ("name", "entropy", "tolerance"),
    [
        ("checkerboard", math.log(32), 1e-12),
        ("banana", 1 + math.log(2 * math.pi * 1.5 * 0.4), 1e-4),
        ("eight_gaussians", 2.8327, 0.0015),
        ("two_moons", 2.3939, 0.0005),
        ("circles", 3.270, 0.003),
        ("rings", 2.627, 0.006),
        ("swiss_roll", 2.670, 0.004),
    ],
)
def test_entropy_has_its_known_value(name, entropy, tolerance):
    assert abs(DENSITIES[name].entropy() - entropy) < tolerance


@pytest.mark.parametrize(
    ("name", "make"),
    [
        (
            "two_moons",
            lambda n: (
                sklearn_datasets.make_moons(n, noise=0.1, random_state=0)[0] * 2 + (-1, -0.2)
            ),
        ),
        (
            "circles",
            lambda n: (
                sklearn_datasets.make_circles(n, factor=0.5, noise=0.08, random_state=0)[0] * 3
            ),
        ),
        (
            "swiss_roll",
            lambda n: (
                sklearn_datasets.make_swiss_roll(n, noise=1.0, random_state=0)[0][:, ::2] / 5
            ),
        ),
    ],
)
def test_geometry_is_that_of_scikit_learn(name, make):
    # The cross entropy with another law exceeds that law's entropy.
    surprise = -DENSITIES[name].log_prob(torch.from_numpy(make(50_000)))
    error = surprise.std().item() / len(surprise) ** 0.5
    assert abs(surprise.mean().item() - DENSITIES[name].entropy()) < 4 * error


@pytest.mark.parametrize(
    ("name", "centres", "sd"),
    [
        (
            "eight_gaussians",
            [
                (8**0.5 * math.cos(k * math.pi / 4), 8**0.5 * math.sin(k * math.pi / 4))
                for k in range(8)
            ],
            8**-0.5,
        ),
        (
            "twenty_five_gaussians",
            [(x, y) for x in (-3, -1.5, 0, 1.5, 3) for y in (-3, -1.5, 0, 1.5, 3)],
            0.2,
        ),
    ],
)
def test_mixture_agrees_with_torch_distributions(name, centres, sd):
    law = MixtureSameFamily(
        Categorical(torch.ones(len(centres), dtype=torch.float64)),
        MultivariateNormal(
            torch.tensor(centres, dtype=torch.float64), sd**2 * torch.eye(2, dtype=torch.float64)
        ),
    )
    x = in_extent(name)
    torch.testing.assert_close(DENSITIES[name].log_prob(x), law.log_prob(x))


@pytest.mark.parametrize(
    ("name", "radii", "sd"),
    [("circles", (1.5, 3), 0.24), ("rings", (0.75, 1.5, 2.25, 3), 0.08)],
)
def test_noisy_circle_agrees_with_its_bessel_function(name, radii, sd):
    x = in_extent(name)
    r = x.norm(dim=-1, keepdim=True).numpy()
    radii = np.array(radii)
    log_p = np.log(i0e(r * radii / sd**2)) - (r - radii) ** 2 / (2 * sd**2)
    log_p = np.logaddexp.reduce(log_p, axis=-1) - math.log(len(radii) * 2 * math.pi * sd**2)
    seen = log_p > -100
    error = np.abs(DENSITIES[name].log_prob(x).numpy() - log_p)[seen]
    assert seen.sum() > 50 and error.max() < 1e-6


def moons(u):
    t = np.pi * u
    outer, inner = (np.cos(t), np.sin(t)), (1 - np.cos(t), 0.5 - np.sin(t))
    return [(2 * x - 1, 2 * y - 0.2) for x, y in (outer, inner)]


def spirals(u):
    t = np.sqrt((np.pi / 2) ** 2 * (1 - u) + (3 * np.pi) ** 2 * u)
    return [(-t * np.cos(t) / 3, t * np.sin(t) / 3), (t * np.cos(t) / 3, -t * np.sin(t) / 3)]


def roll(u):
    t = 1.5 * np.pi + 3 * np.pi * u
    return [(0.2 * t * np.cos(t), 0.2 * t * np.sin(t))]


@pytest.mark.parametrize(
    ("name", "curves", "sd"),
    [("two_moons", moons, 0.2), ("two_spirals", spirals, 0.1), ("swiss_roll", roll, 0.2)],
)
def test_noisy_curve_agrees_with_a_finer_integral(name, curves, sd):
    x, u = in_extent(name), np.linspace(0, 1, 20_001)
    x_0, x_1 = x.numpy().T[:, :, None]
    powers = [-((x_0 - a) ** 2 + (x_1 - b) ** 2) / (2 * sd**2) for a, b in curves(u)]
    largest = np.max(powers, axis=(0, 2))
    integrals = [simpson(np.exp(power - largest[:, None]), x=u, axis=1) for power in powers]
    log_p = np.log(np.mean(integrals, axis=0) / (2 * np.pi * sd**2)) + largest
    seen = log_p > -100
    error = np.abs(DENSITIES[name].log_prob(x).numpy() - log_p)[seen]
    assert seen.sum() > 50 and error.max() < 1e-6


def pinwheel_base():
    covariances, centres = [], []
    for k in range(5):
        c, s = math.cos(2 * math.pi * k / 5), math.sin(2 * math.pi * k / 5)
        turn = torch.tensor([(c, -s), (s, c)], dtype=torch.float64)
        covariances.append(turn @ torch.tensor([0.36, 0.04], dtype=torch.float64).diag() @ turn.T)
        centres.append(2 * turn[:, 0])
    blades = MultivariateNormal(torch.stack(centres), torch.stack(covariances))
    return MixtureSameFamily(Categorical(torch.ones(5, dtype=torch.float64)), blades)


def pinwheel_unwarp(x):
    z = torch.view_as_complex(x) * torch.exp(1j * x.square().sum(-1) / 8)
    return torch.view_as_real(z)


def banana_base():
    covariance = torch.tensor([1.5**2, 0.4**2], dtype=torch.float64).diag()
    return MultivariateNormal(torch.zeros(2, dtype=torch.float64), covariance)


def banana_unwarp(x):
    return torch.stack((x[..., 0], x[..., 1] - (x[..., 0] ** 2 - 2.25) / 4), dim=-1)


@pytest.mark.parametrize(
    ("name", "base", "unwarp"),
    [
        ("pinwheel", pinwheel_base, pinwheel_unwarp),
        ("banana", banana_base, banana_unwarp),
    ],
)
def test_warped_density_obeys_the_change_of_variables(name, base, unwarp):
    density, x = DENSITIES[name], in_extent(name)
    jacobian = torch.func.vmap(torch.func.jacrev(density.unwarp))(x)
    expected = base().log_prob(unwarp(x)) + jacobian.det().abs().log()
    torch.testing.assert_close(density.log_prob(x), expected)
    torch.testing.assert_close(density.warp(density.unwarp(x)), x)


def test_checkerboard_is_closed_and_ends_at_its_border():
    inside = torch.tensor([(-3.0, -3.0), (1.0, 1.0), (-2.0, 1.0), (1.0, -2.0), (4.0, 4.0)])
    outside = torch.tensor([(-3.0, -1.0), (1.0, -1.0), (4.5, 1.0), (1.0, 4.5), (-4.5, -8.0)])
    log_prob = DENSITIES["checkerboard"].log_prob
    torch.testing.assert_close(log_prob(inside), torch.full((5,), -math.log(32)))
    assert (log_prob(outside) == -math.inf).all()


@each_density
def test_float32_is_as_good_as_its_rounding(name):
    x = draw(name)[:2000]
    exact_at = x.double().requires_grad_()
    exact = DENSITIES[name].log_prob(exact_at)
    log_p = DENSITIES[name].log_prob(x)
    assert log_p.dtype == x.dtype and exact.dtype == torch.float64
    eps = torch.finfo(x.dtype).eps
    budget = 8 * eps * (1 + exact.abs())
    if name != "checkerboard":
        # Rounding x and the tables moves log p by the slope times eps times their size.
        (slope,) = torch.autograd.grad(exact.sum(), exact_at)
        budget = budget + 8 * eps * slope.norm(dim=-1) * max(map(abs, DENSITIES[name].extent))
    assert ((log_p - exact).abs() <= budget).all()


@each_density
def test_log_prob_stays_free_of_nan_far_away(name):
    log_p = DENSITIES[name].log_prob(torch.tensor([(1e3, -1e4), (-1e6, 0.5)]))
    assert (log_p < -1e4).all()


@each_density
def test_log_prob_keeps_leading_axes_and_takes_empty_input(name):
    density, x = DENSITIES[name], draw(name)[:6]
    flat = density.log_prob(x)
    torch.testing.assert_close(density.log_prob(x.reshape(2, 1, 3, 2)), flat.reshape(2, 1, 3))
    torch.testing.assert_close(density.log_prob(x[0]), flat[0])
    assert density.log_prob(torch.empty(0, 2)).shape == (0,)
    assert density.sample(0).shape == (0, 2)


def test_log_prob_has_a_gradient_after_its_first_use_in_inference_mode():
    density = NoisyCurves(DENSITIES["two_moons"].curves, 0.2, nodes=80)
    with torch.inference_mode():
        density.log_prob(torch.zeros(1, 2, dtype=torch.float64))
    x = in_extent("two_moons", 5).requires_grad_()
    assert torch.autograd.gradcheck(density.log_prob, x)


@each_density
def test_a_generator_fixes_the_samples(name):
    density = DENSITIES[name]
    first, same, other = (density.sample(50, seeded_generator(seed)) for seed in (3, 3, 4))
    assert first.shape == (50, 2) and first.dtype == torch.get_default_dtype()
    assert torch.equal(first, same) and not torch.equal(first, other)
    before = torch.get_rng_state()
    density.sample(5, seeded_generator(3))
    assert torch.equal(before, torch.get_rng_state())
