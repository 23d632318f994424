"""Rational-quadratic splines by every engine, against their definition and nflows'."""

import math
from importlib.util import find_spec

import pytest
import torch
from nflows.transforms.splines import unconstrained_rational_quadratic_spline
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from flows.splines import dispatch, rational_quadratic_spline, spline_parameters
from flows.splines.plain import MIN_BIN, MIN_SLOPE

# Forward mode loads decompositions that torch scripts.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")

BINS = 6
BOUND = 3.0
FLOAT64 = torch.float64
each_direction = pytest.mark.parametrize("inverse", [False, True], ids=["forward", "inverse"])
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, FLOAT64], ids=str)


@pytest.fixture(params=["plain", "compiled"], autouse=True)
def engine(request, monkeypatch):
    """Every test runs with both engines."""
    if request.param == "compiled" and not find_spec("numba"):
        pytest.skip("needs numba")
    monkeypatch.setattr(dispatch, "HAS_NUMBA", request.param == "compiled")


def parameters(*shape: int, scale: float = 1.0, dtype: torch.dtype = FLOAT64) -> Tensor:
    return scale * torch.randn(*shape, spline_parameters(BINS), dtype=dtype)


def inside(*shape: int, dtype: torch.dtype = FLOAT64) -> Tensor:
    return BOUND * (2 * torch.rand(*shape, dtype=dtype) - 1)


def spline(inputs: Tensor, raw: Tensor, inverse: bool = False) -> tuple[Tensor, Tensor]:
    return rational_quadratic_spline(inputs, raw, tail_bound=BOUND, inverse=inverse)


# --- values -------------------------------------------------------------------------------------


def definition(x: float, raw: list[float]) -> tuple[float, float]:
    """Value and log slope of one spline at one place, from the paper's equations 4 and 5."""

    def knots(values: list[float]) -> list[float]:
        total = math.fsum(math.exp(value) for value in values)
        places = [-BOUND]
        for value in values:
            fraction = MIN_BIN / BINS + (1 - MIN_BIN) * math.exp(value) / total
            places.append(places[-1] + 2 * BOUND * fraction)
        return places

    if abs(x) > BOUND:
        return x, 0.0
    xs, ys = knots(raw[:BINS]), knots(raw[BINS : 2 * BINS])
    shift = math.log(math.expm1(1 - MIN_SLOPE))
    inner = [MIN_SLOPE + math.log1p(math.exp(value + shift)) for value in raw[2 * BINS :]]
    slopes = [1.0, *inner, 1.0]
    k = max(k for k in range(BINS) if xs[k] <= x)
    w, h = xs[k + 1] - xs[k], ys[k + 1] - ys[k]
    s, d0, d1, t = h / w, slopes[k], slopes[k + 1], (x - xs[k]) / w
    below = s + (d1 + d0 - 2 * s) * t * (1 - t)
    y = ys[k] + h * (s * t**2 + d0 * t * (1 - t)) / below
    above = d1 * t**2 + 2 * s * t * (1 - t) + d0 * (1 - t) ** 2
    return y, math.log(s**2 * above / below**2)


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_equals_the_definition(scale):
    x, raw = 1.2 * inside(300), parameters(300, scale=scale)
    rows = zip(x.tolist(), raw.tolist(), strict=True)
    y, log_slope = torch.tensor([definition(*row) for row in rows], dtype=FLOAT64).unbind(-1)
    torch.testing.assert_close(spline(x, raw), (y, log_slope), atol=1e-12, rtol=1e-12)
    back = spline(y, raw, inverse=True)
    torch.testing.assert_close(back, (x, -log_slope), atol=1e-9, rtol=1e-9)


def nflows_spline(inputs: Tensor, raw: Tensor, inverse: bool = False) -> tuple[Tensor, Tensor]:
    """The same knots and slopes from nflows, whose raw slopes have another origin."""
    widths, heights, slopes = raw.split([BINS, BINS, BINS - 1], dim=-1)
    return unconstrained_rational_quadratic_spline(
        inputs,
        widths,
        heights,
        slopes + math.log(math.expm1(1 - MIN_SLOPE)),
        inverse=inverse,
        tail_bound=BOUND,
        min_bin_width=MIN_BIN / BINS,
        min_bin_height=MIN_BIN / BINS,
        min_derivative=MIN_SLOPE,
    )


@each_direction
@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_equals_the_spline_of_nflows(inverse, scale):
    x, raw = 1.2 * inside(2000), parameters(2000, scale=scale)
    results, expected = spline(x, raw, inverse), nflows_spline(x, raw, inverse)
    torch.testing.assert_close(results, expected, atol=1e-10, rtol=1e-10)


