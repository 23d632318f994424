"""bits_per_dim: known answers. Bounds of log Z: against their definitions and a known Z."""

import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from flows import (
    AffineCoupling,
    Composite,
    Flow,
    Logit,
    Rotation,
    bits_per_dim,
    effective_sample_size,
    elbo,
    importance_sample,
    iwae,
    selbo,
    siwae,
)
from flows.distributions import DiagonalNormal, GaussianMixture, Normal
from flows.nets import MLP, OneHot
from flows.recipes import SylvesterVAE

BOUNDS = {"elbo": elbo, "iwae": iwae, "selbo": selbo, "siwae": siwae}
each_bound = pytest.mark.parametrize("bound", BOUNDS.values(), ids=BOUNDS)
CONTEXT = 3
NET = partial(MLP, hidden_features=4, blocks=1, context_features=CONTEXT)


@pytest.mark.parametrize("bits", [1, 5, 8, math.log2(17)])
@pytest.mark.parametrize("dims", [1, 784])
def test_uniform_density_needs_exactly_n_bits(bits, dims):
    assert torch.equal(bits_per_dim(torch.zeros(3), dims, bits=bits), torch.full((3,), bits))


def test_nice_on_mnist():
    assert round(bits_per_dim(1980.50, 784).item(), 2) == 4.36


def test_eight_bits_by_default():
    assert bits_per_dim(0.0, 3).item() == 8


def test_uniform_code_of_the_digits():
    # The densities of 17 levels, one of them certain in every pixel: nothing is left to say.
    certain = torch.tensor(64 * math.log(17), dtype=torch.float64)
    bits = bits_per_dim(certain, 64, bits=math.log2(17))
    torch.testing.assert_close(bits, torch.tensor(0.0, dtype=torch.float64), atol=1e-12, rtol=0)


def test_keeps_shape_dtype_and_gradient():
    log_prob = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    bits = bits_per_dim(log_prob, 10)
    assert bits.shape == (2, 3) and bits.dtype == torch.float64
    bits.sum().backward()
    expected = torch.full((2, 3), -1 / (10 * math.log(2)), dtype=torch.float64)
    torch.testing.assert_close(log_prob.grad, expected)


def test_equals_the_published_formula_for_logits():
    # flow_libraries.md 5, after MAF: with y = logit(a + (1 - 2a) u), u in [0, 1] of 8 bits,
    # -log q(y) / (D ln 2) - log2(1 - 2a) + 8 + mean of log2 sigmoid(y) + log2(1 - sigmoid(y)).
    a, dims = 0.05, 6
    u = torch.rand(20, dims, dtype=torch.float64)
    normal = Normal(dims)
    bits = bits_per_dim(Flow(Composite([Logit(a)]), normal).log_prob(u), dims)
    y = torch.logit(a + (1 - 2 * a) * u)
    log_sigmoids = (y.sigmoid().log2() + (1 - y.sigmoid()).log2()).mean(1)
    nats = normal.log_prob(y)
    expected = -nats / (dims * math.log(2)) - math.log2(1 - 2 * a) + 8 + log_sigmoids
    torch.testing.assert_close(bits, expected)


def test_nan_is_refused():
    with pytest.raises(ValueError, match=r"^log_prob holds 2 NaN\.$"):
        bits_per_dim(torch.tensor([1.0, math.nan, math.nan]), 4)


@pytest.mark.parametrize(("dims", "bits"), [(0, 8), (-1, 8), (4, 0), (4, -1), (4, math.nan)])
def test_bad_arguments_are_refused(dims, bits):
    with pytest.raises(ValueError, match="^dims and bits must be positive, got "):
        bits_per_dim(0.0, dims, bits=bits)


def flow_over(base: nn.Module, *, features: int = 2, conditional: bool = False) -> Flow:
    """A flow in float64 whose parameters are anything."""
    net = NET if conditional else partial(MLP, hidden_features=4, blocks=1)
    transform = Composite([Rotation(features), AffineCoupling(features, net)])
    flow = Flow(transform, base).double()
    for parameter in flow.parameters():
        nn.init.normal_(parameter, std=0.4)
    return flow


