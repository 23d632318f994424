"""Our layers in nflows' flows, and nflows' layers in ours."""

import nflows.flows
import nflows.nn.nets
import pytest
import torch
from nflows.distributions import StandardNormal
from nflows.transforms import (
    AffineCouplingTransform,
    CompositeTransform,
    PiecewiseRationalQuadraticCouplingTransform,
    RandomPermutation,
)
from torch import Tensor, nn
from torch.autograd.functional import jacobian

from flows import ActNorm, Composite, Flow, Rotation, SplineCoupling, SVDLinear
from flows.distributions import Normal
from flows.nets import MLP

FEATURES = 4


def their_net(inputs: int, outputs: int) -> nn.Module:
    return nflows.nn.nets.ResidualNet(inputs, outputs, hidden_features=8, num_blocks=1)


def our_net(inputs: int, outputs: int) -> MLP:
    return MLP(inputs, outputs, hidden_features=8, blocks=1)


def mixed_layers() -> list:
    """Ours and theirs by turns, away from the identity."""
    mask = torch.tensor([1, -1, 1, -1])
    layers = [
        ActNorm(FEATURES),
        Rotation(FEATURES, init="haar"),
        AffineCouplingTransform(mask, their_net),
        SplineCoupling(FEATURES, our_net, bins=4),
        RandomPermutation(FEATURES),
        SVDLinear(FEATURES),
        PiecewiseRationalQuadraticCouplingTransform(
            mask, their_net, num_bins=4, tails="linear", tail_bound=3.0
        ),
        Rotation(FEATURES),
    ]
    for layer in layers:
        for parameter in layer.parameters():
            nn.init.normal_(parameter, std=0.3)
    return layers


def their_flow() -> nn.Module:
    return nflows.flows.Flow(CompositeTransform(mixed_layers()), StandardNormal([FEATURES]))


def our_flow() -> nn.Module:
    return Flow(Composite(mixed_layers()), Normal(FEATURES))


def by_autograd(transform: nn.Module, row: Tensor) -> Tensor:
    """log p of one row by the determinant of the whole Jacobian."""
    noise = transform(row[None])[0][0]
    jac = jacobian(lambda x: transform(x[None])[0][0], row)
    return torch.distributions.Normal(0.0, 1.0).log_prob(noise).sum() + jac.slogdet()[1]


@pytest.mark.parametrize("make", [their_flow, our_flow])
def test_a_mixed_flow_has_the_density_that_autograd_finds(make):
    flow = make().double().eval()
    x = torch.randn(5, FEATURES, dtype=torch.float64)
    expected = torch.stack(
        [by_autograd(flow._transform if make is their_flow else flow.transform, row) for row in x]
    )
    torch.testing.assert_close(flow.log_prob(x), expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("make", [their_flow, our_flow])
def test_a_mixed_flow_samples_what_it_can_score(make):
    flow = make().eval()
    samples, log_prob = flow.sample_and_log_prob(50)
    torch.testing.assert_close(flow.log_prob(samples), log_prob, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("make", [their_flow, our_flow])
def test_a_mixed_flow_trains(make):
    flow = make()
    x = torch.randn(200, FEATURES) @ torch.diag(torch.tensor([1.0, 0.5, 2.0, 0.1]))
    optimizer = torch.optim.Adam(flow.parameters(), lr=0.02)
    losses = []
    for _ in range(30):
        loss = -flow.log_prob(x).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert all(parameter.grad is not None for parameter in flow.parameters())
    assert losses[-1] < losses[0] - 0.5
    rotation = next(m for m in flow.modules() if isinstance(m, Rotation))
    w = rotation.matrix()
    torch.testing.assert_close(w @ w.mT, torch.eye(FEATURES), rtol=0, atol=1e-5)
