"""The contract that every base distribution meets, and what is special to each."""

import copy
import io
import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
from scipy import stats
from torch import Tensor, nn
from torch import distributions as reference
from torch.autograd import gradcheck
from torch.func import functional_call

from flows import Flow, distributions
from flows.distributions import (
    DiagonalNormal,
    Distribution,
    GaussianMixture,
    Logistic,
    Normal,
    Uniform,
)
from flows.nets import MLP
from flows.transforms import Rotation

DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
SHAPES = [(1,), (5,), (3, 2, 2)]
CONTEXT = 2  # features of the context
NET = partial(MLP, hidden_features=4, blocks=1, context_features=CONTEXT)

LAWS: dict[str, Callable[[tuple[int, ...]], Distribution]] = {
    "normal": Normal,
    "logistic": Logistic,
    "uniform": lambda shape: Uniform(shape, low=-1.5, high=2.5),
    "diagonal normal": DiagonalNormal,
    "diagonal normal, context": lambda shape: DiagonalNormal(shape, net=NET),
    "mixture": lambda shape: GaussianMixture(shape, 3),
    "mixture, one": lambda shape: GaussianMixture(shape, 1),
    "mixture, context": lambda shape: GaussianMixture(shape, 3, net=NET),
}
CONDITIONAL = {name: make for name, make in LAWS.items() if "context" in name}
each_law = pytest.mark.parametrize("make", LAWS.values(), ids=LAWS)
each_conditional_law = pytest.mark.parametrize("make", CONDITIONAL.values(), ids=CONDITIONAL)
each_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)


def build(make: Callable, shape: tuple[int, ...], dtype: torch.dtype = torch.float64):
    law = make(shape).to(dtype)
    for parameter in law.parameters():
        nn.init.normal_(parameter, std=0.7)  # what it starts as would hide mistakes
    return law


def contexts(law: Distribution, rows: int) -> Tensor | None:
    if getattr(law, "net", None) is None:
        return None
    return torch.randn(rows, CONTEXT, dtype=law.anchor.dtype)


def expected_law(law: Distribution, context: Tensor | None) -> reference.Distribution:
    """The same law by torch, for one row of context (1, features)."""
    dims = len(law.shape)
    zeros = torch.zeros(law.shape, dtype=torch.float64)

    def scale(raw: Tensor) -> Tensor:
        return 1e-3 + (1 + raw.exp()).log()

    match law:
        case Normal():
            return reference.Independent(reference.Normal(zeros, zeros + 1), dims)
        case Logistic():
            uniform = reference.Uniform(zeros, zeros + 1)
            logit = reference.SigmoidTransform().inv
            logistic = reference.TransformedDistribution(uniform, [logit])
            return reference.Independent(logistic, dims)
        case Uniform():
            return reference.Independent(reference.Uniform(zeros + law.low, zeros + law.high), 1)
        case DiagonalNormal():
            change = torch.zeros(2, *law.shape, dtype=torch.float64)
            if context is not None:
                change = law.net(context[:, :0], context).view_as(change)
            mean, raw = law.mean + change[0], law.raw_scale + change[1]
            return reference.Independent(reference.Normal(mean, scale(raw)), dims)
        case GaussianMixture():
            change = torch.zeros(1, law.means.numel() * 2 + law.components, dtype=torch.float64)
            if context is not None:
                change = law.net(context[:, :0], context)
            count = law.means.numel()
            means = law.means + change[0, :count].view_as(law.means)
            raw = law.raw_scales + change[0, count : 2 * count].view_as(law.means)
            logits = law.logits + change[0, 2 * count :]
            return reference.MixtureSameFamily(
                reference.Categorical(logits=logits),
                reference.Independent(reference.Normal(means, scale(raw)), dims),
            )


def test_table_has_every_distribution():
    exported = {getattr(distributions, name) for name in distributions.__all__} - {Distribution}
    assert {type(make((2,))) for make in LAWS.values()} == exported


@each_shape
@each_law
def test_log_prob_is_that_of_torch(make, shape):
    law = build(make, shape)
    context = contexts(law, 6)
    x = 4 * torch.rand(6, *shape, dtype=torch.float64) - 1.5  # the box of Uniform
    log_prob = law.log_prob(x, context)
    assert log_prob.shape == (6,)
    for row in range(6):
        one = slice(row, row + 1)
        expected = expected_law(law, None if context is None else context[one]).log_prob(x[one])
        torch.testing.assert_close(
            log_prob[one], expected.flatten(1).sum(1) if expected.ndim > 1 else expected
        )


