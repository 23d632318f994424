"""The contract that every transform meets. A new layer is one line in CASES."""

import copy
import io
from collections.abc import Callable
from functools import partial
from typing import Literal, NamedTuple

import pytest
import torch
from nflows.distributions import StandardNormal
from nflows.flows import Flow as NflowsFlow
from nflows.transforms import (
    AffineCouplingTransform,
    CompositeTransform,
    InverseTransform,
    PointwiseAffineTransform,
)
from torch import Tensor, nn
from torch.autograd import gradcheck
from torch.autograd.functional import jacobian
from torch.func import functional_call

from flows import givens, transforms
from flows.nets import MLP, ConvNet
from flows.transforms import (
    ActNorm,
    AffineCoupling,
    Composite,
    Dequantize,
    ElementwiseSpline,
    EmpiricalCDF,
    Logit,
    Multiscale,
    Rotation,
    Rotation1x1,
    SplineCoupling,
    Squeeze,
    Transform,
)

DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
ROWS = 3
CONTEXT = 2  # features of the context
MLP_NET = partial(MLP, hidden_features=4, blocks=1)
CONTEXT_NET = partial(MLP, hidden_features=4, blocks=1, context_features=CONTEXT)
CONV_NET = partial(ConvNet, hidden_features=3)
SPLINE = {"bins": 3, "tail_bound": 2.0}


class Case(NamedTuple):
    make: Callable[[], Transform]
    inputs: Callable[[int], Tensor]  # rows -> float64 inputs from the domain of forward
    context: Literal["ignored", "used", "refused"] = "ignored"
    noise: Callable[[Tensor], Tensor] = lambda z: z  # normals -> the domain of inverse
    stochastic: bool = False  # forward draws noise that inverse drops: no bijection
    any_shape: bool = False  # the number of features is free


def reals(*shape: int) -> Callable[[int], Tensor]:
    return lambda rows: 1.5 * torch.randn(rows, *shape, dtype=torch.float64)


def unit(*shape: int) -> Callable[[int], Tensor]:
    return lambda rows: torch.rand(rows, *shape, dtype=torch.float64)


def levels(*shape: int, grey_levels: int) -> Callable[[int], Tensor]:
    return lambda rows: torch.randint(grey_levels, (rows, *shape)).double() / grey_levels


def fitted(*shape: int) -> EmpiricalCDF:
    transform = EmpiricalCDF(shape, bins=4).double()
    transform(torch.rand(50, *shape, dtype=torch.float64) ** 2)
    return transform


def image_levels() -> Multiscale:
    shapes = Multiscale.shapes((1, 4, 8), 2)
    return Multiscale((1, 4, 8), [image_steps(channels) for channels, _, _ in shapes])


def image_steps(channels: int) -> Composite:
    return Composite(
        [ActNorm(channels), Rotation1x1(channels), AffineCoupling(channels, CONV_NET)]
    )


def vector_steps() -> Composite:
    return Composite(
        [
            ActNorm(3),
            Rotation(3, init="haar"),
            SplineCoupling(3, MLP_NET, **SPLINE),
            Composite([ElementwiseSpline(3, **SPLINE), AffineCoupling(3, CONTEXT_NET)]),
        ]
    )


