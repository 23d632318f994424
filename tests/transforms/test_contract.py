"""The contract that every transform meets. A new layer is one line in CASES."""

import copy
import io
import math
from collections.abc import Callable
from functools import partial
from typing import Literal, NamedTuple

import nflows.flows
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from nflows.distributions import StandardNormal
from nflows.transforms import (
    AffineCouplingTransform,
    CompositeTransform,
    InverseTransform,
    PointwiseAffineTransform,
)
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck
from torch.autograd.functional import jacobian
from torch.func import functional_call

from flows import givens, transforms
from flows.nets import MADE, MLP, ConvNet
from flows.transforms import (
    ActNorm,
    AdditiveCoupling,
    AffineCoupling,
    Composite,
    ConditionalRotation,
    Dequantize,
    ElementwiseSpline,
    EmpiricalCDF,
    Householder1x1,
    HouseholderRotation,
    IncompressibleCoupling,
    Logit,
    LULinear,
    MaskedAutoregressiveAffine,
    MaskedAutoregressiveSpline,
    Multiscale,
    Permutation,
    Rotation,
    Rotation1x1,
    RotationCoupling,
    SplineCoupling,
    Squeeze,
    Standardize,
    SVDCoupling,
    SVDLinear,
    Sylvester,
    Transform,
    Twist,
    VariationalDequantize,
)
from flows.transforms.base import preserves_volume
from flows.transforms.composite import Memory

DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
ROWS = 3
CONTEXT = 2  # features of the context
MLP_NET = partial(MLP, hidden_features=4, blocks=1)
CONTEXT_NET = partial(MLP, hidden_features=4, blocks=1, context_features=CONTEXT)
MASKED_NET = partial(MADE, hidden_features=6, blocks=1)
CONTEXT_MASKED_NET = partial(MADE, hidden_features=6, blocks=1, context_features=CONTEXT)
CONV_NET = partial(ConvNet, hidden_features=3)
CONTEXT_CONV_NET = partial(ConvNet, hidden_features=3, context_features=CONTEXT)
SPLINE = {"bins": 3, "tail_bound": 2.0}


class Case(NamedTuple):
    make: Callable[[], Transform]
    inputs: Callable[[int], Tensor]  # rows -> float64 inputs from the domain of forward
    context: Literal["ignored", "used"] = "ignored"
    noise: Callable[[Tensor], Tensor] = lambda z: z  # normals -> the domain of inverse
    stochastic: bool = False  # forward draws noise that inverse drops: no bijection
    any_shape: bool = False  # the number of features is free
    keeps_shape: bool = True


def reals(*shape: int) -> Callable[[int], Tensor]:
    return lambda rows: 1.5 * torch.randn(rows, *shape, dtype=torch.float64)


def unit(*shape: int) -> Callable[[int], Tensor]:
    return lambda rows: torch.rand(rows, *shape, dtype=torch.float64)


def levels(*shape: int, grey_levels: int) -> Callable[[int], Tensor]:
    return lambda rows: torch.randint(1, grey_levels, (rows, *shape)).double() / grey_levels


def fitted(*shape: int) -> EmpiricalCDF:
    transform = EmpiricalCDF(shape, bins=4).double()
    transform(torch.rand(50, *shape, dtype=torch.float64) ** 2)
    return transform


def standardized(*shape: int) -> Standardize:
    transform = Standardize(shape[0]).double()
    transform(3 * torch.randn(20, *shape, dtype=torch.float64) + 1)
    return transform


def image_levels() -> Multiscale:
    shapes = Multiscale.shapes((1, 4, 8), 2)
    return Multiscale((1, 4, 8), [image_steps(channels) for channels, _, _ in shapes])


def image_steps(channels: int) -> Composite:
    return Composite(
        [ActNorm(channels), Rotation1x1(channels), AffineCoupling(channels, CONV_NET)]
    )


