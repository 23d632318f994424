"""Flow: densities and samples, with our distributions and nflows'."""

import math

import pytest
import torch
from nflows.distributions import ConditionalDiagonalNormal, StandardNormal
from torch import nn
from torch.distributions import MultivariateNormal

from flows import Flow
from flows.distributions import Normal
from flows.nets import MLP
from flows.recipes import RotationSplineFlow
from flows.transforms import ActNorm, AffineCoupling, Composite, Rotation

FEATURES, CONTEXT = 3, 2


def randomized(flow: Flow, std: float = 0.3) -> Flow:
    for parameter in flow.parameters():
        nn.init.normal_(parameter, std=std)
    return flow.eval()


def conditional_flow(embedding_net: nn.Module | None = None) -> Flow:
    def net(kept: int, parameters: int) -> MLP:
        return MLP(kept, parameters, hidden_features=8, context_features=CONTEXT)

    chain = Composite([AffineCoupling(FEATURES, net), AffineCoupling(FEATURES, net, flip=True)])
    return randomized(Flow(chain, Normal(FEATURES), embedding_net))


def test_log_prob_worked_out_by_hand():
    layer = ActNorm(2)
    layer.log_scale.data = torch.tensor([math.log(2.0), math.log(0.5)])
    layer.shift.data = torch.tensor([1.0, -1.0])
    # z = (2 x + 1, x / 2 - 1), so x is normal with mean (-1/2, 2) and variance (1/4, 4).
    expected = MultivariateNormal(torch.tensor([-0.5, 2.0]), torch.tensor([0.25, 4.0]).diag())
    x = torch.randn(20, 2)
    flow = Flow(layer, Normal(2)).eval()
    torch.testing.assert_close(flow.log_prob(x), expected.log_prob(x))
    samples, log_prob = flow.sample_and_log_prob(5000)
    torch.testing.assert_close(log_prob, expected.log_prob(samples))
    assert (samples.mean(0) - expected.mean).abs().max() < 0.1
    assert (samples.std(0) - expected.stddev).abs().max() < 0.1


def test_calling_the_flow_is_log_prob():
    flow, x, context = conditional_flow(), torch.randn(4, FEATURES), torch.randn(4, CONTEXT)
    assert torch.equal(flow(x, context), flow.log_prob(x, context))


