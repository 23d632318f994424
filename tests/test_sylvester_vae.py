"""The variational autoencoder: its bound, its samples, what it refuses."""

import math

import pytest
import torch
from torch import nn

from flows import bits_per_dim
from flows.distributions.discretized_logistic import discretized_logistic_log_prob
from flows.nets import ConvDecoder, ConvEncoder
from flows.recipes import SylvesterVAE
from flows.transforms.base import InputOutsideDomain

SMALL = {
    "grey_levels": 5,
    "latent_features": 2,
    "layers": 2,
    "hidden_features": 2,
    "posterior_features": 3,
    "components": 2,
}


def small(**changes) -> SylvesterVAE:
    vae = SylvesterVAE((1, 4, 4), **SMALL | changes).double()
    for parameter in vae.parameters():
        nn.init.normal_(parameter, std=0.4)
    return vae


def levels(*shape: int) -> torch.Tensor:
    return torch.randint(5, shape).double() / 5


@pytest.mark.parametrize("layers", [0, 2])
def test_importance_weights_average_to_the_density(layers):
    # log p(x) by quadrature over z, and by many draws from the posterior.
    vae = small(layers=layers, draws=4).eval()
    image = levels(1, 1, 4, 4)
    axis = torch.linspace(-6, 6, 121, dtype=torch.float64)
    grid = torch.cartesian_prod(axis, axis)
    with torch.no_grad():
        pixels = discretized_logistic_log_prob(
            image.expand(len(grid), -1, -1, -1), vae.decode(grid), 5
        )
        log_joint = pixels.flatten(1).sum(1) + vae.prior.log_prob(grid)
        expected = log_joint.logsumexp(0) + 2 * math.log(0.1) + 16 * math.log(5)
        bounds = vae(image.expand(20_000, -1, -1, -1))
        estimate = bounds.logsumexp(0) - math.log(len(bounds))
        torch.testing.assert_close(estimate, expected, atol=0.05, rtol=0)


def test_more_draws_give_a_tighter_bound():
    vae, images = small(), levels(2000, 1, 4, 4)
    with torch.no_grad():
        single = vae.train()(images).mean()
        many = vae.eval()(images).mean()
    assert many > single


def test_even_odds_for_black_and_white_cost_one_bit():
    # With zero parameters every logistic stands in the middle.
    vae = small(grey_levels=2, draws=1).eval()
    with torch.no_grad():
        for parameter in vae.parameters():
            parameter.zero_()
        log_prob = vae(torch.randint(2, (10, 1, 4, 4)).double() / 2)
    bits = bits_per_dim(log_prob, 16, bits=1)
    torch.testing.assert_close(bits, torch.ones_like(bits))


def test_samples_are_grey_levels_of_the_shape():
    vae = SylvesterVAE((3, 8, 4), grey_levels=5, latent_features=3).eval()
    for temperature in (0.0, 0.7, 1.0):
        samples = vae.sample(6, temperature=temperature)
        assert samples.shape == (6, 3, 8, 4) and samples.dtype == torch.float32
        assert torch.isin(samples, torch.arange(5) / 5).all()
    assert small().sample(2).dtype == torch.float64
    assert vae(samples).shape == (6,) and vae(samples[:0]).shape == (0,)


def test_autocast_leaves_the_latents_and_their_densities_in_full_precision():
    vae, seen = small().float(), []
    vae.posterior.register_forward_pre_hook(lambda module, given: seen.append(given[0].dtype))
    with torch.autocast("cpu", torch.bfloat16):
        assert vae(levels(5, 1, 4, 4).float()).dtype == torch.float32
        assert torch.isin(vae.sample(5), torch.arange(5) / 5).all()
    assert set(seen) == {torch.float32}


def test_every_parameter_learns():
    vae = small().train()
    images = levels(50, 1, 4, 4)
    optimizer = torch.optim.Adam(vae.parameters(), lr=1e-2)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = -vae(images).mean()
        loss.backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in vae.parameters())
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-10:]) < sum(losses[:10]) - 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layers": -1}, "layers must be at least 0, got -1"),
        ({"latent_features": 1}, "latent_features must be at least 2, got 1"),
        ({"components": 0}, "components must be at least 1, got 0"),
        ({"draws": 0}, "draws must be at least 1, got 0"),
        ({"grey_levels": 1}, "grey_levels must be at least 2, got 1"),
    ],
)
def test_bad_arguments_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        SylvesterVAE((1, 4, 4), **SMALL | change)


@pytest.mark.parametrize("shape", [(1, 6, 4), (1, 4, 10), (4, 4), (0, 4, 4)])
def test_sizes_that_do_not_halve_twice_are_refused(shape):
    for make in (SylvesterVAE, lambda s: ConvEncoder(s, 3), lambda s: ConvDecoder(3, s)):
        with pytest.raises(ValueError, match="multiples of 4, got"):
            make(shape)


def test_bad_inputs_are_refused():
    vae = small()
    with pytest.raises(ValueError, match=r"inputs must be images \(1, 4, 4\), got \(1, 8, 8\)"):
        vae(torch.zeros(2, 1, 8, 8, dtype=torch.float64))
    with pytest.raises(InputOutsideDomain, match=r"inputs must lie in \[0, 1\], got 0 to 255"):
        vae(torch.linspace(0, 255, 32, dtype=torch.float64).view(2, 1, 4, 4))
    with pytest.raises(ValueError, match="takes no context, got one"):
        vae(levels(2, 1, 4, 4), torch.zeros(2, 3))
    with pytest.raises(ValueError, match="takes no context, got one"):
        vae.sample(2, torch.zeros(2, 3))