def vector_steps(memory: Memory = "store") -> Composite:
    return Composite(
        [
            ActNorm(3),
            Rotation(3, init="haar"),
            SplineCoupling(3, MLP_NET, **SPLINE),
            Composite([ElementwiseSpline(3, **SPLINE), AffineCoupling(3, CONTEXT_NET)]),
        ],
        memory=memory,
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
    "householder": Case(lambda: HouseholderRotation(4), reals(4)),
    "householder, odd": Case(lambda: HouseholderRotation(5), reals(5)),
    "householder, thin": Case(lambda: HouseholderRotation(6, 2), reals(6)),
    "householder 1x1": Case(lambda: Householder1x1(3), reals(3, 2, 3)),
    "householder 1x1, thin": Case(lambda: Householder1x1(4, 2), reals(4, 1, 2)),
    "lu linear": Case(lambda: LULinear(4), reals(4)),
    "lu linear, haar": Case(lambda: LULinear(5, init="haar"), reals(5)),
    "lu linear, images": Case(lambda: LULinear(3, init="haar"), reals(3, 2, 3)),
    "conditional rotation": Case(lambda: ConditionalRotation(4, CONTEXT_NET), reals(4), "used"),
    "conditional rotation, odd_even": Case(
        lambda: ConditionalRotation(5, CONTEXT_NET, givens.odd_even(5)), reals(5), "used"
    ),
    "conditional rotation, images": Case(
        lambda: ConditionalRotation(3, CONTEXT_NET), reals(3, 2, 3), "used"
    ),
    "svd linear": Case(lambda: SVDLinear(4), reals(4)),
    "svd linear, haar": Case(lambda: SVDLinear(3, init="haar"), reals(3)),
    "svd linear, cosine_sine": Case(
        lambda: SVDLinear(5, schedule=givens.cosine_sine(5)), reals(5)
    ),
    "svd linear, bounded": Case(lambda: SVDLinear(4, bound=0.5), reals(4)),
    "svd linear, context": Case(
        lambda: SVDLinear(4, init="haar", net=CONTEXT_NET), reals(4), "used"
    ),
    "svd linear, images": Case(lambda: SVDLinear(3), reals(3, 2, 3)),
    "svd linear, images, context": Case(
        lambda: SVDLinear(3, bound=1.0, net=CONTEXT_NET), reals(3, 2, 2), "used"
    ),
    "permutation": Case(lambda: Permutation(5), reals(5)),
    "permutation, images": Case(lambda: Permutation(5), reals(5, 2, 3)),
    "actnorm": Case(lambda: ActNorm(3), reals(3)),
    "actnorm, images": Case(lambda: ActNorm(3), reals(3, 2, 2)),
    "affine coupling": Case(lambda: AffineCoupling(4, MLP_NET), reals(4)),
    "affine coupling, odd": Case(lambda: AffineCoupling(5, MLP_NET), reals(5)),
    "affine coupling, flip": Case(lambda: AffineCoupling(5, MLP_NET, flip=True), reals(5)),
    "affine coupling, context": Case(lambda: AffineCoupling(4, CONTEXT_NET), reals(4), "used"),
    "affine coupling, images": Case(
        lambda: AffineCoupling(3, CONV_NET, flip=True), reals(3, 2, 3)
    ),
    "affine coupling, images, context": Case(
        lambda: AffineCoupling(3, CONTEXT_CONV_NET), reals(3, 2, 3), "used"
    ),
    "additive coupling": Case(lambda: AdditiveCoupling(4, MLP_NET), reals(4)),
    "additive coupling, two features": Case(lambda: AdditiveCoupling(2, MLP_NET), reals(2)),
    "additive coupling, odd, flip": Case(
        lambda: AdditiveCoupling(5, MLP_NET, flip=True), reals(5)
    ),
    "additive coupling, context": Case(lambda: AdditiveCoupling(4, CONTEXT_NET), reals(4), "used"),
    "additive coupling, images": Case(lambda: AdditiveCoupling(3, CONV_NET), reals(3, 2, 3)),
    "additive coupling, images, context": Case(
        lambda: AdditiveCoupling(3, CONTEXT_CONV_NET, flip=True), reals(3, 2, 2), "used"
    ),
    "incompressible coupling": Case(lambda: IncompressibleCoupling(4, MLP_NET), reals(4)),
    "incompressible coupling, two features": Case(
        lambda: IncompressibleCoupling(2, MLP_NET), reals(2)
    ),
    "incompressible coupling, odd, flip": Case(
        lambda: IncompressibleCoupling(5, MLP_NET, flip=True), reals(5)
    ),
    "incompressible coupling, context": Case(
        lambda: IncompressibleCoupling(4, CONTEXT_NET), reals(4), "used"
    ),
    "incompressible coupling, images": Case(
        lambda: IncompressibleCoupling(3, CONV_NET), reals(3, 2, 3)
    ),
    "incompressible coupling, images, context": Case(
        lambda: IncompressibleCoupling(3, CONTEXT_CONV_NET, flip=True), reals(3, 2, 2), "used"
    ),
    "rotation coupling": Case(lambda: RotationCoupling(4, MLP_NET), reals(4)),
    "rotation coupling, two features": Case(lambda: RotationCoupling(2, MLP_NET), reals(2)),
    "rotation coupling, odd, flip": Case(
        lambda: RotationCoupling(5, MLP_NET, flip=True), reals(5)
    ),
    "rotation coupling, odd_even": Case(
        lambda: RotationCoupling(7, MLP_NET, schedule=givens.odd_even(4)), reals(7)
    ),
    "rotation coupling, context": Case(lambda: RotationCoupling(4, CONTEXT_NET), reals(4), "used"),
    "rotation coupling, images": Case(lambda: RotationCoupling(3, CONV_NET), reals(3, 2, 3)),
    "rotation coupling, images, context": Case(
        lambda: RotationCoupling(3, CONTEXT_CONV_NET, flip=True), reals(3, 2, 2), "used"
    ),
    "svd coupling": Case(lambda: SVDCoupling(4, MLP_NET), reals(4)),
    "svd coupling, two features": Case(lambda: SVDCoupling(2, MLP_NET), reals(2)),
    "svd coupling, odd, flip": Case(lambda: SVDCoupling(5, MLP_NET, flip=True), reals(5)),
    "svd coupling, odd_even": Case(
        lambda: SVDCoupling(7, MLP_NET, schedule=givens.odd_even(4)), reals(7)
    ),
    "svd coupling, context": Case(lambda: SVDCoupling(4, CONTEXT_NET), reals(4), "used"),
    "svd coupling, images": Case(lambda: SVDCoupling(3, CONV_NET), reals(3, 2, 3)),
    "svd coupling, images, context": Case(
        lambda: SVDCoupling(3, CONTEXT_CONV_NET, flip=True), reals(3, 2, 2), "used"
    ),
    "spline coupling": Case(lambda: SplineCoupling(4, MLP_NET, **SPLINE), reals(4)),
    "spline coupling, odd": Case(lambda: SplineCoupling(3, MLP_NET, **SPLINE), reals(3)),
    "spline coupling, flip": Case(
        lambda: SplineCoupling(3, MLP_NET, flip=True, **SPLINE), reals(3)
    ),
    "spline coupling, context": Case(
        lambda: SplineCoupling(4, CONTEXT_NET, **SPLINE), reals(4), "used"
    ),
    "spline coupling, images": Case(lambda: SplineCoupling(3, CONV_NET, **SPLINE), reals(3, 2, 2)),
    "elementwise spline": Case(lambda: ElementwiseSpline(3, **SPLINE), reals(3)),
    "elementwise spline, images": Case(lambda: ElementwiseSpline(3, **SPLINE), reals(3, 2, 2)),
    "elementwise spline, context": Case(
        lambda: ElementwiseSpline(3, net=CONTEXT_NET, **SPLINE), reals(3), "used"
    ),
    "elementwise spline, images, context": Case(
        lambda: ElementwiseSpline(3, net=CONTEXT_NET, **SPLINE), reals(3, 2, 2), "used"
    ),
    "masked affine": Case(lambda: MaskedAutoregressiveAffine(4, MASKED_NET), reals(4)),
    "masked affine, reverse": Case(
        lambda: MaskedAutoregressiveAffine(5, MASKED_NET, reverse=True), reals(5)
    ),
    "masked affine, one feature": Case(
        lambda: MaskedAutoregressiveAffine(1, CONTEXT_MASKED_NET), reals(1), "used"
    ),
    "masked affine, context": Case(
        lambda: MaskedAutoregressiveAffine(3, CONTEXT_MASKED_NET), reals(3), "used"
    ),
    "masked spline": Case(lambda: MaskedAutoregressiveSpline(3, MASKED_NET, **SPLINE), reals(3)),
    "masked spline, reverse": Case(
        lambda: MaskedAutoregressiveSpline(4, MASKED_NET, reverse=True, **SPLINE), reals(4)
    ),
    "masked spline, context": Case(
        lambda: MaskedAutoregressiveSpline(3, CONTEXT_MASKED_NET, **SPLINE), reals(3), "used"
    ),
    "twist": Case(lambda: Twist(4, MLP_NET), reals(4)),
    "twist, odd": Case(lambda: Twist(5, MLP_NET, matching=3), reals(5)),
    "twist, two features": Case(lambda: Twist(2, MLP_NET), reals(2)),
    "twist, context": Case(lambda: Twist(4, CONTEXT_NET, matching=1), reals(4), "used"),
    "twist, images": Case(lambda: Twist(4, CONV_NET, matching=2), reals(4, 2, 3)),
    "twist, images, odd, context": Case(
        lambda: Twist(3, CONTEXT_CONV_NET), reals(3, 2, 3), "used"
    ),
    "sylvester": Case(lambda: Sylvester(4), reals(4)),
    "sylvester, thin": Case(lambda: Sylvester(5, rank=2), reals(5)),
    "sylvester, rank one": Case(lambda: Sylvester(2, rank=1), reals(2)),
    "sylvester, round_robin": Case(
        lambda: Sylvester(4, rank=3, schedule=givens.round_robin(4)), reals(4)
    ),
    "sylvester, context": Case(lambda: Sylvester(4, CONTEXT_NET), reals(4), "used"),
    "sylvester, thin, context": Case(lambda: Sylvester(5, CONTEXT_NET, rank=3), reals(5), "used"),
    "sylvester, householder": Case(lambda: Sylvester(4, mixing="householder"), reals(4)),
    "sylvester, householder, thin, context": Case(
        lambda: Sylvester(5, CONTEXT_NET, rank=3, mixing="householder"), reals(5), "used"
    ),
    "sylvester, permutation": Case(lambda: Sylvester(4, rank=3, mixing="permutation"), reals(4)),
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
    "standardize": Case(lambda: standardized(3), reals(3)),
    "standardize, images": Case(lambda: standardized(3, 2, 2), reals(3, 2, 2)),
    "variational dequantize": Case(
        lambda: VariationalDequantize(3, MLP_NET, 17),
        levels(3, grey_levels=17),
        noise=torch.sigmoid,
        stochastic=True,
    ),
    "variational dequantize, context": Case(
        lambda: VariationalDequantize(2, CONTEXT_NET, 17, layers=2),
        levels(2, grey_levels=17),
        "used",
        noise=torch.sigmoid,
        stochastic=True,
    ),
    "variational dequantize, images": Case(
        lambda: VariationalDequantize(2, CONV_NET, 17, layers=2),
        levels(2, 3, 1, grey_levels=17),
        noise=torch.sigmoid,
        stochastic=True,
    ),
    "variational dequantize, images, squeeze, context": Case(
        lambda: VariationalDequantize(1, CONTEXT_CONV_NET, 17, squeeze=True),
        levels(1, 2, 4, grey_levels=17),
        "used",
        noise=torch.sigmoid,
        stochastic=True,
    ),
    "squeeze": Case(Squeeze, reals(2, 4, 2), any_shape=True, keeps_shape=False),
    "multiscale": Case(image_levels, reals(1, 4, 8), keeps_shape=False),
    "composite": Case(vector_steps, reals(3), "used"),
    "composite, checkpoint": Case(lambda: vector_steps("checkpoint"), reals(3), "used"),
    "composite, reversible": Case(lambda: vector_steps("reversible"), reals(3), "used"),
}