def marginal_cdf(law: Distribution, context: Tensor | None) -> Callable:
    """Distribution function of the first feature, from scipy."""
    match law:
        case Normal():
            return stats.norm.cdf
        case Logistic():
            return stats.logistic.cdf
        case Uniform():
            return stats.uniform(law.low, law.high - law.low).cdf
        case DiagonalNormal():
            normal = expected_law(law, context).base_dist
            return stats.norm(normal.mean.flatten()[0].item(), normal.stddev.flatten()[0]).cdf
        case GaussianMixture():
            mixture = expected_law(law, context)
            normal, weights = (
                mixture.component_distribution.base_dist,
                mixture.mixture_distribution,
            )
            parts = [
                (w.item(), stats.norm(mean.item(), scale.item()))
                for w, mean, scale in zip(
                    weights.probs,
                    normal.mean.flatten(1)[:, 0],
                    normal.stddev.flatten(1)[:, 0],
                    strict=True,
                )
            ]
            return lambda x: sum(w * part.cdf(x) for w, part in parts)


@each_law
def test_samples_follow_the_law(make):
    law = build(make, (2,))
    context = contexts(law, 3)
    with torch.no_grad():
        samples = law.sample(4000, torch.zeros(3, 1) if context is None else context)
        for row in range(3):
            one = None if context is None else context[row : row + 1]
            test = stats.kstest(samples[row, :, 0].numpy(), marginal_cdf(law, one))
            assert test.pvalue > 1e-3
            # Features depend on one another through the component; so does their covariance.
            mixed = samples[row].prod(1)
            drawn = expected_law(law, one).sample((4000,)).view(4000, 2).prod(1)
            assert stats.ks_2samp(mixed.numpy(), drawn.numpy()).pvalue > 1e-3


@each_law
def test_features_and_rows_of_samples_are_their_own(make):
    law = build(make, (2,))
    context = contexts(law, 1)
    context = torch.zeros(2, 1) if context is None else context.expand(2, -1)
    with torch.no_grad():
        samples = law.sample(1000, context)
    assert len(samples.flatten().unique()) == samples.numel()
    first, second = samples[:, :, 0]
    assert torch.stack([first, second]).corrcoef()[0, 1].abs() < 0.15


@pytest.mark.parametrize("num_samples", [0, 1, 7])
@each_shape
@each_law
def test_samples_have_one_shape_with_and_one_without_context(make, shape, num_samples):
    law = build(make, shape)
    conditional = contexts(law, 4) is not None
    for rows in (0, 1, 4):
        context = torch.randn(rows, CONTEXT, dtype=torch.float64)
        assert law.sample(num_samples, context).shape == (rows, num_samples, *shape)
    if not conditional:
        assert law.sample(num_samples).shape == (num_samples, *shape)
        labels = torch.zeros(4, dtype=torch.int64)  # a context of any kind is ignored
        assert law.sample(num_samples, labels).shape == (4, num_samples, *shape)


@each_law
def test_temperature_scales_the_deviation_from_the_centre(make):
    law = build(make, (3,))
    context = contexts(law, 2)

    def sample(temperature: float) -> Tensor:
        torch.manual_seed(1)
        return law.sample(50, context, temperature=temperature)

    centre, plain = sample(0.0), sample(1.0)
    torch.manual_seed(1)
    assert torch.equal(law.sample(50, context), plain)
    for temperature in (0.5, 2.0):
        expected = centre + temperature * (plain - centre)
        torch.testing.assert_close(sample(temperature), expected)
    if isinstance(law, Uniform):
        torch.testing.assert_close(centre, torch.full_like(centre, 0.5))
    elif not hasattr(law, "net"):
        assert not centre.any()
    elif context is None:
        means = law.means if isinstance(law, GaussianMixture) else law.mean[None]
        assert (centre.unsqueeze(1) == means).all(2).any(1).all()


@each_law
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("device", DEVICES)
def test_samples_follow_dtype_and_device_of_the_module(make, dtype, device):
    law = build(make, (2,), dtype).to(device)
    context = contexts(law, 3)
    context = None if context is None else context.to(device)
    samples = law.sample(4, context)
    repeated = None if context is None else context.repeat_interleave(4, dim=0)
    for result in (samples, law.log_prob(samples.reshape(-1, 2), repeated)):
        assert result.dtype == dtype and result.device == law.anchor.device


