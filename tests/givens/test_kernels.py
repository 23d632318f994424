"""The Triton kernels: on a GPU if there is one, else in Triton's interpreter (conftest.py)."""

import math
import os
import subprocess
import sys

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vmap

from flows import givens
from flows.givens import Schedule

triton = pytest.importorskip("triton")
from flows.givens import kernels  # noqa: E402 - only where triton is

# Torch itself scripts a few functions when forward mode is first used.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SCHEDULES = [
    givens.crossing(2),
    givens.crossing(8),
    givens.round_robin(6),
    givens.round_robin(7),
    givens.cosine_sine(8),
    givens.hurwitz(5),
    givens.butterfly(16),
    givens.crossing(9).frame(2),
    givens.odd_even(7).blocks(3),
    Schedule(6, [[(4, 5)], [(0, 5), (1, 2)], [(4, 5)]]),
    givens.butterfly(130),  # too long for shuffles
]

both_ways = pytest.mark.parametrize("inverse", [False, True], ids=["forward", "inverse"])
both_angles = pytest.mark.parametrize("per_sample", [False, True], ids=["shared", "per-sample"])


def draw(schedule, batch, per_sample, dtype=torch.float64):
    """Vectors, angles that fit them, and a gradient."""
    x, weight = (torch.randn(*batch, schedule.dim, dtype=dtype, device=DEVICE) for _ in range(2))
    shape = *(batch if per_sample else ()), schedule.num_angles
    return x, torch.randn(shape, dtype=dtype, device=DEVICE), weight


def run(x, angles, weight, schedule, impl, inverse=False):
    """Output and gradients of x and angles."""
    x, angles = x.detach().requires_grad_(), angles.detach().requires_grad_()
    y = givens.rotate(x, angles, schedule, inverse=inverse, impl=impl)
    return y.detach(), *torch.autograd.grad(y, (x, angles), weight)


def error(value, exact):
    return (value - exact).abs().max().item()


# --- values and gradients -------------------------------------------------------------------


@both_ways
@both_angles
@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_rotate_and_its_gradients_agree_with_the_reference(schedule, per_sample, inverse):
    inputs = *draw(schedule, (5,), per_sample), schedule
    fast, plain = (run(*inputs, impl, inverse) for impl in ("triton", "reference"))
    torch.testing.assert_close(fast, plain)


@both_angles
@pytest.mark.parametrize("dim", [3, 16])
def test_float32_is_as_close_to_float64_as_the_reference(dim, per_sample):
    schedule = givens.crossing(dim)
    inputs = draw(schedule, (21,), per_sample, torch.float32)
    exact = run(*(x.double() for x in inputs), schedule, "reference")
    plain, fast = (run(*inputs, schedule, impl) for impl in ("reference", "triton"))
    # An angle's gradient is a sum of products of outputs and incoming gradients.
    terms = 1, 1, inputs[0].abs().max().item() * inputs[2].abs().max().item()
    for f, p, e, term in zip(fast, plain, exact, terms, strict=True):
        assert f.dtype == torch.float32
        ulp = torch.finfo(torch.float32).eps * max(e.abs().max().item(), term)
        assert error(f, e) <= 2 * (error(p, e) + ulp)


@both_angles
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_is_computed_in_float32(dtype, per_sample):
    schedule = givens.odd_even(5)
    inputs = draw(schedule, (3,), per_sample, dtype)
    exact = run(*(x.double() for x in inputs), schedule, "reference")
    for index, (fast, value) in enumerate(
        zip(run(*inputs, schedule, "triton"), exact, strict=True)
    ):
        assert fast.dtype == dtype
        # The interpreter cuts bfloat16 off. Gradients of angles start from a rounded output.
        once = 0.51 if DEVICE == "cuda" else 1.01
        ulps = [once, once, 4 * schedule.dim][index]
        assert error(fast, value) <= ulps * torch.finfo(dtype).eps * value.abs().max()


@pytest.mark.parametrize("batch", [(), (1,), (3,), (2, 2), (0,)], ids=str)
@pytest.mark.parametrize("schedule", [givens.crossing(3), givens.butterfly(16)], ids=str)
def test_matrix_and_its_gradient_agree_with_the_reference(schedule, batch):
    n, results = schedule.dim, []
    angles = torch.randn(*batch, schedule.num_angles, dtype=torch.float64, device=DEVICE)
    weight = torch.randn(*batch, n, n, dtype=torch.float64, device=DEVICE)
    for impl in ("triton", "reference"):
        leaf = angles.clone().requires_grad_()
        u = givens.matrix(leaf, schedule, impl=impl)
        assert u.shape == (*batch, n, n)
        results.append((u.detach(), torch.autograd.grad(u, leaf, weight)[0]))
    torch.testing.assert_close(*results)


