"""Our layers in normflows' flows, and normflows' layers in ours."""

import pytest
import torch
from nflows.transforms import InverseTransform
from torch import nn
from torch.autograd.functional import jacobian

from flows import ActNorm, Composite, Flow, Rotation, SplineCoupling
from flows.distributions import Normal
from flows.interop import from_normflows, to_normflows
from flows.nets import MLP

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.lu is deprecated.*:UserWarning")
normflows = pytest.importorskip("normflows")

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


def their_layers() -> list[nn.Module]:
    """Log-dets of theirs are (batch,), one number, or float32 zeros."""
    net = normflows.nets.MLP([FEATURES // 2, 8, FEATURES], init_zeros=False)
    return [
        normflows.flows.AffineCouplingBlock(net),
        normflows.flows.ActNorm(FEATURES),
        normflows.flows.Permute(FEATURES),
        normflows.flows.AutoregressiveRationalQuadraticSpline(FEATURES, 1, 8, num_bins=4),
        normflows.flows.LULinearPermute(FEATURES),
    ]


def initialized(module: nn.Module) -> nn.Module:
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3)
    return module


def test_a_normflows_flow_of_our_layers_has_the_density_that_autograd_finds():
    layers = [to_normflows(layer) for layer in our_layers()]
    base = normflows.distributions.DiagGaussian(FEATURES, trainable=False)
    flow = initialized(normflows.NormalizingFlow(base, layers)).double().eval()
    for row in torch.randn(3, FEATURES, dtype=torch.float64):
        noise = flow.inverse(row[None])
        jac = jacobian(lambda x: flow.inverse(x[None])[0], row)
        expected = base.log_prob(noise)[0] + jac.slogdet()[1]
        torch.testing.assert_close(flow.log_prob(row[None])[0], expected, rtol=0, atol=1e-10)


def test_a_normflows_flow_of_our_layers_is_the_flow_of_those_layers():
    layers = our_layers()
    base = normflows.distributions.DiagGaussian(FEATURES, trainable=False)
    theirs = initialized(normflows.NormalizingFlow(base, [to_normflows(t) for t in layers])).eval()
    # Theirs lists layers from noise to data.
    ours = Flow(Composite(reversed(layers)), Normal(FEATURES)).eval()
    x = torch.randn(20, FEATURES)
    torch.testing.assert_close(theirs.log_prob(x), ours.log_prob(x))
    samples, log_prob = theirs.sample(20)
    torch.testing.assert_close(ours.log_prob(samples), log_prob, rtol=1e-3, atol=1e-3)


def test_a_mixed_normflows_flow_trains():
    layers = [to_normflows(layer) for layer in our_layers()] + their_layers()
    base = normflows.distributions.DiagGaussian(FEATURES)
    flow = normflows.NormalizingFlow(base, layers)
    x = torch.randn(200, FEATURES) @ torch.diag(torch.tensor([1.0, 0.5, 2.0, 0.1]))
    optimizer = torch.optim.Adam(flow.parameters(), lr=0.02)
    angles = flow.flows[1].layer.raw_angles
    before, losses = angles.detach().clone(), []
    for _ in range(30):
        loss = flow.forward_kld(x)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1
    assert (angles - before).abs().max() > 1e-2


def test_a_context_reaches_our_layers():
    base = normflows.distributions.base.ConditionalDiagGaussian(
        FEATURES, nn.Linear(CONTEXT, 2 * FEATURES)
    )
    layers = [to_normflows(layer) for layer in our_layers(CONTEXT)]
    flow = initialized(normflows.ConditionalNormalizingFlow(base, layers)).eval()
    x, context = torch.randn(5, FEATURES), torch.randn(5, CONTEXT)
    noise, logabsdet = x, torch.zeros(5)
    for layer in reversed(layers):
        noise, change = layer.layer(noise, context)
        logabsdet = logabsdet + change
    expected = base.log_prob(noise, context=context) + logabsdet
    torch.testing.assert_close(flow.log_prob(x, context=context), expected)
    assert not torch.equal(flow.log_prob(x, context=context + 1), expected)
    samples, log_prob = flow.sample(5, context=context)
    torch.testing.assert_close(
        flow.log_prob(samples, context=context), log_prob, rtol=1e-3, atol=1e-3
    )


@pytest.mark.parametrize("number", range(len(their_layers())))
def test_each_of_their_layers_keeps_the_contract_in_ours(number):
    transform = initialized(from_normflows(their_layers()[number])).double().eval()
    x = torch.randn(3, FEATURES, dtype=torch.float64)
    noise, logabsdet = transform(x)
    assert logabsdet.shape == (3,) and logabsdet.dtype == torch.float64
    assert logabsdet.is_contiguous()
    for row, one in zip(x, logabsdet, strict=True):
        jac = jacobian(lambda v: transform(v[None])[0][0], row)
        torch.testing.assert_close(one, jac.slogdet()[1], rtol=0, atol=1e-6)
    back, opposite = transform.inverse(noise)
    torch.testing.assert_close(back, x, rtol=0, atol=1e-6)
    torch.testing.assert_close(opposite, -logabsdet, rtol=0, atol=1e-6)


def test_their_layers_work_and_train_in_our_flow():
    layers = [from_normflows(layer) for layer in their_layers()]
    flow = Flow(Composite([Rotation(FEATURES), *layers]), Normal(FEATURES))
    x = torch.randn(100, FEATURES) * 0.3
    optimizer = torch.optim.Adam(flow.parameters(), lr=0.02)
    losses = []
    for _ in range(30):
        loss = -flow(x).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.3


def test_the_adapter_is_the_inverse_transform_for_nflows_layers():
    layer = initialized(
        SplineCoupling(FEATURES, lambda i, o: MLP(i, o, hidden_features=4), bins=4)
    )
    x = torch.randn(3, FEATURES)
    for mine, theirs in zip(to_normflows(layer)(x), InverseTransform(layer)(x), strict=True):
        assert torch.equal(mine, theirs)


def test_a_log_det_of_another_shape_is_refused():
    class Column(nn.Module):
        def inverse(self, x):
            return x, x.new_zeros(len(x), 1)

    with pytest.raises(ValueError, match=r"log_det must be one number or \(4,\), got \(4, 1\)"):
        from_normflows(Column())(torch.ones(4, 2))