OTHER = {"forward": "inverse", "inverse": "forward"}


def pairs(keep: Callable[[Case, str], bool] = lambda case, direction: True):
    """Every case in both directions, but for those to which a test does not apply."""
    chosen = [
        pytest.param(case, direction, id=f"{name}, {direction}")
        for name, case in CASES.items()
        for direction in OTHER
        if keep(case, direction)
    ]
    return pytest.mark.parametrize(("case", "direction"), chosen)


each_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
each_direction = pairs()
# What stochastic layers map back is a staircase, without a Jacobian, parameters or context.
each_smooth_direction = pairs(lambda case, way: not (case.stochastic and way == "inverse"))
# Their forward accounts for the volume of the noise, if for any.
each_bijective_direction = pairs(lambda case, way: not case.stochastic)
# What they map forward depends on how the noise meets the rows.
each_rowwise_direction = pairs(lambda case, way: not (case.stochastic and way == "forward"))


def build(case: Case, dtype: torch.dtype = torch.float64) -> Transform:
    transform = case.make().to(dtype)
    for parameter in transform.parameters():
        nn.init.normal_(parameter, std=0.5)  # the identity would hide mistakes
    return transform.eval()


def apply(
    transform: Transform, direction: str, inputs: Tensor, context: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)  # a layer that draws noise draws the same one every time
    return (transform if direction == "forward" else transform.inverse)(inputs, context)