@both_angles
@pytest.mark.parametrize("batch", [(), (1,), (63,), (2, 3), (0,), (2, 0)], ids=str)
def test_any_batch_will_do(batch, per_sample):
    schedule = givens.crossing(3)
    inputs = *draw(schedule, batch, per_sample), schedule
    torch.testing.assert_close(run(*inputs, "triton"), run(*inputs, "reference"))


@both_angles
@pytest.mark.parametrize(("dim", "rows"), [(4, 300), (130, 9)])
def test_several_launches_do_as_one(dim, rows, per_sample, monkeypatch):
    schedule = givens.butterfly(dim).first_rounds(2)
    inputs = *draw(schedule, (rows,), per_sample), schedule
    init = kernels._Launch.__init__

    def narrow(launch, *args, **kwargs):
        init(launch, *args, **kwargs)
        launch.span = 2

    plain = run(*inputs, "triton")
    monkeypatch.setattr(kernels._Launch, "__init__", narrow)
    torch.testing.assert_close(run(*inputs, "triton"), plain)


def test_a_quarter_turn_takes_the_first_axis_to_the_second():
    angles = torch.tensor([math.pi / 2], dtype=torch.float64, device=DEVICE)
    u = givens.matrix(angles, givens.crossing(2), impl="triton")
    expected = torch.tensor([[0.0, -1.0], [1.0, 0.0]], dtype=torch.float64, device=DEVICE)
    torch.testing.assert_close(u, expected, rtol=0, atol=1e-15)


# --- manners --------------------------------------------------------------------------------


@both_angles
def test_memory_layout_does_not_matter_and_nothing_is_written_to(per_sample):
    schedule = givens.crossing(5)
    inputs = draw(schedule, (6,), per_sample)
    plain = run(*inputs, schedule, "triton")
    strided = [t.repeat_interleave(2, -1)[..., ::2] for t in inputs]
    turned = [t.mT.contiguous().mT if t.ndim > 1 else t for t in inputs]
    for others in (strided, turned):
        before = [t.clone() for t in others]
        torch.testing.assert_close(run(*others, schedule, "triton"), plain, rtol=0, atol=0)
        assert all(map(torch.equal, others, before))


@both_angles
def test_a_repetition_gives_the_same_bits(per_sample):
    schedule = givens.crossing(6)
    inputs = *draw(schedule, (300,), per_sample, torch.float32), schedule
    assert all(map(torch.equal, run(*inputs, "triton"), run(*inputs, "triton")))


def test_nan_angle_spoils_its_own_sample_and_no_other():
    schedule = givens.crossing(5)
    x, angles, _ = draw(schedule, (3,), per_sample=True)
    angles[1, -1] = math.nan
    spoiled = torch.zeros(3, 5, dtype=torch.bool)
    spoiled[1, schedule.planes[-1]] = True
    y = givens.rotate(x, angles, schedule, impl="triton")
    assert torch.equal(y.isnan().cpu(), spoiled)


@pytest.mark.parametrize("per_sample", [False, True])
def test_only_the_output_and_the_angles_are_kept(per_sample):
    schedule, kept = givens.butterfly(16), []
    x, angles, _ = draw(schedule, (8,), per_sample)
    x.requires_grad_(), angles.requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: kept.append(tensor.nbytes), lambda tensor: tensor
    ):
        givens.rotate(x, angles, schedule, impl="triton")
    assert 0 < sum(kept) <= x.nbytes + angles.nbytes


def test_what_cannot_be_done_is_refused_in_plain_words(monkeypatch):
    wide = Schedule(10_000, [[(0, 9_999)]])
    with pytest.raises(ValueError, match="turns at most 8192 axes, got 10000"):
        givens.matrix(torch.zeros(1, device=DEVICE), wide, impl="triton")
    monkeypatch.setattr(triton, "JITFunction", object)
    with pytest.raises(ValueError, match="needs tensors on a GPU, or TRITON_INTERPRET=1 .* cpu"):
        givens.matrix(torch.zeros(1), givens.crossing(2), impl="triton")


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.delitem(sys.modules, "flows.givens.kernels")
    monkeypatch.delattr(givens, "kernels")
    with pytest.raises(ImportError, match=r"pip install givens-flows\[triton\]"):
        givens.matrix(torch.zeros(1), givens.crossing(2), impl="triton")