def log_target(x: Tensor) -> Tensor:
    """Two bumps, whose integral is that of LOG_Z."""
    left = -(x - 1.0).square().sum(1) / 2
    right = -(x + 1.0).square().sum(1) / (2 * 0.7**2)
    return torch.stack((left, right + math.log(3))).logsumexp(0)


# The integrals of the bumps in d dimensions are (2 pi)^(d/2) s^d.
LOG_Z = math.log(2 * math.pi * (1 + 3 * 0.7**2))


def within(values: Tensor, expected: float, errors: float = 3.0) -> bool:
    """Is the mean of independent values the expected one, up to so many standard errors?"""
    return abs(values.mean().item() - expected) < errors * values.std().item() / len(values) ** 0.5


def by_hand(flow: Flow, num_samples: int) -> tuple[Tensor, Tensor, Tensor]:
    """Weights, log p - log q (T, K) and draws made here; q by a pass from data to noise."""
    base = flow.distribution
    noise = torch.randn(num_samples, base.components, *base.shape, dtype=torch.float64)
    scales = 1e-3 + softplus(base.raw_scales)
    points = torch.cat([flow.transform.inverse(base.means + scales * e)[0] for e in noise])
    alpha = base.logits.exp() / base.logits.exp().sum()
    ratios = (log_target(points) - flow.log_prob(points)).view(num_samples, -1)
    return alpha, ratios, points


@pytest.mark.parametrize("features", [2, 5])
@pytest.mark.parametrize("components, num_samples", [(1, 1), (3, 1), (1, 4), (3, 5)])
def test_stratified_bounds_and_gradients_are_those_by_hand(components, num_samples, features):
    flow = flow_over(GaussianMixture(features, components), features=features)
    parameters = list(flow.parameters())
    for bound in (selbo, siwae):
        torch.manual_seed(1)
        value = bound(log_target, flow, num_samples)
        torch.manual_seed(1)
        alpha, ratios, _ = by_hand(flow, num_samples)
        if bound is selbo:
            expected = sum(a * r for a, r in zip(alpha, ratios.mean(0), strict=True))
        else:
            expected = ((alpha * ratios.exp()).sum() / num_samples).log()
        assert value.shape == ()
        torch.testing.assert_close(value, expected)
        gradients, exact = (torch.autograd.grad(v, parameters) for v in (value, expected))
        torch.testing.assert_close(gradients, exact)


def test_importance_samples_are_those_by_hand():
    flow = flow_over(GaussianMixture(2, 3))
    torch.manual_seed(1)
    samples, log_weights = importance_sample(log_target, flow, 4)
    torch.manual_seed(1)
    alpha, ratios, points = by_hand(flow, 4)
    torch.testing.assert_close(samples, points.detach())
    torch.testing.assert_close(log_weights.exp(), (alpha * ratios.exp()).flatten().detach() / 4)
    assert not samples.requires_grad and not log_weights.requires_grad


@pytest.mark.parametrize("num_samples", [1, 6])
def test_siwae_with_one_component_is_iwae(num_samples):
    mixture, normal = GaussianMixture(2, 1), DiagonalNormal(2)
    flow = flow_over(mixture)
    alone = Flow(flow.transform, normal).double()
    with torch.no_grad():
        normal.mean.copy_(mixture.means[0])
        normal.raw_scale.copy_(mixture.raw_scales[0])
    values = []
    for bound, of in ((siwae, flow), (siwae, alone), (iwae, alone)):
        torch.manual_seed(2)
        values.append(bound(log_target, of, num_samples, repeats=5))
    torch.testing.assert_close(values[0], values[2])
    assert torch.equal(values[1], values[2])
    torch.manual_seed(2)
    mean = elbo(log_target, alone, num_samples, repeats=5)
    torch.manual_seed(2)
    torch.testing.assert_close(selbo(log_target, flow, num_samples, repeats=5), mean)


def test_one_draw_of_iwae_is_the_elbo():
    flow, values = flow_over(GaussianMixture(2, 3)), []
    for bound in (elbo, iwae):
        torch.manual_seed(3)
        values.append(bound(log_target, flow, 1, repeats=4))
    torch.testing.assert_close(*values)