def arguments(
    case: Case,
    transform: Transform,
    direction: str,
    rows: int = ROWS,
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor | None]:
    """Inputs from the domain of the direction, and the context that the layer needs."""
    inputs = case.inputs(rows).to(dtype)
    context = torch.randn(rows, CONTEXT, dtype=dtype) if case.context == "used" else None
    if direction == "inverse":
        with torch.no_grad():
            outputs, _ = apply(transform, "forward", inputs, context)
        inputs = case.noise(torch.randn_like(outputs))
    return inputs, context


def undone(case: Case, logabsdet: Tensor) -> Tensor:
    """logabsdet of the way back: layers that drop their noise again do not count its volume."""
    return torch.zeros_like(logabsdet) if case.stochastic else -logabsdet


def test_table_has_every_transform():
    exported = {getattr(transforms, name) for name in transforms.__all__}
    layers = {c for c in exported if issubclass(c, Transform)} - {Transform, transforms.Coupling}
    assert {type(case.make()) for case in CASES.values()} == layers


@each_smooth_direction
def test_the_other_direction_undoes_it(case, direction):
    transform = build(case)
    inputs, context = arguments(case, transform, direction, rows=20)
    outputs, logabsdet = apply(transform, direction, inputs, context)
    back = apply(transform, OTHER[direction], outputs, context)
    torch.testing.assert_close(back, (inputs, undone(case, logabsdet)), atol=1e-9, rtol=1e-9)