CASES = {
    "rotation, even": Case(lambda: Rotation(4), reals(4)),
    "rotation, odd": Case(lambda: Rotation(5), reals(5)),
    "rotation, haar": Case(lambda: Rotation(3, init="haar"), reals(3)),
    "rotation, limited": Case(lambda: Rotation(4, angle_limit=0.5), reals(4)),
    "rotation, tied": Case(lambda: Rotation(4, ties="rounds"), reals(4)),
    "rotation, round_robin": Case(lambda: Rotation(6, givens.round_robin(6)), reals(6)),
    "rotation, odd_even": Case(lambda: Rotation(5, givens.odd_even(5)), reals(5)),
    "rotation, cosine_sine": Case(lambda: Rotation(5, givens.cosine_sine(5)), reals(5)),
    "rotation, hurwitz": Case(lambda: Rotation(5, givens.hurwitz(5)), reals(5)),
    "rotation, butterfly": Case(lambda: Rotation(6, givens.butterfly(6)), reals(6)),
    "rotation, frame": Case(lambda: Rotation(5, givens.crossing(5).frame(2)), reals(5)),
    "rotation 1x1": Case(lambda: Rotation1x1(3), reals(3, 2, 3)),
    "actnorm": Case(lambda: ActNorm(3), reals(3)),
    "actnorm, images": Case(lambda: ActNorm(3), reals(3, 2, 2)),
    "affine coupling": Case(lambda: AffineCoupling(4, MLP_NET), reals(4)),
    "affine coupling, odd": Case(lambda: AffineCoupling(5, MLP_NET), reals(5)),
    "affine coupling, flip": Case(lambda: AffineCoupling(5, MLP_NET, flip=True), reals(5)),
    "affine coupling, context": Case(lambda: AffineCoupling(4, CONTEXT_NET), reals(4), "used"),
    "affine coupling, images": Case(
        lambda: AffineCoupling(3, CONV_NET, flip=True), reals(3, 2, 3), "refused"
    ),
    "spline coupling": Case(lambda: SplineCoupling(4, MLP_NET, **SPLINE), reals(4)),
    "spline coupling, odd": Case(lambda: SplineCoupling(3, MLP_NET, **SPLINE), reals(3)),
    "spline coupling, flip": Case(
        lambda: SplineCoupling(3, MLP_NET, flip=True, **SPLINE), reals(3)
    ),
    "spline coupling, context": Case(
        lambda: SplineCoupling(4, CONTEXT_NET, **SPLINE), reals(4), "used"
    ),
    "spline coupling, images": Case(
        lambda: SplineCoupling(3, CONV_NET, **SPLINE), reals(3, 2, 2), "refused"
    ),
    "elementwise spline": Case(lambda: ElementwiseSpline(3, **SPLINE), reals(3)),
    "elementwise spline, images": Case(lambda: ElementwiseSpline(3, **SPLINE), reals(3, 2, 2)),
    "empirical cdf": Case(lambda: fitted(3), unit(3)),
    "empirical cdf, images": Case(lambda: fitted(2, 2, 2), unit(2, 2, 2)),
    # The logits of [a, 1 - a] are a bounded interval, all that forward accepts again.
    "logit": Case(Logit, unit(3), noise=lambda z: 2.9 * z.tanh(), any_shape=True),
    "logit, images": Case(
        lambda: Logit(0.01), unit(2, 2, 2), noise=lambda z: 4.5 * z.tanh(), any_shape=True
    ),
    "dequantize": Case(
        lambda: Dequantize(17),
        levels(3, grey_levels=17),
        noise=torch.sigmoid,
        stochastic=True,
        any_shape=True,
    ),
    "squeeze": Case(Squeeze, reals(2, 4, 2), any_shape=True),
    "multiscale": Case(image_levels, reals(1, 4, 8), "refused"),
    "composite": Case(vector_steps, reals(3), "used"),
}
each_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
each_bijection = pytest.mark.parametrize(
    "case", [pytest.param(c, id=name) for name, c in CASES.items() if not c.stochastic]
)
each_direction = pytest.mark.parametrize("direction", ["forward", "inverse"])


def build(case: Case, dtype: torch.dtype = torch.float64) -> Transform:
    transform = case.make().to(dtype)
    for parameter in transform.parameters():
        nn.init.normal_(parameter, std=0.5)  # the identity would hide mistakes
    return transform.eval()


def context_for(case: Case, rows: int = ROWS, dtype: torch.dtype = torch.float64) -> Tensor | None:
    return torch.randn(rows, CONTEXT, dtype=dtype) if case.context == "used" else None


def apply(transform: Transform, direction: str, inputs: Tensor, context: Tensor | None):
    torch.manual_seed(1)  # a layer that draws noise draws the same one every time
    return (transform if direction == "forward" else transform.inverse)(inputs, context)


def arguments(
    case: Case, transform: Transform, direction: str, rows: int = ROWS, dtype=torch.float64
) -> tuple[Tensor, Tensor | None]:
    """Inputs from the domain of the direction, and the context that the layer needs."""
    inputs, context = case.inputs(rows).to(dtype), context_for(case, rows, dtype)
    if direction == "inverse":
        with torch.no_grad():
            outputs, _ = apply(transform, "forward", inputs, context)
        inputs = case.noise(torch.randn_like(outputs))
    return inputs, context


def test_table_has_every_transform():
    exported = {getattr(transforms, name) for name in transforms.__all__}
    layers = {c for c in exported if issubclass(c, Transform)} - {Transform, transforms.Coupling}
    assert {type(case.make()) for case in CASES.values()} == layers


@each_case
def test_inverse_undoes_forward(case):
    transform = build(case)
    inputs, context = arguments(case, transform, "forward", rows=20)
    outputs, logabsdet = apply(transform, "forward", inputs, context)
    back, inverse_logabsdet = apply(transform, "inverse", outputs, context)
    torch.testing.assert_close(back, inputs, atol=1e-9, rtol=1e-9)
    torch.testing.assert_close(inverse_logabsdet, -logabsdet, atol=1e-8, rtol=1e-8)