@each_direction
def test_float32_is_as_close_to_float64_as_that_of_nflows(inverse):
    x, raw = 1.2 * inside(20_000, dtype=torch.float32), parameters(20_000, dtype=torch.float32)
    exact = spline(x.double(), raw.double(), inverse)
    ours, theirs = spline(x, raw, inverse), nflows_spline(x, raw, inverse)
    for fast, plain, truth in zip(ours, theirs, exact, strict=True):
        budget = 2 * ((plain - truth).abs().mean() + torch.finfo(torch.float32).eps * BOUND)
        assert (fast - truth).abs().mean() <= budget


@each_direction
def test_zero_parameters_are_the_identity(inverse):
    x = 1.5 * inside(200)
    y, log_slope = spline(x, torch.zeros(spline_parameters(BINS)).double(), inverse)
    torch.testing.assert_close(y, x, atol=1e-12, rtol=0)
    torch.testing.assert_close(log_slope, torch.zeros_like(x), atol=1e-12, rtol=0)


@each_direction
def test_rises_strictly_and_fills_the_interval(inverse):
    x = torch.linspace(-BOUND, BOUND, 5001, dtype=FLOAT64)
    y, log_slope = spline(x.expand(20, -1), parameters(20, 1, scale=2.0), inverse)
    assert (y.diff() > 0).all() and log_slope.isfinite().all()
    torch.testing.assert_close(y[:, [0, -1]], x[[0, -1]].expand(20, 2))


@each_direction
@pytest.mark.parametrize("side", [-1, 1])
def test_joins_the_identity_smoothly(inverse, side):
    raw = parameters(200)
    end = torch.full((200,), side * BOUND, dtype=FLOAT64)
    y, log_slope = spline(end * (1 - 1e-10), raw, inverse)
    torch.testing.assert_close(y, end, atol=1e-8, rtol=0)
    torch.testing.assert_close(log_slope, torch.zeros_like(end), atol=1e-6, rtol=0)


@each_direction
@each_dtype
def test_is_exactly_the_identity_outside(inverse, dtype):
    ends = torch.tensor([BOUND * (1 + 1e-6), 10.0, 1e6, 1e30, math.inf], dtype=dtype)
    x = torch.cat([ends, -ends])
    y, log_slope = spline(x, parameters(len(x), dtype=dtype), inverse)
    assert torch.equal(y, x) and torch.equal(log_slope, torch.zeros_like(x))


def test_nan_stays_nan():
    x = torch.tensor([math.nan, 0.5], dtype=FLOAT64)
    raw = parameters(2)
    assert spline(x, raw)[0].isnan().tolist() == [True, False]
    raw[1, 0] = math.nan
    for results in (spline(x, raw), spline(x, raw, inverse=True)):
        assert all(result[1].isnan() for result in results)


# --- extremes -----------------------------------------------------------------------------------


@each_direction
@pytest.mark.parametrize("scale", [1.0, 10.0, 1e4])
def test_gradients_are_finite_at_the_bounds_and_outside(inverse, scale):
    below = math.nextafter(BOUND, 0)
    # From 1e30 on an unclamped spline would overflow, and its gradient be NaN behind the mask.
    ends = torch.tensor([0.0, below, BOUND, BOUND * (1 + 1e-6), 10.0, 1e6, 1e30, math.inf])
    x = torch.cat([ends, -ends]).requires_grad_()
    raw = parameters(len(x), scale=scale, dtype=torch.float32).requires_grad_()
    y, log_slope = spline(x, raw, inverse)
    (y.sum() + log_slope.sum()).backward()
    assert x.grad.isfinite().all() and raw.grad.isfinite().all()
    outside = x.abs() > BOUND
    assert (x.grad[outside] == 1).all() and (raw.grad[outside] == 0).all()


@each_direction
@each_dtype
@pytest.mark.parametrize("scale", [20.0, 1e4])
def test_survives_extreme_parameters(inverse, scale, dtype):
    x = inside(20_000, dtype=dtype).requires_grad_()
    raw = parameters(20_000, scale=scale, dtype=dtype).requires_grad_()
    y, log_slope = spline(x, raw, inverse)
    (y.sum() + log_slope.sum()).backward()
    for tensor in (y, log_slope, x.grad, raw.grad):
        assert tensor.isfinite().all()
    assert y.abs().max() <= BOUND * (1 + 8 * torch.finfo(dtype).eps)


def test_inverse_of_extreme_splines_is_wrong_by_rounding_only():
    # Slopes of 20 at the ends of bins many times as wide as high: one way to solve the
    # quadratic equation subtracts nearly equal numbers there.
    raw, y = 20 * parameters(20_000).sign(), inside(20_000)
    x, _ = spline(y, raw, inverse=True)
    again, log_slope = spline(x, raw)
    rounding = torch.finfo(FLOAT64).eps * BOUND * (1 + log_slope.exp())
    assert (again - y).abs().le(100 * rounding).all()