@each_bijective_direction
def test_logabsdet_matches_autograd(case, direction):
    transform = build(case)
    inputs, context = arguments(case, transform, direction)
    _, logabsdet = apply(transform, direction, inputs, context)
    for row in range(ROWS):
        one = slice(row, row + 1)
        condition = None if context is None else context[one]

        def outputs(x: Tensor, like=inputs[one], condition=condition) -> Tensor:
            return apply(transform, direction, x.view_as(like), condition)[0].flatten()

        matrix = jacobian(outputs, inputs[row].flatten())
        expected = torch.linalg.slogdet(matrix).logabsdet
        torch.testing.assert_close(logabsdet[row], expected, atol=1e-9, rtol=1e-9)


@each_direction
def test_volume_is_preserved_exactly_where_declared_also_after_training(case, direction):
    transform = build(case, torch.float32)
    inputs, context = arguments(case, transform, direction, dtype=torch.float32)
    if not preserves_volume(transform):
        volume = apply(transform, direction, inputs, context)[1]
        assert volume.any() or (case.stochastic and direction == "inverse")
        return
    parameters = list(transform.parameters())
    for _ in range(4):
        outputs, logabsdet = apply(transform, direction, inputs, context)
        assert not logabsdet.any()
        if parameters:
            gradients = torch.autograd.grad(outputs.sin().sum(), parameters)
            with torch.no_grad():
                for parameter, gradient in zip(parameters, gradients, strict=True):
                    parameter -= 0.05 * gradient


@each_direction
def test_logabsdet_is_dense_and_may_be_written_into(case, direction):
    transform = build(case)
    inputs, context = arguments(case, transform, direction)
    outputs, logabsdet = apply(transform, direction, inputs.requires_grad_(), context)
    assert logabsdet.shape == (ROWS,) and logabsdet.is_contiguous()
    state = transform.state_dict().values()
    kept = [tensor.clone() for tensor in (outputs, inputs, *state, logabsdet)]
    logabsdet += 1
    (outputs.sum() + logabsdet.sum()).backward()  # nothing kept for the backward pass changed
    again = apply(transform, direction, inputs, context)[1]
    assert all(map(torch.equal, (outputs, inputs, *state, again), kept))
    assert torch.equal(logabsdet, kept[-1] + 1)