def test_noise_of_the_samples_is_the_noise():
    flow, context = conditional_flow(), torch.randn(4, CONTEXT)
    x = torch.randn(4, FEATURES)
    z = flow.transform_to_noise(x, context)
    torch.testing.assert_close(flow.transform.inverse(z, context)[0], x, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("num_samples", [0, 1, 5])
def test_samples_without_context(num_samples):
    flow = randomized(RotationSplineFlow(FEATURES, layers=2, hidden_features=4))
    assert flow.sample(num_samples).shape == (num_samples, FEATURES)
    samples, log_prob = flow.sample_and_log_prob(num_samples)
    assert samples.shape == (num_samples, FEATURES) and log_prob.shape == (num_samples,)
    torch.testing.assert_close(log_prob, flow.log_prob(samples), atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("num_samples", [0, 1, 5])
@pytest.mark.parametrize("rows", [0, 1, 4])
def test_samples_with_context(num_samples, rows):
    flow, context = conditional_flow(), torch.randn(rows, CONTEXT)
    assert flow.sample(num_samples, context).shape == (rows, num_samples, FEATURES)
    samples, log_prob = flow.sample_and_log_prob(num_samples, context)
    assert samples.shape == (rows, num_samples, FEATURES)
    assert log_prob.shape == (rows, num_samples)
    for row in range(rows):  # every sample belongs to the context of its row
        repeated = context[row].expand(num_samples, -1)
        expected = flow.log_prob(samples[row], repeated)
        torch.testing.assert_close(log_prob[row], expected, atol=1e-4, rtol=1e-4)


def test_the_same_seed_gives_the_same_samples():
    flow, context = conditional_flow(), torch.randn(4, CONTEXT)
    torch.manual_seed(3)
    samples = flow.sample(5, context)
    torch.manual_seed(3)
    assert torch.equal(flow.sample_and_log_prob(5, context)[0], samples)
    assert not torch.equal(flow.sample(5, context), samples)


def test_temperature_scales_the_noise():
    flow, context = conditional_flow(), torch.randn(4, CONTEXT)
    coldest = flow.sample(3, context, temperature=0.0)
    centre, _ = flow.transform.inverse(torch.zeros(4, FEATURES), context)
    torch.testing.assert_close(coldest, centre[:, None].expand(4, 3, FEATURES))
    torch.manual_seed(3)
    z = flow.transform_to_noise(flow.sample(1000, context)[0], context[:1].expand(1000, -1))
    torch.manual_seed(3)
    cool, log_prob = flow.sample_and_log_prob(1000, context, temperature=0.5)
    context = context[:1].expand(1000, -1)
    cool_z = flow.transform_to_noise(cool[0], context)
    torch.testing.assert_close(cool_z, 0.5 * z, atol=1e-4, rtol=1e-4)
    # The density stays that of the flow.
    torch.testing.assert_close(log_prob[0], flow.log_prob(cool[0], context), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("num_samples", "temperature"), [(-1, 1.0), (2, -0.1), (2, math.nan)])
def test_negative_numbers_are_refused(num_samples, temperature):
    flow = Flow(Rotation(2), Normal(2))
    for draw in (flow.sample, flow.sample_and_log_prob):
        with pytest.raises(ValueError, match="^[a-z_]+ must be at least 0, got "):
            draw(num_samples, temperature=temperature)


@pytest.mark.parametrize("rows", [0, 1, 3, 5])
def test_context_needs_a_row_per_input(rows):
    with pytest.raises(ValueError, match=f"^context must have a row per input, got {rows} for 4"):
        conditional_flow()(torch.randn(4, FEATURES), torch.randn(rows, CONTEXT))


def test_float64_flows_give_float64():
    flow = conditional_flow().double()
    context = torch.randn(4, CONTEXT, dtype=torch.float64)
    results = flow.sample(2, context), *flow.sample_and_log_prob(2, context, temperature=0.7)
    assert [result.dtype for result in results] == 3 * [torch.float64]
    assert flow(torch.randn(4, FEATURES).double(), context).dtype == torch.float64


def test_distributions_of_nflows_work():
    transform = Composite([ActNorm(2), Rotation(2, init="haar")])
    ours, theirs = Flow(transform, Normal(2)).eval(), Flow(transform, StandardNormal([2])).eval()
    x = torch.randn(5, 2)
    torch.testing.assert_close(theirs.log_prob(x), ours.log_prob(x))
    torch.manual_seed(3)
    expected = ours.sample_and_log_prob(4)
    torch.manual_seed(3)
    torch.testing.assert_close(theirs.sample_and_log_prob(4), expected)


def test_conditional_distributions_of_nflows_work():
    base = ConditionalDiagonalNormal([2], context_encoder=nn.Linear(CONTEXT, 4))
    flow, context = Flow(Rotation(2, init="haar"), base), torch.randn(3, CONTEXT)
    x = torch.randn(3, 2)
    z, _ = flow.transform(x)
    torch.testing.assert_close(flow.log_prob(x, context), base.log_prob(z, context))
    samples, log_prob = flow.sample_and_log_prob(5, context)
    assert samples.shape == (3, 5, 2)
    expected = flow.log_prob(samples[1], context[1].expand(5, -1))
    torch.testing.assert_close(log_prob[1], expected)


def test_samples_belong_to_the_context_of_their_row():
    # The context is mean and log deviation of the noise, here next to nothing.
    means = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
    context = torch.cat([means, torch.full((3, 2), -20.0)], dim=1)
    samples = Flow(Rotation(2), ConditionalDiagonalNormal([2])).sample(4, context)
    torch.testing.assert_close(samples, means[:, None].expand(3, 4, 2))


def test_context_passes_the_embedding_net_first():
    embedding = nn.Linear(6, CONTEXT)
    flow, x, raw = conditional_flow(embedding), torch.randn(4, FEATURES), torch.randn(4, 6)
    plain = Flow(flow.transform, flow.distribution)
    torch.testing.assert_close(flow(x, raw), plain(x, embedding(raw)))
    torch.testing.assert_close(
        flow.transform_to_noise(x, raw), plain.transform_to_noise(x, embedding(raw))
    )
    torch.manual_seed(3)
    expected = plain.sample_and_log_prob(5, embedding(raw))
    torch.manual_seed(3)
    torch.testing.assert_close(flow.sample_and_log_prob(5, raw), expected)
    flow(x, raw).sum().backward()
    assert (embedding.weight.grad != 0).any()


@pytest.mark.parametrize(("knots", "steps"), [(0, 320), (32, 960)])  # as fine as the density
@pytest.mark.parametrize("context_features", [0, 2])
def test_density_integrates_to_one(context_features, knots, steps):
    flow = RotationSplineFlow(
        2, layers=3, hidden_features=8, context_features=context_features, bins=5, knots=knots
    )
    flow = randomized(flow, std=0.2).double()
    extent = 8.0
    middles = extent * (2 * (torch.arange(steps, dtype=torch.float64) + 0.5) / steps - 1)
    points = torch.cartesian_prod(middles, middles)
    context = None
    if context_features:
        context = torch.randn(1, context_features, dtype=torch.float64).expand(len(points), -1)
    with torch.no_grad():
        log_prob, (_, logabsdet) = flow(points, context), flow.transform(points, context)
    assert abs(log_prob.exp().sum().item() * (2 * extent / steps) ** 2 - 1) < 1e-4
    assert logabsdet.std() > 0.1  # volumes do change