@each_direction
def test_extreme_splines_are_finite_at_their_knots(inverse):
    # In single precision a value beside a knot may end up outside its bin, where the formula
    # need not rise.
    raw = 20 * parameters(2000, dtype=torch.float32).sign()
    shares = raw[:, BINS : 2 * BINS] if inverse else raw[:, :BINS]
    sizes = MIN_BIN / BINS + (1 - MIN_BIN) * shares.double().softmax(-1)
    knots = (BOUND * (2 * sizes.cumsum(-1) - 1)).float()
    beside = torch.nextafter(knots, torch.tensor(-math.inf)), knots
    for x in (*beside, torch.nextafter(knots, torch.tensor(math.inf))):
        y, log_slope = spline(x, raw.unsqueeze(1), inverse)
        assert y.isfinite().all() and log_slope.abs().max() < 20


# --- derivatives --------------------------------------------------------------------------------


@each_direction
@pytest.mark.parametrize("splines", [(5, 2), (2,), (1, 2), (5, 1)], ids=str)
def test_gradients_of_every_order_and_mode(inverse, splines):
    x = (1.2 * inside(5, 2)).requires_grad_()
    raw = parameters(*splines).requires_grad_()

    def function(x: Tensor, raw: Tensor) -> tuple[Tensor, Tensor]:
        return spline(x, raw, inverse)

    assert gradcheck(function, (x, raw), check_forward_ad=True, check_batched_grad=True)
    assert gradgradcheck(function, (x, raw))


@each_direction
def test_functional_transforms(inverse):
    x, raw = 1.2 * inside(4, 3), parameters(4, 3)

    def total(x: Tensor, raw: Tensor) -> Tensor:
        y, log_slope = spline(x, raw, inverse)
        return (y.sin() + log_slope).sum()

    gradients = torch.autograd.functional.jacobian(total, (x, raw))
    torch.testing.assert_close(torch.func.grad(total, (0, 1))(x, raw), gradients)
    torch.testing.assert_close(torch.func.jacfwd(total, (0, 1))(x, raw), gradients)
    by_rows = torch.func.vmap(torch.func.grad(total, (0, 1)))(x, raw)
    torch.testing.assert_close(by_rows, gradients)
    of_one = torch.func.vmap(total, (None, 1))(x[:, 0], raw)
    expected = torch.stack([total(x[:, 0], raw[:, k]) for k in range(3)])
    torch.testing.assert_close(of_one, expected)
    hessian = torch.autograd.functional.hessian(total, (x, raw))
    torch.testing.assert_close(torch.func.hessian(total, (0, 1))(x, raw), hessian)


# --- shapes and types ---------------------------------------------------------------------------


def test_parameters_broadcast_over_the_inputs():
    x, raw = inside(4, 5, 3), parameters(3)
    expected = spline(x, raw.expand(4, 5, 3, -1).contiguous())
    torch.testing.assert_close(spline(x, raw), expected, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("shape", [(0,), (0, 3), (3, 0)], ids=str)
@pytest.mark.parametrize("own", [False, True], ids=["shared", "own"])
def test_nothing_gives_nothing(shape, own):
    x = torch.empty(shape, requires_grad=True)
    raw = parameters(*(shape if own else shape[-1:]), dtype=torch.float32).requires_grad_()
    y, log_slope = spline(x, raw)
    assert y.shape == log_slope.shape == shape
    (y.sum() + log_slope.sum()).backward()
    assert x.grad.shape == shape and not raw.grad.any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_computed_in_single(dtype):
    x, raw = inside(50).to(dtype), parameters(50).to(dtype)
    expected = [result.to(dtype) for result in spline(x.float(), raw.float())]
    assert all(map(torch.equal, spline(x, raw), expected))
    mixed = spline(x.float(), raw)  # as under autocast
    assert all(map(torch.equal, mixed, spline(x.float(), raw.float())))


@pytest.mark.parametrize(
    "raw", [torch.zeros(4, 3), torch.zeros(3, 16), torch.zeros(4, 2), torch.tensor(0.0)], ids=str
)
def test_parameters_that_do_not_fit_are_refused(raw):
    with pytest.raises(ValueError, match=r"^parameters must broadcast to \(4,\) and, .*, got \("):
        spline(torch.zeros(4), raw)


@pytest.mark.parametrize("bound", [0.0, -1.0, math.nan])
def test_a_bound_that_is_not_positive_is_refused(bound):
    with pytest.raises(ValueError, match="^tail_bound must be finite and greater than 0, got "):
        rational_quadratic_spline(torch.zeros(2), torch.zeros(2, 5), tail_bound=bound)


def test_a_spline_of_one_bin_is_refused():
    with pytest.raises(ValueError, match=r"^bins must be at least 2, got 1\.$"):
        spline_parameters(1)