@each_law
def test_float32_is_close_to_float64(make):
    law = build(make, (5,), torch.float32)
    context = contexts(law, 20)
    x = 4 * torch.rand(20, 5) - 1.5
    rounded = law.log_prob(x, context)
    exact = law.double().log_prob(x.double(), None if context is None else context.double())
    torch.testing.assert_close(rounded.double(), exact, atol=1e-4, rtol=1e-4)


@each_shape
@each_law
def test_no_rows_have_no_log_prob(make, shape):
    law = build(make, shape)
    x = torch.empty(0, *shape, dtype=torch.float64)
    assert law.log_prob(x, contexts(law, 0)).shape == (0,)


@each_law
def test_gradients_match_finite_differences(make):
    law = build(make, (2,))
    context = contexts(law, 3)
    x = 3 * torch.rand(3, 2, dtype=torch.float64) - 1  # inside the box of Uniform
    names = [name for name, _ in law.named_parameters()]

    def log_prob(x: Tensor, *values: Tensor) -> Tensor:
        return functional_call(law, dict(zip(names, values, strict=True)), (x, context))

    law.forward = law.log_prob
    assert gradcheck(log_prob, (x.requires_grad_(), *law.parameters()))


@each_law
def test_gradients_are_finite_far_out_and_reach_every_parameter(make):
    law = build(make, (2,), torch.float32)
    context = contexts(law, 4)
    x = torch.tensor([-1e6, -2.0, 0.3, 1e4]).view(4, 1).repeat(1, 2).requires_grad_()
    log_prob = law.log_prob(x, context)
    log_prob[log_prob > -math.inf].sum().backward()
    assert x.grad.isfinite().all()
    for parameter in law.parameters():
        assert parameter.grad.isfinite().all()
        # The weight of a single component is 1, whatever its logit.
        assert parameter.grad.any() or getattr(law, "components", 0) == 1


@each_law
def test_samples_carry_gradients_to_means_and_scales(make):
    law = build(make, (2,))
    samples = law.sample(50, contexts(law, 3))
    learned = [p for name, p in law.named_parameters() if "mean" in name or "scale" in name]
    assert samples.requires_grad == bool(learned)
    if learned:
        for gradient in torch.autograd.grad(samples.square().sum(), learned):
            assert gradient.any() and gradient.isfinite().all()


@each_law
def test_weights_survive_a_file(make):
    law, loaded = build(make, (3,)), make((3,)).double()
    context, x = contexts(law, 4), torch.rand(4, 3, dtype=torch.float64)
    file = io.BytesIO()
    torch.save(law.state_dict(), file)
    file.seek(0)
    loaded.load_state_dict(torch.load(file, weights_only=True), strict=True)
    assert torch.equal(loaded.log_prob(x, context), law.log_prob(x, context))
    assert bool(law.state_dict()) == bool(list(law.parameters()))


@each_law
def test_deep_copy_is_equal_and_apart(make):
    law = build(make, (3,))
    context, x = contexts(law, 4), torch.rand(4, 3, dtype=torch.float64)
    expected = law.log_prob(x, context)
    copied = copy.deepcopy(law)
    assert torch.equal(copied.log_prob(x, context), expected)
    for parameter in copied.parameters():
        parameter.data.zero_()
    assert torch.equal(law.log_prob(x, context), expected)


@each_conditional_law
def test_each_row_has_the_law_of_its_context(make):
    law = build(make, (2,))
    context, x = contexts(law, 3), torch.randn(3, 2, dtype=torch.float64)
    log_prob = law.log_prob(x, context)
    for row in range(3):
        one = slice(row, row + 1)
        torch.testing.assert_close(law.log_prob(x[one], context[one]), log_prob[one])
        other = contexts(law, 1)
        assert (law.log_prob(x[one], other) != log_prob[one]).all()


@each_conditional_law
def test_a_flow_with_it_agrees_with_its_own_samples(make):
    flow = Flow(Rotation(2, init="haar").double(), build(make, (2,)))
    context = torch.randn(3, CONTEXT, dtype=torch.float64)
    samples, log_prob = flow.sample_and_log_prob(5, context)
    for row in range(3):
        expected = flow.log_prob(samples[row], context[row].expand(5, -1))
        torch.testing.assert_close(log_prob[row], expected)