@pytest.mark.parametrize("component", [0, 2])
def test_one_hot_weights_leave_one_component(component):
    mixture, normal = GaussianMixture(2, 3), DiagonalNormal(2)
    flow = flow_over(mixture)
    alone = Flow(flow.transform, normal).double()
    with torch.no_grad():
        mixture.logits.fill_(-1e3)[component] = 0
        normal.mean.copy_(mixture.means[component])
        normal.raw_scale.copy_(mixture.raw_scales[component])
    torch.manual_seed(4)
    points = mixture.rsample_stratified(6)[0][:, component]
    x = flow.transform.inverse(points)[0]
    ratios = log_target(x) - alone.log_prob(x)
    torch.manual_seed(4)
    torch.testing.assert_close(siwae(log_target, flow, 6), ratios.exp().mean().log())
    torch.manual_seed(4)
    torch.testing.assert_close(selbo(log_target, flow, 6), ratios.mean())


@pytest.fixture(scope="module")
def estimates() -> dict[str, Tensor]:
    """Many of each bound for one flow, which is far from the target."""
    torch.manual_seed(5)
    flow = flow_over(GaussianMixture(2, 4))
    with torch.no_grad():
        found = {
            name: bound(log_target, flow, 1, repeats=20_000) for name, bound in BOUNDS.items()
        }
        found["siwae, T = 8"] = siwae(log_target, flow, 8, repeats=5_000)
        found["iwae, T = 4"] = iwae(log_target, flow, 4, repeats=20_000)
    return found


@pytest.mark.parametrize(
    "lower, upper", [("selbo", "siwae"), ("siwae", "siwae, T = 8"), ("elbo", "iwae, T = 4")]
)
def test_bounds_are_in_order_on_average(estimates, lower, upper):
    lower, upper = estimates[lower], estimates[upper]
    error = (lower.var() / len(lower) + upper.var() / len(upper)).sqrt()
    assert upper.mean() - lower.mean() > 3 * error
    assert upper.mean() < LOG_Z - 3 * upper.std() / len(upper) ** 0.5


def test_strata_do_not_bias_the_evidence_lower_bound(estimates):
    plain, stratified = estimates["elbo"], estimates["selbo"]
    error = (plain.var() / len(plain) + stratified.var() / len(stratified)).sqrt()
    assert (plain.mean() - stratified.mean()).abs() < 3 * error
    assert stratified.var() < plain.var() / 2


@pytest.mark.parametrize("base", [lambda: GaussianMixture(2, 3), lambda: DiagonalNormal(2)])
def test_the_sum_of_importance_weights_estimates_z(base):
    # A flow wider than the target has weights of finite variance.
    flow = flow_over(base())
    with torch.no_grad():
        for name, parameter in flow.named_parameters():
            parameter.fill_(2.0) if "raw_scale" in name else None
    draws = [importance_sample(log_target, flow, 100) for _ in range(200)]
    sums = torch.stack([log_weights.logsumexp(0).exp() for _, log_weights in draws])
    assert within(sums, math.exp(LOG_Z))
    # The mean of x_0 under the target is that of its two bumps, of masses 1 and 3 * 0.7^2.
    share = 1 / (1 + 3 * 0.7**2)
    moments = torch.stack([(log_weights.exp() * x[:, 0]).sum() for x, log_weights in draws])
    assert within(moments, math.exp(LOG_Z) * (2 * share - 1))


class Shifted:
    """A one-dimensional mixture without any transform, of which integrals are simple sums."""

    def __init__(self) -> None:
        self.flow = Flow(Composite([]), GaussianMixture(1, 2)).double()
        self.base = self.flow.distribution
        with torch.no_grad():
            self.base.means.copy_(torch.tensor([[-1.0], [2.0]]))
            self.base.logits.copy_(torch.tensor([0.3, -0.2]))

    @staticmethod
    def log_target(x: Tensor) -> Tensor:
        return -x[:, 0].square() / 4 + x[:, 0].sin()

    def exact_elbo(self) -> Tensor:
        x = torch.linspace(-15, 15, 3001, dtype=torch.float64).unsqueeze(1)
        log_q = self.flow.log_prob(x)
        return (log_q.exp() * (self.log_target(x) - log_q)).sum() * 0.01