@each_bijection
def test_forward_undoes_inverse(case):
    transform = build(case)
    noise, context = arguments(case, transform, "inverse", rows=20)
    inputs, logabsdet = apply(transform, "inverse", noise, context)
    back, forward_logabsdet = apply(transform, "forward", inputs, context)
    torch.testing.assert_close(back, noise, atol=1e-9, rtol=1e-9)
    torch.testing.assert_close(forward_logabsdet, -logabsdet, atol=1e-8, rtol=1e-8)


def assert_logabsdet_is_that_of_autograd(case: Case, direction: str) -> None:
    transform = build(case)
    inputs, context = arguments(case, transform, direction)
    _, logabsdet = apply(transform, direction, inputs, context)
    for row in range(ROWS):
        row_context = None if context is None else context[row : row + 1]

        def flat(x, c=row_context, like=inputs[row : row + 1]):
            return apply(transform, direction, x.view_as(like), c)[0].flatten()

        matrix = jacobian(flat, inputs[row].flatten())
        assert matrix.shape[0] == matrix.shape[1]
        expected = torch.linalg.slogdet(matrix).logabsdet
        torch.testing.assert_close(logabsdet[row], expected, atol=1e-9, rtol=1e-9)


@each_case
def test_logabsdet_matches_autograd(case):
    assert_logabsdet_is_that_of_autograd(case, "forward")


@each_bijection
def test_logabsdet_of_the_inverse_matches_autograd(case):
    assert_logabsdet_is_that_of_autograd(case, "inverse")


@each_direction
@each_case
def test_logabsdet_may_be_written_into(case, direction):
    transform = build(case)
    inputs, context = arguments(case, transform, direction)
    inputs.requires_grad_()
    outputs, logabsdet = apply(transform, direction, inputs, context)
    assert logabsdet.shape == (ROWS,) and logabsdet.is_contiguous()
    kept = [tensor.clone() for tensor in (outputs, logabsdet, *transform.state_dict().values())]
    logabsdet += 1
    (outputs.sum() + logabsdet.sum()).backward()  # nothing saved for backward was touched
    again = apply(transform, direction, inputs, context)
    now = [outputs, again[1], *transform.state_dict().values()]
    assert all(map(torch.equal, now, kept))
    assert torch.equal(logabsdet, kept[1] + 1)


@each_direction
@each_case
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("device", DEVICES)
def test_outputs_keep_dtype_and_device(case, direction, dtype, device):
    transform = build(case, dtype)
    inputs, context = arguments(case, transform, direction, dtype=dtype)
    exact = apply(transform.double(), direction, inputs.double(), _double(context))[0]
    context = None if context is None else context.to(device)
    inputs = inputs.to(device)
    outputs, logabsdet = apply(transform.to(device, dtype), direction, inputs, context)
    for result in (outputs, logabsdet):
        assert result.dtype == dtype and result.device == inputs.device
    if not case.stochastic:  # each dtype draws its own noise
        torch.testing.assert_close(outputs.cpu().double(), exact, atol=1e-4, rtol=1e-4)


def _double(context: Tensor | None) -> Tensor | None:
    return None if context is None else context.double()


@each_direction
@each_case
def test_inputs_are_not_modified(case, direction):
    transform = build(case)
    inputs, context = arguments(case, transform, direction)
    kept = inputs.clone()
    outputs, _ = apply(transform, direction, inputs, context)
    assert torch.equal(inputs, kept)
    outputs.zero_()
    assert torch.equal(inputs, kept)


@each_direction
@each_case
def test_layout_in_memory_makes_no_difference(case, direction):
    transform = build(case)
    inputs, context = arguments(case, transform, direction)
    expected = apply(transform, direction, inputs, context)
    strided = inputs.movedim(0, -1).contiguous().movedim(-1, 0)
    assert not strided.is_contiguous()
    results = apply(transform, direction, strided, context)
    if case.stochastic and direction == "forward":  # noise is drawn in the order of memory
        results = results[1:], expected[1:]
    torch.testing.assert_close(results, expected, atol=1e-12, rtol=1e-12)


@each_direction
@each_case
def test_rows_do_not_see_one_another(case, direction):
    if case.stochastic and direction == "forward":
        pytest.skip("every row draws its own noise")
    transform = build(case)
    inputs, context = arguments(case, transform, direction)
    outputs, logabsdet = apply(transform, direction, inputs, context)
    context = None if context is None else context[1:2]
    alone = apply(transform, direction, inputs[1:2], context)
    torch.testing.assert_close(alone, (outputs[1:2], logabsdet[1:2]), atol=1e-12, rtol=1e-12)