@each_conditional_law
def test_a_missing_or_wrong_context_is_refused(make):
    law = build(make, (2,))
    x = torch.zeros(3, 2, dtype=torch.float64)
    for call in (lambda: law.log_prob(x), lambda: law.sample(3)):
        with pytest.raises(ValueError, match="^context must have a row per sample, .* got None"):
            call()
    with pytest.raises(ValueError, match="^context must have 2 features, got"):
        law.log_prob(x, torch.zeros(3, 1, dtype=torch.float64))


@each_law
def test_bad_arguments_are_refused(make):
    law = build(make, (2,))
    for shape in [(4, 3), (4, 2, 2), (4,)]:
        with pytest.raises(ValueError, match=r"^inputs must be \(batch, 2\), got "):
            law.log_prob(torch.zeros(shape))
    context = torch.zeros(1, CONTEXT, dtype=torch.float64)
    with pytest.raises(ValueError, match="^context must have a row per input, got 1 for 4"):
        law.log_prob(torch.zeros(4, 2, dtype=torch.float64), context)
    for num_samples, temperature in [(-1, 1.0), (2, -0.1), (2, math.nan)]:
        with pytest.raises(ValueError, match="^[a-z_]+ must be at least 0, got "):
            law.sample(num_samples, context, temperature=temperature)
    for shape in [0, -1, (), (2, 0)]:
        with pytest.raises(ValueError, match=r"^shape must hold sizes of at least 1, got \("):
            make(shape)


def test_an_int_is_the_shape_of_vectors():
    assert Normal(3).shape == Normal((3,)).shape == Normal([3]).shape == (3,)


@pytest.mark.parametrize("net", [None, NET], ids=["learned", "context"])
def test_diagonal_normal_starts_as_the_standard_normal(net):
    x, context = torch.randn(5, 3, 2), torch.randn(5, CONTEXT)
    start = DiagonalNormal((3, 2), net=net).log_prob(x, context)
    torch.testing.assert_close(start, Normal((3, 2)).log_prob(x))


@pytest.mark.parametrize("law", [DiagonalNormal, partial(GaussianMixture, components=2)])
def test_scales_stay_above_their_bound(law):
    law = law(2)
    for parameter in law.parameters():
        nn.init.constant_(parameter, -200.0)  # means as well
    at_the_mean = law.log_prob(torch.full((1, 2), -200.0))
    # Two features with the smallest scale, 1e-3.
    torch.testing.assert_close(at_the_mean.item(), -2 * math.log(1e-3 * math.sqrt(2 * math.pi)))


@pytest.mark.parametrize("size", [1, 2, 20])
def test_a_mixture_starts_with_unit_variance_and_means_apart(size):
    mixture = GaussianMixture(size, components=6)
    means = mixture.means.detach()
    assert means.shape == (6, size) and means.std() < 1.3
    draws = torch.stack([nn.functional.pdist(torch.randn(6, size)).min() for _ in range(200)])
    # Farther apart than two of three plain draws would be.
    assert nn.functional.pdist(means).min() > 0.7 * draws.quantile(0.67)
    variance = mixture.sample(20_000).var(0) - means.var(0, correction=0)
    assert (variance - 0.5).abs().max() < 0.1
    assert not torch.equal(GaussianMixture(size, components=6).means, means)
    torch.manual_seed(0)
    assert torch.equal(GaussianMixture(size, components=6).means, means)


def test_a_mixture_learns_two_clusters():
    centres = torch.tensor([[-3.0, 0.0], [3.0, 1.0]])
    x = centres.repeat(200, 1) + 0.1 * torch.randn(400, 2)
    mixture = GaussianMixture(2, components=2)
    optimizer = torch.optim.Adam(mixture.parameters(), lr=0.1)
    for _ in range(200):
        optimizer.zero_grad()
        (-mixture.log_prob(x).mean()).backward()
        optimizer.step()
    means = mixture.means.detach().sort(0).values
    torch.testing.assert_close(means, centres, atol=0.05, rtol=0)


MIXTURES = {name: make for name, make in LAWS.items() if "mixture" in name}
each_mixture = pytest.mark.parametrize("make", MIXTURES.values(), ids=MIXTURES)


@each_shape
@each_mixture
def test_strata_have_points_of_every_component(make, shape):
    law, rows = build(make, shape), 4
    context = contexts(law, rows)
    for num_samples in (0, 1, 3):
        points, log_weights = law.rsample_stratified(num_samples, context)
        leading = () if context is None else (rows,)
        assert points.shape == (*leading, num_samples, law.components, *shape)
        assert log_weights.shape == (*leading, law.components)
    # A context that the law ignores has rows all the same.
    if law.net is None:
        points, log_weights = law.rsample_stratified(2, torch.zeros(rows, CONTEXT))
        assert points.shape == (rows, 2, law.components, *shape)
        assert log_weights.shape == (rows, law.components)