def mean_gradient(case: Shifted, bound: Callable, parameter: nn.Parameter) -> Tensor:
    """Gradients of 400 means over 50 estimates, (400, *shape)."""
    return torch.stack(
        [
            torch.autograd.grad(
                bound(case.log_target, case.flow, 1, repeats=50).mean(), parameter
            )[0]
            for _ in range(400)
        ]
    )


def test_gradients_of_the_stratified_lower_bound_are_unbiased():
    case = Shifted()
    for parameter in case.base.parameters():
        (exact,) = torch.autograd.grad(case.exact_elbo(), parameter)
        gradients = mean_gradient(case, selbo, parameter).flatten(1)
        for found, expected in zip(gradients.T, exact.flatten().tolist(), strict=True):
            assert within(found, expected, 3.5)


def test_weights_get_no_gradient_from_plain_draws():
    case = Shifted()
    (exact,) = torch.autograd.grad(case.exact_elbo(), case.base.logits)
    gradients = mean_gradient(case, elbo, case.base.logits)
    assert exact.abs().min() > 0.1
    assert within(gradients[:, 0], 0.0) and within(gradients[:, 1], 0.0)


def mixtures(distance: float, weights: Tensor) -> tuple[Flow, GaussianMixture]:
    """Two alike, but for the weights of the second; the flow's are equal."""
    base, target = GaussianMixture(2, 3).double(), GaussianMixture(2, 3).double()
    means = torch.tensor([(-1.0, 0.0), (0.0, 1.0), (1.0, 0.0)], dtype=torch.float64)
    with torch.no_grad():
        base.means.copy_(distance * means)
        target.load_state_dict(base.state_dict())
        target.logits.copy_(weights.log())
    return Flow(Composite([]), base), target


WEIGHTS = torch.tensor([0.1, 0.3, 0.6], dtype=torch.float64)


@pytest.mark.parametrize("bound, distance", [(selbo, 4.0), (selbo, 1.0), (siwae, 0.6)])
def test_weights_learn_those_of_the_target(bound, distance):
    flow, target = mixtures(distance, WEIGHTS)
    logits = flow.distribution.logits
    optimizer = torch.optim.Adam([logits], lr=0.05)
    for _ in range(200):
        optimizer.zero_grad()
        (-bound(target.log_prob, flow, 1, repeats=256).mean()).backward()
        optimizer.step()
    torch.testing.assert_close(logits.softmax(0).detach(), WEIGHTS, atol=0.03, rtol=0)


def test_weights_of_components_apart_cancel_from_siwae():
    flow, target = mixtures(30.0, WEIGHTS)
    logits = flow.distribution.logits
    for bound, least, most in ((siwae, 0.0, 1e-12), (selbo, 0.1, 1.0)):
        values = bound(target.log_prob, flow, 1, repeats=200)
        (gradient,) = torch.autograd.grad(values.mean(), logits)
        assert least <= gradient.abs().max() < most
        if bound is siwae:
            torch.testing.assert_close(values, torch.zeros_like(values))


@pytest.mark.parametrize(
    "base",
    [
        lambda: DiagonalNormal(2, net=NET),
        lambda: GaussianMixture(2, 3, net=NET),
        lambda: GaussianMixture(2, 3),
        lambda: Normal(2),
    ],
)
@each_bound
def test_every_row_of_context_has_its_own_bound(bound, base):
    # Where p is c q, every ratio is c, and so is every bound: here c belongs to the row.
    flow = flow_over(base(), conditional=True)
    context = torch.randn(5, CONTEXT, dtype=torch.float64)

    def target(x: Tensor, given: Tensor) -> Tensor:
        return flow.log_prob(x, given) + given.sum(1)

    torch.testing.assert_close(bound(target, flow, 4, context=context), context.sum(1))
    assert bound(target, flow, 4, context=context[:0]).shape == (0,)
    samples, log_weights = importance_sample(target, flow, 4, context=context)
    components = getattr(flow.distribution, "components", 1)
    assert samples.shape == (5, 4 * components, 2)
    torch.testing.assert_close(log_weights.logsumexp(1), context.sum(1))


