"""What only compiled splines do: blocks, layouts in memory, threads, fallbacks."""

import math
import subprocess
import sys

import pytest
import torch
from torch import Tensor

pytest.importorskip("numba")

from flows.splines import compiled, plain, rational_quadratic_spline  # noqa: E402
from flows.splines.loops import CHUNK, LANES, SHORT, exp, log  # noqa: E402

BOUND = 3.0
BINS = 5
FLOAT64 = torch.float64
each_direction = pytest.mark.parametrize("inverse", [False, True], ids=["forward", "inverse"])


def given(shape: tuple[int, ...], splines: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    x = 1.2 * BOUND * (2 * torch.rand(shape, dtype=FLOAT64) - 1)
    return x, torch.randn(*splines, 3 * BINS - 1, dtype=FLOAT64)


def results(engine, x: Tensor, raw: Tensor, inverse: bool) -> tuple[Tensor, ...]:
    """Values, log slopes and the gradients of both tensors, from weights of two kinds."""
    x, raw = x.detach().requires_grad_(), raw.detach().requires_grad_()
    torch.manual_seed(1)
    grad = torch.randn(x.shape, dtype=x.dtype)
    grad_log = torch.randn((), dtype=x.dtype).expand(x.shape)  # as a sum hands it back
    if engine is compiled:
        y, log_slope = compiled.spline(x, raw, BOUND, inverse)
        return y, log_slope, *compiled.pull(x, raw, grad, grad_log, BOUND, inverse)
    y, log_slope = plain.spline(x, raw, BOUND, inverse)
    return y, log_slope, *torch.autograd.grad((y, log_slope), (x, raw), (grad, grad_log))


def check(x: Tensor, raw: Tensor, inverse: bool) -> None:
    for fast, expected in zip(
        results(compiled, x, raw, inverse), results(plain, x, raw, inverse), strict=True
    ):
        torch.testing.assert_close(fast, expected, atol=1e-9, rtol=1e-9)


# --- blocks and layouts -------------------------------------------------------------------------


@each_direction
@pytest.mark.parametrize("count", [1, LANES - 1, LANES, LANES + 1, 3 * LANES + 7])
def test_any_number_of_splines(count, inverse):
    check(*given((count,), (count,)), inverse)


@each_direction
@pytest.mark.parametrize("count", [2, LANES + 1, CHUNK, CHUNK + 1, 2 * CHUNK + 70])
def test_any_number_of_inputs_of_one_spline(count, inverse):
    check(*given((count, 3), (1, 3)), inverse)


@each_direction
@pytest.mark.parametrize("features", [1, SHORT - 1, SHORT, SHORT + 1, LANES + 3])
def test_parameters_are_read_where_they_lie(features, inverse):
    x, raw = given((9, features), (9, features))
    strided = raw.movedim(-1, 1).contiguous().movedim(1, -1)  # as couplings hand them over
    check(x, strided, inverse)
    check(x.mT.contiguous().mT, strided, inverse)
    check(x[:, ::2], strided[:, ::2], inverse)


@each_direction
@pytest.mark.parametrize(
    ("shape", "splines"),
    [
        ((6, 4, 5, 3), (1, 1, 1, 3)),  # images, a spline for each channel
        ((6, 4, 5, 3), (6, 1, 1, 3)),  # and image
        ((6, 3, 4, 5), (6, 3, 4, 5)),
        ((6, 3, 4, 5), (6, 1, 4, 1)),
        ((6, 3), (1, 1)),
        ((1, 3), (1, 1)),
        ((), ()),
    ],
    ids=str,
)
def test_any_axes_may_share_splines(shape, splines, inverse):
    check(*given(shape, splines), inverse)


def test_channels_last_and_expanded_parameters():
    x, raw = given((2, 3, 4, 5), (2, 3, 4, 5))
    last = raw.permute(0, 4, 1, 2, 3).flatten(1, 2).to(memory_format=torch.channels_last)
    check(x, last.unflatten(1, (-1, 3)).movedim(1, -1), False)
    check(x, raw[:, :, :1, :1].expand(2, 3, 4, 5, -1), False)


def test_gradients_of_parameters_lie_as_the_parameters_do():
    x, raw = given((9, 10), (9, 10))
    strided = raw.movedim(-1, 1).contiguous().movedim(1, -1)
    _, _, _, draw = results(compiled, x, strided, False)
    assert draw.stride() == strided.stride()


@pytest.mark.parametrize("bins", [2, 3, 16, 33])
def test_any_number_of_bins(bins):
    x, _ = given((70, 3), (1,))
    check(x, torch.randn(70, 3, 3 * bins - 1, dtype=FLOAT64), False)


# --- numbers ------------------------------------------------------------------------------------


@each_direction
@pytest.mark.parametrize("scale", [1.0, 20.0])
def test_float32_is_wrong_by_its_own_rounding_only(scale, inverse):
    x, raw = given((500, 3), (500, 3))
    x, raw = x.float(), (scale * raw).float()
    single = results(compiled, x, raw, inverse)
    double = results(compiled, x.double(), raw.double(), inverse)[:2]
    assert all(map(torch.equal, single[:2], [result.float() for result in double]))
    assert all(result.dtype == torch.float32 for result in single)


@pytest.mark.parametrize("scale", [1.0, 20.0])
def test_a_round_trip_loses_what_rounding_the_output_loses(scale):
    x, raw = given((20_000,), (20_000,))
    x, raw = x.clamp(-BOUND, BOUND).float(), (scale * raw).float()
    y, _ = compiled.spline(x, raw, BOUND, False)
    back, _ = compiled.spline(y, raw, BOUND, True)
    exact, _ = compiled.spline(x.double(), raw.double(), BOUND, False)
    error = 2 * torch.finfo(torch.float32).eps * exact.abs()
    low, high = (
        compiled.spline((exact + side).clamp(-BOUND, BOUND), raw.double(), BOUND, True)[0]
        for side in (-error, error)
    )
    slack = torch.finfo(torch.float32).eps * BOUND
    assert (back >= low - slack).all() and (back <= high + slack).all()


def test_exponential_and_logarithm_are_exact_to_rounding():
    for x in torch.linspace(-700, 0, 3001, dtype=FLOAT64).tolist():
        assert math.isclose(exp(x), math.exp(x), rel_tol=4e-16)
    assert exp(-math.inf) < 1e-300 and math.isnan(exp(math.nan)) and math.isnan(log(math.nan))
    for x in torch.logspace(-300, 300, 3001, dtype=FLOAT64).tolist() + [1 + 1e-12, 1 - 1e-12]:
        assert math.isclose(log(x), math.log(x), rel_tol=4e-16)


def test_threads_give_the_same_bits(monkeypatch):
    monkeypatch.setattr(compiled, "INPUTS_PER_THREAD", 1)
    before = torch.get_num_threads()
    for shapes in (((300, 3), (300, 3)), ((3000, 2), (1, 2))):
        x, raw = given(*shapes)
        found = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append(results(compiled, x, raw, False))
        torch.set_num_threads(before)
        assert all(map(torch.equal, *found))


# --- with the rest of torch ---------------------------------------------------------------------


def test_nothing_is_kept_but_inputs_and_parameters():
    x, raw = (tensor.requires_grad_() for tensor in given((50, 3), (50, 3)))
    kept = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor.data_ptr())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        rational_quadratic_spline(x, raw, tail_bound=BOUND)
    assert set(kept) == {x.data_ptr(), raw.data_ptr()}


COMPILED = """
import torch
from flows.splines import rational_quadratic_spline

x, raw = torch.randn(40, 3), torch.randn(40, 3, 14, requires_grad=True)

def function(x, raw):
    return rational_quadratic_spline(x, raw, tail_bound=3.0)

def results(function):
    y, log_slope = function(x, raw)
    return y, log_slope, torch.autograd.grad((y.sin() + log_slope).sum(), raw)[0]

compiled = results(torch.compile(function, fullgraph=True, backend="aot_eager"))
torch.testing.assert_close(compiled, results(function), atol=1e-4, rtol=1e-4)

class Layer(torch.nn.Module):
    def forward(self, x, raw):
        return function(x, raw)

program = torch.export.export(Layer(), (x, raw))
torch.testing.assert_close(program.module()(x, raw), function(x, raw), atol=1e-4, rtol=1e-4)
"""


def test_the_compiler_sees_plain_operations():
    # In a process of its own: the compiler cannot look into this run's type checks.
    subprocess.run([sys.executable, "-c", COMPILED], check=True)