# --- derivatives of derivatives, transforms, compiler ---------------------------------------


@both_ways
@both_angles
def test_derivatives_agree_with_finite_differences(per_sample, inverse):
    schedule = givens.crossing(3)
    x, angles, _ = draw(schedule, (2,), per_sample)
    inputs = x.requires_grad_(), angles.requires_grad_()

    def function(x, angles):
        return givens.rotate(x, angles, schedule, inverse=inverse, impl="triton")

    assert gradcheck(function, inputs, fast_mode=True, check_forward_ad=True)
    assert gradgradcheck(function, inputs, fast_mode=True)


COMPOSED = {
    "grad": grad,
    "reverse over reverse": lambda f: jacrev(jacrev(f)),
    "forward over reverse": hessian,
    "reverse over forward": lambda f: jacrev(jacfwd(f)),
    "vmap of grad": lambda f: lambda a: vmap(grad(f))(torch.stack([a, 2 * a])),
    "grad of vmap": lambda f: grad(lambda a: vmap(f)(torch.stack([a, 2 * a])).sum()),
    "vmap of jvp": lambda f: lambda a: vmap(lambda v: jvp(f, (a,), (v,))[1])(a.outer(a)),
}


def loss(x, schedule, impl):
    def of_angles(a):
        y, u = givens.rotate(x, a, schedule, impl=impl), givens.matrix(a, schedule, impl=impl)
        return y.pow(3).sum() + u.pow(3).sum()

    return of_angles


@pytest.mark.parametrize("composed", COMPOSED)
def test_function_transforms_agree_with_the_reference(composed):
    schedule = givens.crossing(3)
    x, angles, _ = draw(schedule, (2,), per_sample=False)
    fast, plain = (
        COMPOSED[composed](loss(x, schedule, impl))(angles) for impl in ("triton", "reference")
    )
    torch.testing.assert_close(fast, plain)


COMPILED = """
import torch
from flows import givens

schedule = givens.crossing(3)
angles = torch.randn(3, dtype=torch.float64, device="DEVICE", requires_grad=True)
x = torch.randn(2, 3, dtype=torch.float64, device="DEVICE")

def loss(angles, impl):
    y = givens.rotate(x, angles, schedule, impl=impl)
    return y.pow(3).sum() + givens.matrix(angles, schedule, impl=impl).pow(3).sum()

compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
fast = torch.autograd.grad(compiled(angles, "triton"), angles)
plain = torch.autograd.grad(loss(angles, "reference"), angles)
torch.testing.assert_close(fast, plain)
"""

# What a GPU of compute capability 9.0 would run, made without one.
TRANSLATED = """
import triton, triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from flows.givens import kernels

def translate(kernel, n, cols, own, back):
    values = {"DIM": n, "N": n, "COLS": cols, "OWN": own, "BACKWARDS": back,
              "SHUFFLE": n <= kernels.SHUFFLE_UP_TO, "REAL": tl.float32}
    integers = {"turn_ptr", "start_ptr"}
    types = {
        name: "constexpr" if name in values else "*i32" if name in integers
        else "*fp32" if name.endswith("_ptr") else "i32" for name in kernel.arg_names
    }
    source = ASTSource(kernel, types, values)
    target = GPUTarget("cuda", 90, 32)
    return triton.compile(source, target=target, options={"num_warps": 1}).asm["ptx"]

for ptx in (translate(kernels._rotate_kernel, 16, 16, False, True),
            translate(kernels._pull_kernel, 16, 16, False, True)):
    assert "fma.rn.f32" in ptx and "shfl.sync" in ptx
    # No spills, tensor cores or atomics, and cosines come from outside.
    assert not any(word in ptx for word in (".local", "mma.sync", "wgmma", "atom.", ".approx"))
ptx = translate(kernels._pull_kernel, 256, 4, True, False)
assert "bar.sync" in ptx and ".approx" not in ptx and "atom." not in ptx
"""


@pytest.mark.parametrize("code", [COMPILED, TRANSLATED], ids=["torch.compile", "for a GPU"])
def test_kernels_can_be_compiled(code):
    # In processes of their own: the compilers cannot look into this run's type checks.
    environment = dict(os.environ)
    if code is TRANSLATED:
        environment.pop("TRITON_INTERPRET", None)
    code = code.replace("DEVICE", DEVICE)
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)