def test_labels_are_a_context():
    net = partial(MLP, hidden_features=4, blocks=0, context_features=3)
    flow = Flow(AffineCoupling(2, net), GaussianMixture(2, 2, net=net), OneHot(3)).double()
    labels = torch.tensor([2, 0, 1, 1])

    def target(x: Tensor, label: Tensor) -> Tensor:
        return flow.log_prob(x, label) + label

    torch.testing.assert_close(siwae(target, flow, 3, context=labels), labels.double())


@each_bound
def test_shapes_and_dtypes(bound):
    flow = flow_over(GaussianMixture((2,), 3)).float()
    assert bound(log_target, flow, 2).shape == ()
    assert bound(log_target, flow, 2, repeats=7).shape == (7,)
    assert bound(log_target, flow, 2, repeats=0).shape == (0,)
    assert bound(log_target, flow, 1).dtype == torch.float32
    assert bound(lambda x: log_target(x).double(), flow, 1).dtype == torch.float64


def test_images_have_bounds():
    base = GaussianMixture((1, 4, 4), 2)
    flow = Flow(Composite([Logit()]), base).double()
    value = siwae(lambda x: -x.flatten(1).sum(1), flow, 3)
    assert value.isfinite() and importance_sample(lambda x: x.sum((1, 2, 3)), flow, 3)[
        0
    ].shape == (6, 1, 4, 4)


def half(x: Tensor) -> Tensor:
    """The target where x_0 > 0, nothing elsewhere."""
    return log_target(x).masked_fill(x[:, 0] <= 0, -math.inf)


def test_draws_where_the_target_is_zero_weigh_nothing():
    flow = flow_over(GaussianMixture(2, 3))
    for bound in (iwae, siwae):
        torch.manual_seed(6)
        value = bound(half, flow, 50)
        torch.manual_seed(6)
        expected = bound(lambda x: log_target(x) - 1e4 * (x[:, 0] <= 0), flow, 50)
        torch.testing.assert_close(value, expected)
        for gradient in torch.autograd.grad(value, list(flow.parameters())):
            assert gradient.isfinite().all()
    assert elbo(half, flow, 50).item() == selbo(half, flow, 50).item() == -math.inf
    assert siwae(lambda x: x[:, 0].fill_(-math.inf), flow, 5).item() == -math.inf


@each_bound
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_target_that_is_no_number_is_refused(bound, value):
    flow = flow_over(GaussianMixture(2, 3))
    message = (
        rf"^log_target must be finite or -inf, got {value} and the like for \d+ of \d+ samples\.$"
    )
    with pytest.raises(FloatingPointError, match=message):
        bound(lambda x: log_target(x).masked_fill(x[:, 0] <= 0, value), flow, 50)
    with torch.no_grad():
        flow.distribution.means.fill_(math.nan)
    with pytest.raises(FloatingPointError, match="where samples of the flow are not finite"):
        bound(log_target, flow, 2)


@each_bound
def test_bad_arguments_of_bounds_are_refused(bound):
    flow, context = flow_over(Normal(2)), torch.zeros(2, 3)
    with pytest.raises(ValueError, match="^flow must be a Flow, got SylvesterVAE"):
        bound(log_target, SylvesterVAE((1, 8, 8), grey_levels=17), 2)
    with pytest.raises(ValueError, match="^num_samples must be at least 1, got 0"):
        bound(log_target, flow, 0)
    with pytest.raises(ValueError, match="^repeats must be at least 0, got -1"):
        bound(log_target, flow, 1, repeats=-1)
    with pytest.raises(ValueError, match="^repeats must be None with a context, .* got 3"):
        bound(log_target, flow, 1, context=context, repeats=3)
    with pytest.raises(ValueError, match=r"a number for each sample, shape \(4,\), got \(\)"):
        bound(lambda x: log_target(x).sum(), flow, 4)


def test_effective_sample_size_counts_equal_weights():
    assert effective_sample_size(torch.zeros(7)).item() == pytest.approx(7)
    some = torch.tensor([0.0, 0.0, -math.inf, 0.0])
    torch.testing.assert_close(effective_sample_size(some - 5), torch.tensor(3.0))
    weights = torch.rand(2, 9, dtype=torch.float64)
    expected = weights.sum(1).square() / weights.square().sum(1)
    torch.testing.assert_close(effective_sample_size(weights.log()), expected)