@each_mixture
def test_strata_follow_the_components_of_each_row(make):
    law, num_samples = build(make, (2,)), 4000
    context = contexts(law, 3)
    points, log_weights = law.rsample_stratified(num_samples, context)
    if context is None:
        points, log_weights = points.unsqueeze(0), log_weights.unsqueeze(0)
    for row in range(len(points)):
        one = None if context is None else context[row : row + 1]
        mixture = expected_law(law, one)
        normals = mixture.component_distribution.base_dist
        torch.testing.assert_close(log_weights[row], mixture.mixture_distribution.logits)
        error = normals.stddev / num_samples**0.5
        assert ((points[row].mean(0) - normals.mean).abs() < 4.5 * error).all()
        assert ((points[row].std(0) - normals.stddev).abs() < 4.5 * error).all()
        # Weighted, they have the mean of any function under the whole mixture.
        values = points[row].square().sum(-1) @ log_weights[row].exp()
        expected = (mixture.variance + mixture.mean.square()).sum()
        assert (values.mean() - expected).abs() < 4 * values.std() / num_samples**0.5


@each_mixture
def test_strata_carry_gradients_to_all_parameters(make):
    law = build(make, (2,))
    points, log_weights = law.rsample_stratified(5, contexts(law, 3))
    (points.square().sum(-1) * log_weights.unsqueeze(-2).exp()).sum().backward()
    for name, parameter in law.named_parameters():
        assert parameter.grad.isfinite().all()
        # The weight of a single component is 1, whatever its logit.
        assert parameter.grad.any() or (law.components == 1 and name == "logits")


def test_strata_refuse_what_samples_refuse():
    law = build(MIXTURES["mixture, context"], (2,))
    with pytest.raises(ValueError, match="^num_samples must be at least 0, got -1"):
        law.rsample_stratified(-1, contexts(law, 2))
    with pytest.raises(ValueError, match="^context must have a row per sample, .* got None"):
        law.rsample_stratified(2)


def test_logistic_is_finite_where_its_density_is_not():
    law, x = Logistic(1), torch.tensor([[-1e4], [1e4]], requires_grad=True)
    torch.testing.assert_close(law.log_prob(x), torch.tensor([-1e4, -1e4]))
    law.log_prob(x).sum().backward()
    assert x.grad.flatten().tolist() == [1, -1]


def test_logistic_samples_are_finite(monkeypatch):
    for value in (0.0, 1.0 - 2**-24, 1.0):
        monkeypatch.setattr(torch, "rand_like", lambda like, v=value: torch.full_like(like, v))
        assert Logistic(3).sample(2).isfinite().all()


def test_uniform_is_the_closed_box_with_no_slope():
    law = Uniform(2, low=0.1, high=0.7)
    x = torch.tensor([[0.1, 0.7], [0.1, 0.701], [0.099, 0.5], [math.nan, 0.5], [math.inf, 0.2]])
    log_prob = law.log_prob(x.requires_grad_())
    torch.testing.assert_close(log_prob[0].item(), -2 * math.log(0.6))
    assert log_prob[1:].tolist() == 4 * [-math.inf]
    log_prob.sum().backward()
    assert not x.grad[:3].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_uniform_samples_lie_in_the_box(dtype, monkeypatch):
    last = 1 - torch.finfo(dtype).eps / 2  # the largest number below 1: rounding is worst here
    values = torch.tensor([0.0, 0.5, last, last / 3], dtype=dtype)
    monkeypatch.setattr(torch, "rand_like", lambda like: values.view(4, 1))
    for low, width in torch.randn(300, 2, dtype=torch.float64).tolist():
        law = Uniform(1, low=low, high=low + abs(width)).to(dtype)
        assert law.log_prob(law.sample(4)).isfinite().all()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Uniform(2, low=1.0, high=1.0), "low must be below high, .*got 1.0 and 1.0"),
        (lambda: Uniform(2, high=math.inf), "both finite, got 0.0 and inf"),
        (lambda: Uniform(2, low=math.nan), "both finite, got nan and 1.0"),
        (lambda: GaussianMixture(2, components=0), "components must be at least 1, got 0"),
    ],
)
def test_bad_parameters_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