@each_direction
@each_case
def test_no_rows_give_no_rows(case, direction):
    transform = build(case)
    inputs, context = arguments(case, transform, direction)
    outputs, _ = apply(transform, direction, inputs, context)
    none = None if context is None else context[:0]
    empty, logabsdet = apply(transform, direction, inputs[:0], none)
    assert empty.shape == (0, *outputs.shape[1:]) and logabsdet.shape == (0,)


@each_direction
@each_case
def test_wrong_number_of_features_is_refused(case, direction):
    if case.any_shape:
        pytest.skip("takes any number of features")
    transform = build(case)
    inputs, context = arguments(case, transform, direction)
    for wrong in (torch.cat([inputs, inputs[:, :1]], dim=1), inputs[:, 1:], inputs[:, 0]):
        with pytest.raises(ValueError, match=r"inputs must .*, got \("):
            apply(transform, direction, wrong, context)


@each_direction
@each_case
def test_context_is_used_ignored_or_refused(case, direction):
    transform = build(case)
    inputs, context = arguments(case, transform, direction)
    other = torch.randn(ROWS, CONTEXT, dtype=torch.float64)
    match case.context:
        case "refused":
            with pytest.raises(ValueError, match="context"):
                apply(transform, direction, inputs, other)
        case "ignored":
            outputs, logabsdet = apply(transform, direction, inputs, None)
            results = apply(transform, direction, inputs, other)
            assert torch.equal(results[0], outputs) and torch.equal(results[1], logabsdet)
        case "used":
            outputs, logabsdet = apply(transform, direction, inputs, context)
            results = apply(transform, direction, inputs, other)
            assert (results[0] != outputs).flatten(1).any(1).all()
            assert (results[1] != logabsdet).any()
            for wrong in (None, other[:, 1:]):
                with pytest.raises(ValueError, match="context must have 2 features, got"):
                    apply(transform, direction, inputs, wrong)


@each_case
def test_works_in_an_nflows_flow(case):
    transform = build(case, torch.float32)
    inputs, context = arguments(case, transform, "forward", dtype=torch.float32)
    outputs, logabsdet = apply(transform, "forward", inputs, context)
    normal = StandardNormal(outputs.shape[1:])
    flow = NflowsFlow(transform, normal)
    torch.manual_seed(1)
    log_prob = flow.log_prob(inputs, context)
    torch.testing.assert_close(log_prob, normal.log_prob(outputs) + logabsdet)
    assert flow.sample(2).shape == (2, *inputs.shape[1:]) if context is None else True
    if context is not None:
        assert flow.sample(2, context).shape == (ROWS, 2, *inputs.shape[1:])


@each_case
def test_works_in_an_nflows_composite(case):
    transform = build(case)
    inputs, context = arguments(case, transform, "forward")
    outputs, logabsdet = apply(transform, "forward", inputs, context)
    scale = PointwiseAffineTransform(1.0, 2.0).double()
    chain = CompositeTransform([transform, scale])
    results = apply(chain, "forward", inputs, context)
    log_scale = outputs[0].numel() * torch.tensor(2.0, dtype=torch.float64).log()
    torch.testing.assert_close(results, (2 * outputs + 1, logabsdet + log_scale))
    back = apply(chain, "inverse", results[0], context)
    torch.testing.assert_close(back, (inputs, -results[1]), atol=1e-8, rtol=1e-8)


@each_case
def test_nflows_transforms_work_in_our_composite(case):
    transform = build(case)
    inputs, context = arguments(case, transform, "forward")
    chain = Composite([transform, InverseTransform(transform)])
    zeros = inputs.new_zeros(ROWS)
    results = apply(chain, "forward", inputs, context)
    torch.testing.assert_close(results, (inputs, zeros), atol=1e-8, rtol=1e-8)
    results = apply(chain, "inverse", inputs, context)
    torch.testing.assert_close(results, (inputs, zeros), atol=1e-8, rtol=1e-8)


