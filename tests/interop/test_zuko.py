"""Our layers in zuko's flows, and zuko's layers in ours."""

from importlib.util import find_spec

import pytest
import torch
from torch import nn
from torch.autograd.functional import jacobian

from flows import ActNorm, Composite, Flow, Rotation, SplineCoupling
from flows.distributions import Normal
from flows.interop import from_zuko, to_zuko
from flows.nets import MLP

pytestmark = pytest.mark.skipif(find_spec("zuko") is None, reason="needs zuko")

FEATURES = 4
CONTEXT = 2


def our_layers(context_features: int = 0) -> list[nn.Module]:
    def net(inputs: int, outputs: int) -> MLP:
        return MLP(inputs, outputs, hidden_features=8, blocks=1, context_features=context_features)

    return [
        ActNorm(FEATURES),
        Rotation(FEATURES, init="haar"),
        SplineCoupling(FEATURES, net, bins=4),
        Composite([Rotation(FEATURES), ActNorm(FEATURES)]),
    ]


def normal_base(zuko) -> nn.Module:
    return zuko.lazy.UnconditionalDistribution(
        zuko.distributions.DiagNormal,
        torch.zeros(FEATURES),
        torch.ones(FEATURES),
        buffer=True,
    )


def initialized(module: nn.Module) -> nn.Module:
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3)
    return module


def their_layers(zuko, context: int = 0) -> list[nn.Module]:
    """Coupled, autoregressive, elementwise, and a plain permutation."""
    return [
        zuko.flows.MaskedAutoregressiveTransform(FEATURES, context, hidden_features=(8,)),
        zuko.flows.ElementWiseTransform(FEATURES, context),
        zuko.lazy.UnconditionalTransform(
            zuko.transforms.PermutationTransform, torch.tensor([2, 0, 3, 1]), buffer=True
        ),
        zuko.lazy.UnconditionalTransform(zuko.transforms.SoftclipTransform),
    ]


def test_a_zuko_flow_of_our_layers_is_the_flow_of_those_layers(zuko):
    layers = our_layers()
    theirs = zuko.lazy.Flow([to_zuko(layer) for layer in layers], normal_base(zuko))
    initialized(theirs).eval()
    ours = Flow(Composite(layers), Normal(FEATURES)).eval()
    x = torch.randn(20, FEATURES)
    torch.testing.assert_close(theirs().log_prob(x), ours(x))
    samples, log_prob = theirs().rsample_and_log_prob((20,))
    torch.testing.assert_close(ours(samples), log_prob, rtol=1e-3, atol=1e-3)


def test_a_zuko_flow_of_our_layers_has_the_density_that_autograd_finds(zuko):
    theirs = zuko.lazy.Flow([to_zuko(layer) for layer in our_layers()], normal_base(zuko))
    initialized(theirs).double().eval()
    for row in torch.randn(3, FEATURES, dtype=torch.float64):
        jac = jacobian(lambda x: theirs().transform(x), row)
        noise = theirs().transform(row)
        expected = theirs().base.log_prob(noise) + jac.slogdet()[1]
        torch.testing.assert_close(theirs().log_prob(row), expected, rtol=0, atol=1e-10)


def test_a_mixed_zuko_flow_registers_and_trains_all_parameters(zuko):
    layers = [to_zuko(layer) for layer in our_layers()] + their_layers(zuko)[:2]
    flow = zuko.lazy.Flow(layers, normal_base(zuko))
    angles = layers[1].transform.raw_angles
    assert any(parameter is angles for parameter in flow.parameters())
    x = torch.randn(200, FEATURES) @ torch.diag(torch.tensor([1.0, 0.5, 2.0, 0.1]))
    optimizer = torch.optim.Adam(flow.parameters(), lr=0.02)
    before, losses = angles.detach().clone(), []
    for _ in range(30):
        loss = -flow().log_prob(x).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.3
    assert (angles - before).abs().max() > 1e-2


def test_a_context_reaches_our_layers(zuko):
    layers = our_layers(CONTEXT)
    flow = zuko.lazy.Flow([to_zuko(layer) for layer in layers], normal_base(zuko))
    initialized(flow).eval()
    x, context = torch.randn(5, FEATURES), torch.randn(5, CONTEXT)
    noise, logabsdet = Composite(layers)(x, context)
    expected = Normal(FEATURES).log_prob(noise) + logabsdet
    torch.testing.assert_close(flow(context).log_prob(x), expected)
    # A single context for many rows, and rows of context for many samples.
    torch.testing.assert_close(flow(context[0]).log_prob(x)[0], expected[0])
    samples = flow(context).sample((7,))
    assert samples.shape == (7, 5, FEATURES)
    assert flow(context).log_prob(samples).shape == (7, 5)


@pytest.mark.parametrize("number", range(4))
def test_each_of_their_layers_keeps_the_contract_in_ours(zuko, number):
    transform = initialized(from_zuko(their_layers(zuko)[number])).double().eval()
    x = torch.randn(3, FEATURES, dtype=torch.float64)
    noise, logabsdet = transform(x)
    assert logabsdet.shape == (3,) and logabsdet.dtype == torch.float64
    for row, one in zip(x, logabsdet, strict=True):
        jac = jacobian(lambda v: transform(v[None])[0][0], row)
        torch.testing.assert_close(one, jac.slogdet()[1], rtol=0, atol=1e-10)
    back, opposite = transform.inverse(noise)
    torch.testing.assert_close(back, x, rtol=0, atol=1e-10)
    torch.testing.assert_close(opposite, -logabsdet, rtol=0, atol=1e-10)


def test_their_layers_work_and_train_in_our_flow(zuko):
    layers = [from_zuko(layer) for layer in their_layers(zuko, CONTEXT)]
    flow = Flow(Composite([Rotation(FEATURES), *layers]), Normal(FEATURES))
    x, context = 0.3 * torch.randn(100, FEATURES), torch.randn(100, CONTEXT)
    optimizer = torch.optim.Adam(flow.parameters(), lr=0.02)
    losses = []
    for _ in range(30):
        loss = -flow(x, context).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.3
    assert flow.sample(2, context).shape == (100, 2, FEATURES)