@each_direction
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("device", DEVICES)
def test_outputs_keep_dtype_and_device(case, direction, dtype, device):
    transform = build(case, dtype)
    inputs, context = arguments(case, transform, direction, dtype=dtype)
    inputs, context = inputs.to(device), None if context is None else context.to(device)
    for result in apply(transform.to(device), direction, inputs, context):
        assert result.dtype == dtype and result.device == inputs.device


@each_rowwise_direction
def test_float32_is_close_to_float64(case, direction):
    transform = build(case, torch.float32)
    inputs, context = arguments(case, transform, direction, dtype=torch.float32)
    rounded = apply(transform, direction, inputs, context)
    context = None if context is None else context.double()
    exact = apply(transform.double(), direction, inputs.double(), context)
    for ours, expected in zip(rounded, exact, strict=True):
        torch.testing.assert_close(ours.double(), expected, atol=1e-4, rtol=1e-4)


@each_direction
def test_inputs_are_not_modified(case, direction):
    transform = build(case)
    inputs, context = arguments(case, transform, direction)
    kept = inputs.clone()
    outputs, _ = apply(transform, direction, inputs, context)
    outputs.detach().zero_()  # nor are the outputs a view of them
    assert torch.equal(inputs, kept)


@each_rowwise_direction
def test_layout_in_memory_makes_no_difference(case, direction):
    transform = build(case)
    inputs, context = arguments(case, transform, direction)
    strided = inputs.movedim(0, -1).repeat_interleave(2, dim=-1)[..., ::2].movedim(-1, 0)
    assert not strided.is_contiguous()
    expected = apply(transform, direction, inputs, context)
    results = apply(transform, direction, strided, context)
    torch.testing.assert_close(results, expected, atol=1e-12, rtol=1e-12)


@each_rowwise_direction
def test_rows_do_not_see_one_another(case, direction):
    transform = build(case)
    inputs, context = arguments(case, transform, direction)
    outputs, logabsdet = apply(transform, direction, inputs, context)
    context = None if context is None else context[1:2]
    alone = apply(transform, direction, inputs[1:2], context)
    torch.testing.assert_close(alone, (outputs[1:2], logabsdet[1:2]), atol=1e-12, rtol=1e-12)


@each_direction
def test_no_rows_give_no_rows(case, direction):
    transform = build(case)
    inputs, context = arguments(case, transform, direction)
    outputs, _ = apply(transform, direction, inputs, context)
    context = None if context is None else context[:0]
    empty, logabsdet = apply(transform, direction, inputs[:0], context)
    assert empty.shape == (0, *outputs.shape[1:]) and logabsdet.shape == (0,)


@pairs(lambda case, direction: not case.any_shape)
def test_wrong_number_of_features_is_refused(case, direction):
    transform = build(case)
    inputs, context = arguments(case, transform, direction)
    more = torch.cat([inputs, inputs[:, :1]], dim=1)
    for wrong in (more, inputs[:, 1:], inputs[:, 0]):
        with pytest.raises(ValueError, match=r"^inputs must .*, got \("):
            apply(transform, direction, wrong, context)


@each_smooth_direction
def test_context_is_used_or_ignored(case, direction):
    transform = build(case)
    inputs, context = arguments(case, transform, direction)
    outputs, logabsdet = apply(transform, direction, inputs, context)
    other = torch.randn(ROWS, CONTEXT, dtype=torch.float64)
    changed = apply(transform, direction, inputs, other)
    if case.context == "ignored":
        assert torch.equal(changed[0], outputs) and torch.equal(changed[1], logabsdet)
        return
    assert (changed[0] != outputs).flatten(1).any(1).all()
    assert preserves_volume(transform) or (changed[1] != logabsdet).any()
    for wrong in (None, other[:, 1:]):
        with pytest.raises(ValueError, match=f"context must have {CONTEXT} features, got"):
            apply(transform, direction, inputs, wrong)


@each_case
def test_works_in_an_nflows_flow(case):
    transform = build(case, torch.float32)
    inputs, context = arguments(case, transform, "forward", dtype=torch.float32)
    outputs, logabsdet = apply(transform, "forward", inputs, context)
    normal = StandardNormal(outputs.shape[1:])
    flow = nflows.flows.Flow(transform, normal)
    torch.manual_seed(1)
    log_prob = flow.log_prob(inputs, context)
    torch.testing.assert_close(log_prob, normal.log_prob(outputs) + logabsdet)
    rows = () if context is None else (ROWS,)
    assert flow.sample(2, context).shape == (*rows, 2, *inputs.shape[1:])