@each_bijection
def test_works_inside_an_nflows_coupling(case):
    # It adds its own logabsdet in place to the one that our layer returns.
    transform = build(case)
    inputs, context = arguments(case, transform, "forward")
    outputs, logabsdet = apply(transform, "forward", inputs, context)
    if outputs.shape != inputs.shape:
        pytest.skip("nflows couplings need the shape kept")
    half = inputs.shape[1]

    def net(kept: int, parameters: int) -> nn.Module:
        return _Constant(parameters)

    coupling = AffineCouplingTransform(
        [0] * half + [1], net, unconditional_transform=lambda features: transform
    ).double()
    both = torch.cat([inputs, inputs[:, :1]], dim=1)
    results, total = apply(coupling, "forward", both, context)
    torch.testing.assert_close(results[:, :half], outputs)
    back, inverse_total = apply(coupling, "inverse", results, context)
    torch.testing.assert_close(back, both, atol=1e-8, rtol=1e-8)
    torch.testing.assert_close(inverse_total, -total, atol=1e-8, rtol=1e-8)
    scale = torch.sigmoid(torch.tensor(2.3, dtype=torch.float64)) + 1e-3
    expected = logabsdet + scale.log() * inputs[0, 0].numel()
    torch.testing.assert_close(total, expected, atol=1e-8, rtol=1e-8)


class _Constant(nn.Module):
    def __init__(self, parameters: int) -> None:
        super().__init__()
        self.parameters_ = parameters

    def forward(self, inputs: Tensor, context: Tensor | None = None) -> Tensor:
        return inputs.new_full((len(inputs), self.parameters_, *inputs.shape[2:]), 0.3)


@each_case
def test_weights_survive_a_file(case):
    transform = build(case)
    file = io.BytesIO()
    torch.save(transform.state_dict(), file)
    file.seek(0)
    loaded = case.make().double().eval()
    for direction in ("forward", "inverse"):
        inputs, context = arguments(case, transform, direction)
        expected = apply(transform, direction, inputs, context)
        if transform.state_dict() and direction == "forward":
            before = apply(loaded, direction, inputs, context)
            assert not torch.equal(before[0], expected[0])
        file.seek(0)
        loaded.load_state_dict(torch.load(file, weights_only=True), strict=True)
        results = apply(loaded, direction, inputs, context)
        assert torch.equal(results[0], expected[0]) and torch.equal(results[1], expected[1])


@each_case
def test_a_deep_copy_is_equal_and_apart(case):
    transform = build(case)
    inputs, context = arguments(case, transform, "forward")
    expected = apply(transform, "forward", inputs, context)
    copied = copy.deepcopy(transform)
    results = apply(copied, "forward", inputs, context)
    assert torch.equal(results[0], expected[0]) and torch.equal(results[1], expected[1])
    for tensor in (*copied.parameters(), *copied.buffers()):
        tensor.data.zero_()
    results = apply(transform, "forward", inputs, context)
    assert torch.equal(results[0], expected[0]) and torch.equal(results[1], expected[1])


@each_direction
@each_case
def test_gradients_match_finite_differences(case, direction):
    if case.stochastic and direction == "inverse":
        pytest.skip("a staircase")
    transform = build(case)
    inputs, context = arguments(case, transform, direction, rows=2)
    names, parameters = zip(*transform.named_parameters(), strict=True) if list(
        transform.parameters()
    ) else ((), ())

    def results(x, *values):
        torch.manual_seed(1)
        return functional_call(_Directed(transform, direction), dict(
            zip((f"transform.{name}" for name in names), values, strict=True)
        ), (x, context))

    leaves = [tensor.detach().clone().requires_grad_() for tensor in (inputs, *parameters)]
    assert gradcheck(results, leaves)


class _Directed(nn.Module):
    """A transform whose forward is the given direction, as functional_call needs."""

    def __init__(self, transform: Transform, direction: str) -> None:
        super().__init__()
        self.transform, self.direction = transform, direction

    def forward(self, inputs: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        return apply(self.transform, self.direction, inputs, context)


@each_direction
@each_case
def test_gradients_are_finite_at_the_ends(case, direction):
    transform = build(case, torch.float32)
    inputs, context = arguments(case, transform, direction, rows=6, dtype=torch.float32)
    ends = inputs.new_tensor([-1e3, -2.0, 0.0, 1.0, 2.0, 1e3]).view(-1, *[1] * (inputs.ndim - 1))
    if direction == "inverse":
        ends = case.noise(ends)
    elif inputs.min() >= 0:
        ends = ends.clamp(0, 1)
    inputs = ends.expand_as(inputs).clone().requires_grad_()
    outputs, logabsdet = apply(transform, direction, inputs, context)
    (0.5 * outputs.square().sum() - logabsdet.sum()).backward()
    for tensor in (outputs, logabsdet, inputs.grad, *(p.grad for p in transform.parameters())):
        assert tensor is not None and tensor.isfinite().all()