@each_case
def test_works_in_an_nflows_composite(case):
    transform = build(case)
    inputs, context = arguments(case, transform, "forward")
    outputs, logabsdet = apply(transform, "forward", inputs, context)
    chain = CompositeTransform([transform, PointwiseAffineTransform(1.0, 2.0)]).double()
    results = apply(chain, "forward", inputs, context)
    theirs = results[1] - logabsdet
    expected = torch.full_like(theirs, outputs[0].numel() * math.log(2))  # made in float32
    torch.testing.assert_close(theirs, expected, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(results[0], 2 * outputs + 1)
    back = apply(chain, "inverse", results[0], context)
    total = undone(case, logabsdet) - theirs
    torch.testing.assert_close(back, (inputs, total), atol=1e-9, rtol=1e-9)


@each_case
def test_works_in_our_composite_beside_an_nflows_transform(case):
    transform = build(case)
    inputs, context = arguments(case, transform, "forward")
    logabsdet = apply(transform, "forward", inputs, context)[1]
    identity = Composite([transform, InverseTransform(transform)])
    expected = inputs, logabsdet + undone(case, logabsdet)
    for direction in OTHER:
        results = apply(identity, direction, inputs, context)
        torch.testing.assert_close(results, expected, atol=1e-9, rtol=1e-9)


class Constant(nn.Module):
    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.out_features = out_features

    def forward(self, inputs: Tensor, context: Tensor | None = None) -> Tensor:
        return inputs.new_full((len(inputs), self.out_features, *inputs.shape[2:]), 0.3)


@pytest.mark.parametrize(
    "case", [pytest.param(case, id=name) for name, case in CASES.items() if case.keeps_shape]
)
def test_works_inside_an_nflows_coupling(case):
    # It adds its own logabsdet to ours in place.
    transform = build(case)
    inputs, context = arguments(case, transform, "forward")
    outputs, logabsdet = apply(transform, "forward", inputs, context)
    mask = [0] * inputs.shape[1] + [1]
    coupling = AffineCouplingTransform(mask, Constant, lambda features: transform)
    both = torch.cat([inputs, inputs[:, :1]], dim=1)
    results, total = apply(coupling, "forward", both, context)
    assert torch.equal(results[:, :-1], outputs)
    log_scale = math.log(1 / (1 + math.exp(-2.3)) + 1e-3)
    theirs = total - logabsdet
    torch.testing.assert_close(theirs, torch.full_like(theirs, log_scale * inputs[0, 0].numel()))
    back = apply(coupling, "inverse", results, context)
    expected = both, undone(case, logabsdet) - theirs
    torch.testing.assert_close(back, expected, atol=1e-9, rtol=1e-9)


@each_smooth_direction
def test_weights_survive_a_file(case, direction):
    transform, loaded = build(case), case.make().double().eval()
    inputs, context = arguments(case, transform, direction)
    expected = apply(transform, direction, inputs, context)
    if transform.state_dict():
        assert not torch.equal(apply(loaded, direction, inputs, context)[0], expected[0])
    file = io.BytesIO()
    torch.save(transform.state_dict(), file)
    file.seek(0)
    loaded.load_state_dict(torch.load(file, weights_only=True), strict=True)
    assert all(map(torch.equal, apply(loaded, direction, inputs, context), expected))


@each_direction
def test_deep_copy_is_equal_and_apart(case, direction):
    transform = build(case)
    inputs, context = arguments(case, transform, direction)
    expected = apply(transform, direction, inputs, context)
    copied = copy.deepcopy(transform)
    assert all(map(torch.equal, apply(copied, direction, inputs, context), expected))
    for tensor in (*copied.parameters(), *copied.buffers()):
        tensor.data.zero_()
    assert all(map(torch.equal, apply(transform, direction, inputs, context), expected))


class Directed(nn.Module):
    """One direction of a transform as a forward, which functional_call needs."""

    def __init__(self, transform: Transform, direction: str) -> None:
        super().__init__()
        self.transform, self.direction = transform, direction

    def forward(self, inputs: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        return apply(self.transform, self.direction, inputs, context)


@each_smooth_direction
def test_gradients_match_finite_differences(case, direction):
    transform = build(case)
    inputs, context = arguments(case, transform, direction, rows=2)
    module = Directed(transform, direction)
    names = [name for name, _ in module.named_parameters()]

    def results(inputs: Tensor, *values: Tensor) -> tuple[Tensor, Tensor]:
        parameters = dict(zip(names, values, strict=True))
        return functional_call(module, parameters, (inputs, context))

    assert gradcheck(results, (inputs.requires_grad_(), *module.parameters()), fast_mode=True)


@each_smooth_direction
@pytest.mark.parametrize("memory", ["checkpoint", "reversible"])
def test_gradients_are_the_same_whatever_is_kept(case, direction, memory):
    transform = build(case)
    inputs, context = arguments(case, transform, direction)
    leaves = [leaf.requires_grad_() for leaf in (inputs, context) if leaf is not None]

    def gradients(layer: Transform) -> tuple[Tensor, ...]:
        outputs, logabsdet = apply(layer, direction, inputs, context)
        loss = outputs.sin().sum() + logabsdet.cos().sum()
        wanted = [*leaves, *layer.parameters()]
        return torch.autograd.grad(loss, wanted, materialize_grads=True)

    twice = [transform, InverseTransform(transform), transform]
    expected, found = (gradients(Composite(twice, memory=m)) for m in ("store", memory))
    torch.testing.assert_close(found, expected, atol=1e-7, rtol=1e-7)


@each_smooth_direction
def test_gradients_are_finite_far_out_and_at_the_edges(case, direction):
    transform = build(case, torch.float32)
    inputs, context = arguments(case, transform, direction, rows=6, dtype=torch.float32)
    values = torch.tensor([-1e3, -2.0, 0.0, 1.0, 2.0, 1e3])  # +-2 is the splines' bound
    if direction == "inverse":
        values = case.noise(values)
    elif 0 <= inputs.min() and inputs.max() <= 1:
        values = values.clamp(0, 1)
    inputs = values.view(-1, *[1] * (inputs.ndim - 1)).expand_as(inputs).clone().requires_grad_()
    outputs, logabsdet = apply(transform, direction, inputs, context)
    (outputs.square().sum() - logabsdet.sum()).backward()
    for tensor in (outputs, logabsdet, *(leaf.grad for leaf in (inputs, *transform.parameters()))):
        assert tensor is not None and tensor.isfinite().all()


@each_smooth_direction
@settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    exponents=st.lists(st.floats(-8, 6), max_size=6),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    seed=st.integers(0, 2**32),
)
def test_any_magnitude_of_any_row_goes_there_and_back(case, direction, exponents, dtype, seed):
    torch.manual_seed(seed)
    transform = build(case, dtype)
    inputs, context = arguments(case, transform, direction, rows=len(exponents), dtype=dtype)
    scale = torch.tensor([10.0**k for k in exponents], dtype=dtype)
    scale = scale.view(-1, *[1] * (inputs.ndim - 1))
    if (case.inputs(100) < 0).any():
        inputs = case.noise(inputs * scale) if direction == "inverse" else inputs * scale
    elif direction == "forward" and not case.stochastic:
        inputs = (inputs * scale).clamp(0, 1)  # their domain, with its edges
    outputs, logabsdet = apply(transform, direction, inputs, context)
    assert outputs.dtype == logabsdet.dtype == dtype and logabsdet.shape == (len(exponents),)
    assert outputs.isfinite().all() and logabsdet.isfinite().all()
    if dtype == torch.float64:
        back, undoing = apply(transform, OTHER[direction], outputs, context)
        unit = inputs.flatten(1).abs().amax(1).clamp_min(1) if inputs.numel() else scale.flatten()
        error = (back - inputs).flatten(1).abs().amax(1) if inputs.numel() else scale.flatten()
        assert (error <= 1e-6 * unit).all()
        torch.testing.assert_close(undoing, undone(case, logabsdet), atol=1e-6, rtol=1e-6)


@each_smooth_direction
def test_second_derivatives_match_finite_differences(case, direction):
    transform = build(case)
    if getattr(transform, "memory", "store") == "reversible":
        return  # says that it has none
    inputs, context = arguments(case, transform, direction, rows=2)

    def results(inputs: Tensor) -> tuple[Tensor, Tensor]:
        return apply(transform, direction, inputs, context)

    assert gradgradcheck(results, (inputs.requires_grad_(),), fast_mode=True)
