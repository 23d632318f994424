import math
import subprocess
import sys

import pytest
import torch
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vmap

from flows import givens
from flows.givens import Schedule, dispatch

# Torch itself scripts a few functions when forward mode is first used.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")

# A new implementation is one more name here.
FAST = ["rounds", "compiled"]
CONSTRUCTORS = ["round_robin", "odd_even", "crossing", "cosine_sine", "hurwitz", "butterfly"]

every_impl = pytest.mark.parametrize("impl", ["reference", "auto", *FAST])
every_fast = pytest.mark.parametrize("impl", FAST)
both_ways = pytest.mark.parametrize("inverse", [False, True], ids=["forward", "inverse"])
both_angles = pytest.mark.parametrize("per_sample", [False, True], ids=["shared", "per-sample"])


def draw(schedule, batch, per_sample, dtype=torch.float32):
    """Vectors and angles that fit each other."""
    x = torch.randn(*batch, schedule.dim, dtype=dtype)
    return x, torch.randn(*(batch if per_sample else ()), schedule.num_angles, dtype=dtype)


def error(value, exact):
    """Largest absolute difference, 0 for empty tensors."""
    assert value.shape == exact.shape
    return (value - exact).abs().max().item() if value.numel() else 0.0


def assert_as_close(fast, plain, exact, terms=0.0):
    """Fast is at most twice as far from float64 as the reference, give or take an ulp.

    The ulp is that of the largest entry, or of the terms whose sum may cancel to a small one.
    """
    assert fast.dtype == plain.dtype
    ulp = torch.finfo(plain.dtype).eps * max(error(exact, torch.zeros_like(exact)), terms)
    assert error(fast, exact) <= 2 * (error(plain, exact) + ulp)


# --- the definition -------------------------------------------------------------------------


@every_impl
def test_quarter_turn_takes_the_first_axis_to_the_second(impl):
    schedule, angles = givens.crossing(2), torch.tensor([math.pi / 2], dtype=torch.float64)
    expected = torch.tensor([[0.0, -1.0], [1.0, 0.0]], dtype=torch.float64)
    matrix = givens.matrix(angles, schedule, impl=impl)
    torch.testing.assert_close(matrix, expected, rtol=0, atol=1e-15)
    x = torch.tensor([1.0, 0.0], dtype=torch.float64)
    y = givens.rotate(x, angles, schedule, impl=impl)
    torch.testing.assert_close(y, expected[:, 0], rtol=0, atol=1e-15)


@every_impl
def test_three_four_five_turn_leaves_the_axis_between_alone(impl):
    schedule = Schedule(3, [[(0, 2)]])
    angles = torch.tensor([math.atan2(0.6, 0.8)], dtype=torch.float64)
    x = torch.tensor([1.0, 7.0, 2.0], dtype=torch.float64)
    for inverse, expected in [(False, [-0.4, 7.0, 2.2]), (True, [2.0, 7.0, 1.0])]:
        y = givens.rotate(x, angles, schedule, inverse=inverse, impl=impl)
        torch.testing.assert_close(y, y.new_tensor(expected), rtol=0, atol=1e-15)


@every_impl
def test_first_round_acts_first(impl):
    schedule = Schedule(3, [[(0, 1)], [(1, 2)]])
    angles = torch.full((2,), math.pi / 2, dtype=torch.float64)
    e0, _, e2 = torch.eye(3, dtype=torch.float64)
    torch.testing.assert_close(givens.rotate(e0, angles, schedule, impl=impl), e2)
    torch.testing.assert_close(givens.matrix(angles, schedule, impl=impl) @ e0, e2)
    torch.testing.assert_close(givens.rotate(e2, angles, schedule, inverse=True, impl=impl), e0)


# --- values against the reference -----------------------------------------------------------


@every_fast
@both_ways
@both_angles
@pytest.mark.parametrize("batch", [(), (1,), (63,), (2, 5), (0,), (2, 0)], ids=str)
@pytest.mark.parametrize("dim", [2, 3, 16, 33])
def test_rotate_is_as_close_to_float64_as_the_reference(impl, dim, batch, per_sample, inverse):
    schedule = givens.crossing(dim)
    x, angles = draw(schedule, batch, per_sample)
    exact = givens.rotate(x.double(), angles.double(), schedule, inverse=inverse, impl="reference")
    plain = givens.rotate(x, angles, schedule, inverse=inverse, impl="reference")
    assert_as_close(givens.rotate(x, angles, schedule, inverse=inverse, impl=impl), plain, exact)


@every_fast
@pytest.mark.parametrize("batch", [(), (1,), (3,), (2, 2), (0,)], ids=str)
@pytest.mark.parametrize("dim", [2, 3, 16, 33])
def test_matrix_is_as_close_to_float64_as_the_reference(impl, dim, batch):
    schedule = givens.crossing(dim)
    angles = torch.randn(*batch, schedule.num_angles)
    exact = givens.matrix(angles.double(), schedule, impl="reference")
    plain = givens.matrix(angles, schedule, impl="reference")
    assert exact.shape == (*batch, dim, dim)
    assert_as_close(givens.matrix(angles, schedule, impl=impl), plain, exact)


SCHEDULES = [
    *(getattr(givens, name)(n) for name in CONSTRUCTORS for n in (2, 7, 8)),
    givens.crossing(9).frame(4),
    givens.round_robin(8).between([1, 5], [0, 2, 7]),
    givens.odd_even(7).blocks(3),
    givens.hurwitz(8).banded(2),
    givens.cosine_sine(8).first_rounds(3),
    Schedule(6, [[(4, 5)], [(0, 5), (1, 2)], [(4, 5)]]),
]


@every_fast
@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_every_schedule_agrees_with_the_reference(impl, schedule):
    x, angles = draw(schedule, (4,), per_sample=True, dtype=torch.float64)
    torch.testing.assert_close(
        givens.matrix(angles, schedule, impl=impl),
        givens.matrix(angles, schedule, impl="reference"),
    )
    for a in (angles, angles[0]):
        for inverse in (False, True):
            torch.testing.assert_close(
                givens.rotate(x, a, schedule, inverse=inverse, impl=impl),
                givens.rotate(x, a, schedule, inverse=inverse, impl="reference"),
            )


# --- what any implementation, the reference included, must do --------------------------------


@every_impl
@both_angles
@pytest.mark.parametrize("batch", [(), (4,), (2, 3)], ids=str)
def test_rotate_is_the_product_with_the_matrix(impl, batch, per_sample):
    schedule = givens.crossing(7)
    x, angles = draw(schedule, batch, per_sample, torch.float64)
    u = givens.matrix(angles, schedule, impl=impl)
    y = givens.rotate(x, angles, schedule, impl=impl)
    torch.testing.assert_close(y, (u @ x.unsqueeze(-1)).squeeze(-1))
    z = givens.rotate(x, angles, schedule, inverse=True, impl=impl)
    torch.testing.assert_close(z, (u.mT @ x.unsqueeze(-1)).squeeze(-1))
    torch.testing.assert_close(givens.rotate(y, angles, schedule, inverse=True, impl=impl), x)


@every_impl
def test_each_sample_is_turned_by_its_own_angles(impl):
    schedule = givens.odd_even(5)
    x, angles = draw(schedule, (2, 3), per_sample=True, dtype=torch.float64)
    y = givens.rotate(x, angles, schedule, impl=impl)
    u = givens.matrix(angles, schedule, impl=impl)
    for k in [(0, 0), (0, 2), (1, 1)]:
        torch.testing.assert_close(y[k], givens.rotate(x[k], angles[k], schedule, impl=impl))
        torch.testing.assert_close(u[k], givens.matrix(angles[k], schedule, impl=impl))


@every_impl
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", ["round_robin", "crossing", "cosine_sine"])
def test_matrix_of_256_axes_is_orthogonal(impl, name, dtype):
    schedule = getattr(givens, name)(256)
    angles = (torch.rand(schedule.num_angles, dtype=dtype) * 2 - 1) * math.pi
    u = givens.matrix(angles, schedule, impl=impl)
    assert u.dtype == dtype
    defect = (u.double() @ u.double().mT - torch.eye(256)).abs().max()
    assert defect < {torch.float32: 5e-6, torch.float64: 1e-13}[dtype]


@every_impl
@pytest.mark.parametrize("name", CONSTRUCTORS)
def test_determinant_is_plus_one(impl, name):
    schedule = getattr(givens, name)(6)
    angles = 3 * torch.randn(4, schedule.num_angles, dtype=torch.float64)
    determinants = torch.linalg.det(givens.matrix(angles, schedule, impl=impl))
    torch.testing.assert_close(determinants, torch.ones(4, dtype=torch.float64))


LAYOUTS = {
    "transposed": lambda t: t.mT.contiguous().mT,
    "every second": lambda t: t.repeat_interleave(2, -1)[..., ::2],
    "an offset": lambda t: torch.cat([torch.full_like(t[:1], 9.0), t])[1:],
}


@every_impl
@both_angles
@pytest.mark.parametrize("layout", LAYOUTS)
def test_memory_layout_does_not_matter(impl, layout, per_sample):
    schedule = givens.crossing(5)
    x, angles = draw(schedule, (6,), per_sample, torch.float64)
    plain = givens.rotate(x, angles, schedule, impl=impl)
    other = LAYOUTS[layout](angles) if per_sample else angles.repeat_interleave(2)[::2]
    torch.testing.assert_close(
        givens.rotate(LAYOUTS[layout](x), other, schedule, impl=impl), plain
    )
    row = x[:1].expand(4, 5)
    torch.testing.assert_close(
        givens.rotate(row, angles if not per_sample else angles[:1].expand(4, -1), schedule),
        plain[:1].expand(4, 5),
    )


@every_impl
def test_arguments_are_left_as_they_were(impl):
    schedule = givens.crossing(5)
    x, angles = draw(schedule, (3,), per_sample=True)
    before = x.clone(), angles.clone()
    y = givens.rotate(x, angles, schedule, impl=impl)
    givens.matrix(angles, schedule, impl=impl)
    assert torch.equal(x, before[0]) and torch.equal(angles, before[1])
    assert y.data_ptr() != x.data_ptr()


@every_impl
def test_nan_angle_spoils_its_own_sample_and_no_other(impl):
    schedule = givens.crossing(5)
    x, angles = draw(schedule, (3,), per_sample=True)
    angles[1, -1] = math.nan
    axes = schedule.planes[-1]
    spoiled = torch.zeros(3, 5, dtype=torch.bool)
    spoiled[1, axes] = True
    assert torch.equal(givens.rotate(x, angles, schedule, impl=impl).isnan(), spoiled)
    u = givens.matrix(angles, schedule, impl=impl)
    assert u[1, axes].isnan().any() and u[[0, 2]].isfinite().all()
    angles[1, 0] = math.nan
    assert givens.matrix(angles[1], schedule, impl=impl).isnan().any(1).all()


# --- gradients ------------------------------------------------------------------------------


def gradients(x, angles, weight, schedule, inverse, impl):
    """Of a weighted sum of the outputs, by reverse mode."""
    x, angles = x.clone().requires_grad_(), angles.clone().requires_grad_()
    y = givens.rotate(x, angles, schedule, inverse=inverse, impl=impl)
    return torch.autograd.grad(y, (x, angles), weight)


@every_fast
@both_ways
@both_angles
@pytest.mark.parametrize("batch", [(), (1,), (63,), (2, 5), (0,)], ids=str)
@pytest.mark.parametrize("dim", [2, 3, 17])
def test_gradients_are_as_close_to_float64_as_the_reference(impl, dim, batch, per_sample, inverse):
    schedule = givens.crossing(dim)
    x, angles = draw(schedule, batch, per_sample)
    weight = torch.randn(*batch, dim)
    double = x.double(), angles.double(), weight.double()
    exact = gradients(*double, schedule, inverse, "reference")
    plain = gradients(x, angles, weight, schedule, inverse, "reference")
    fast = gradients(x, angles, weight, schedule, inverse, impl)
    # An angle's gradient is a sum of products of outputs and incoming gradients.
    terms = error(x, 0 * x) * error(weight, 0 * weight)
    for values in zip(fast, plain, exact, strict=True):
        assert_as_close(*values, terms)


@every_fast
@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_gradient_of_the_matrix_agrees_with_the_reference(impl, schedule):
    angles = torch.randn(2, schedule.num_angles, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(2, schedule.dim, schedule.dim, dtype=torch.float64)
    fast, plain = (
        torch.autograd.grad(givens.matrix(angles, schedule, impl=i), angles, weight)[0]
        for i in (impl, "reference")
    )
    torch.testing.assert_close(fast, plain)


@every_fast
@both_ways
@both_angles
@pytest.mark.parametrize("schedule", [givens.crossing(4), givens.cosine_sine(3)], ids=str)
def test_derivatives_of_rotate_agree_with_finite_differences(impl, schedule, per_sample, inverse):
    x, angles = draw(schedule, (2,), per_sample, torch.float64)
    inputs = x.requires_grad_(), angles.requires_grad_()

    def function(x, angles):
        return givens.rotate(x, angles, schedule, inverse=inverse, impl=impl)

    assert gradcheck(function, inputs, check_forward_ad=True, check_batched_grad=True)
    assert gradgradcheck(function, inputs, check_fwd_over_rev=True)


@every_fast
def test_derivatives_of_matrix_agree_with_finite_differences(impl):
    schedule = givens.crossing(4)
    angles = torch.randn(2, schedule.num_angles, dtype=torch.float64, requires_grad=True)

    def function(angles):
        return givens.matrix(angles, schedule, impl=impl)

    assert gradcheck(function, angles, check_forward_ad=True, check_batched_grad=True)
    assert gradgradcheck(function, angles, check_fwd_over_rev=True)


@every_impl
@pytest.mark.parametrize("needed", ["x", "angles"])
def test_one_gradient_can_be_had_without_the_other(impl, needed):
    schedule = givens.crossing(5)
    x, angles = draw(schedule, (3,), per_sample=False, dtype=torch.float64)
    weight = torch.randn(3, 5, dtype=torch.float64)
    of_x, of_angles = gradients(x, angles, weight, schedule, False, impl)
    tensor, expected = (x, of_x) if needed == "x" else (angles, of_angles)
    tensor.requires_grad_()
    givens.rotate(x, angles, schedule, impl=impl).backward(weight)
    torch.testing.assert_close(tensor.grad, expected)


@every_fast
@both_ways
@both_angles
def test_backward_leaves_the_incoming_gradient_alone(impl, per_sample, inverse):
    schedule = givens.crossing(5)
    x, angles = draw(schedule, (3,), per_sample)
    x.requires_grad_(), angles.requires_grad_()
    y = givens.rotate(x, angles, schedule, inverse=inverse, impl=impl)
    incoming, output = torch.randn(3, 5), y.detach().clone()
    before = incoming.clone()
    first = torch.autograd.grad(y, (x, angles), incoming, retain_graph=True)
    second = torch.autograd.grad(y, (x, angles), incoming)
    assert torch.equal(incoming, before) and torch.equal(y, output)
    assert all(map(torch.equal, first, second)), "a second backward must find things as they were"
    assert all(g.untyped_storage().data_ptr() != incoming.data_ptr() for g in first)


def saved_bytes(function):
    """Bytes that autograd keeps for the backward pass of function()."""
    sizes = []

    def pack(tensor):
        sizes.append(tensor.nbytes)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        function()
    return sum(sizes)


@every_fast
@both_angles
@pytest.mark.parametrize("name", ["butterfly", "crossing", "hurwitz"])
def test_rotate_keeps_one_state_and_the_angles_however_many_rounds(impl, name, per_sample):
    schedule = getattr(givens, name)(32)
    x, angles = draw(schedule, (64,), per_sample)
    x.requires_grad_(), angles.requires_grad_()
    kept = saved_bytes(lambda: givens.rotate(x, angles, schedule, impl=impl))
    assert 0 < kept <= x.nbytes + angles.nbytes
    # The measure sees what autograd keeps without our backward.
    plain = saved_bytes(lambda: givens.rotate(x, angles, schedule, impl="reference"))
    assert plain > 4 * kept or per_sample and plain > 2 * kept


@every_fast
def test_matrix_keeps_itself_and_the_angles(impl):
    schedule = givens.hurwitz(32)
    angles = torch.randn(schedule.num_angles, requires_grad=True)
    assert (
        0
        < saved_bytes(lambda: givens.matrix(angles, schedule, impl=impl))
        <= (4 * 32 * 32 + angles.nbytes)
    )


# --- function transforms, compiler, modes ---------------------------------------------------

COMPOSED = {
    "grad": grad,
    "reverse over reverse": hessian,
    "forward over reverse": lambda f: jacfwd(jacrev(f)),
    "reverse over forward": lambda f: jacrev(jacfwd(f)),
    "vmap of grad": lambda f: lambda a: vmap(grad(f))(torch.stack([a, 2 * a])),
    "grad of vmap": lambda f: grad(lambda a: vmap(f)(torch.stack([a, 2 * a])).sum()),
    "vmap of jvp": lambda f: lambda a: vmap(lambda v: jvp(f, (a,), (v,))[1])(a.outer(a)),
}


@every_fast
@both_ways
@pytest.mark.parametrize("composed", COMPOSED)
def test_function_transforms_of_the_angles_agree_with_the_reference(impl, composed, inverse):
    schedule = givens.crossing(4)
    x, angles = draw(schedule, (3,), per_sample=False, dtype=torch.float64)

    def loss(impl):
        return lambda a: (
            givens.rotate(x, a, schedule, inverse=inverse, impl=impl).pow(3).sum()
            + givens.matrix(a, schedule, impl=impl).pow(3).sum()
        )

    fast, plain = (COMPOSED[composed](loss(i))(angles) for i in (impl, "reference"))
    torch.testing.assert_close(fast, plain)


@every_fast
@pytest.mark.xfail(strict=True, reason="PyTorch 2.13: wrong through any custom function")
def test_forward_over_forward_agrees_with_the_reference(impl):
    schedule = givens.crossing(3)
    angles = torch.randn(3, dtype=torch.float64)

    def second(impl):
        return jacfwd(jacfwd(lambda a: givens.matrix(a, schedule, impl=impl)))(angles)

    torch.testing.assert_close(second(impl), second("reference"))


@every_fast
@pytest.mark.parametrize("mapped", [(0, None), (None, 0), (0, 0)], ids=["x", "angles", "both"])
def test_vmap_equals_a_loop(impl, mapped):
    schedule = givens.crossing(4)
    x, angles = draw(schedule, (3, 2), per_sample=True, dtype=torch.float64)
    inputs = [t if axis == 0 else t[0] for t, axis in zip((x, angles), mapped, strict=True)]

    def function(x, angles):
        return givens.rotate(x, angles, schedule, impl=impl)

    xs, many = inputs
    loop = [
        function(xs if mapped[0] is None else xs[k], many if mapped[1] is None else many[k])
        for k in range(3)
    ]
    torch.testing.assert_close(vmap(function, in_dims=mapped)(*inputs), torch.stack(loop))


@every_fast
@both_ways
@both_angles
def test_jvp_agrees_with_the_reference(impl, per_sample, inverse):
    schedule = givens.crossing(5)
    inputs = draw(schedule, (3,), per_sample, torch.float64)
    tangents = draw(schedule, (3,), per_sample, torch.float64)

    def push(impl):
        def function(x, angles):
            return givens.rotate(x, angles, schedule, inverse=inverse, impl=impl)

        with forward_ad.dual_level():
            dual = forward_ad.make_dual(inputs[0], tangents[0])
            by_hand = forward_ad.unpack_dual(function(dual, inputs[1])).tangent
        return [
            by_hand,
            jvp(function, inputs, tangents)[1],
            jvp(lambda x: function(x, inputs[1]), inputs[:1], tangents[:1])[1],
            jvp(lambda angles: function(inputs[0], angles), inputs[1:], tangents[1:])[1],
        ]

    for fast, plain in zip(push(impl), push("reference"), strict=True):
        torch.testing.assert_close(fast, plain)


@every_fast
@pytest.mark.parametrize(("mode", "dim"), [(torch.inference_mode, 19), (torch.no_grad, 18)])
def test_a_first_call_without_gradients_does_not_spoil_a_later_one(impl, mode, dim):
    angles = torch.randn(4, dtype=torch.float64)
    with mode():
        # A schedule of its own, so that nothing about it is remembered yet.
        schedule = Schedule(dim, [[(0, 3)], [(1, 3)], [(2, 3), (0, 1)]])
        givens.matrix(angles, schedule, impl=impl)
    angles.requires_grad_()
    (gradient,) = torch.autograd.grad(
        givens.matrix(angles, schedule, impl=impl).pow(3).sum(), angles, create_graph=True
    )
    gradient.sum().backward()
    assert angles.grad.isfinite().all()


@every_fast
@pytest.mark.parametrize("transform", [grad, hessian, lambda f: jacrev(jacfwd(f))])
def test_a_first_call_inside_a_function_transform_does_not_spoil_a_later_one(impl, transform):
    angles = torch.randn(4, dtype=torch.float64)

    def loss(angles):
        return givens.matrix(angles, schedule, impl=impl).pow(3).sum()

    # Schedules of its own, so that nothing about them is remembered yet.
    schedule = Schedule(9, [[(0, 3)], [(1, 3)], [(2, 3), (0, 1)]])
    first = transform(loss)(angles)
    torch.testing.assert_close(transform(loss)(angles), first)
    expected = givens.matrix(angles, schedule, impl="reference")
    torch.testing.assert_close(givens.matrix(angles, schedule, impl=impl), expected)


COMPILED = """
import torch
from flows import givens

schedule = givens.crossing(5)
angles = torch.randn(10, dtype=torch.float64, requires_grad=True)
x = torch.randn(3, 5, dtype=torch.float64)

def loss(angles, impl):
    y = givens.rotate(x, angles, schedule, impl=impl)
    return y.pow(3).sum() + givens.matrix(angles, schedule, impl=impl).pow(3).sum()

compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
fast = torch.autograd.grad(compiled(angles, "IMPL"), angles)
plain = torch.autograd.grad(loss(angles, "reference"), angles)
torch.testing.assert_close(fast, plain)
"""


@every_fast
def test_compiles_into_one_graph(impl):
    # In a process of its own: the compiler cannot look into this run's type checks.
    subprocess.run([sys.executable, "-c", COMPILED.replace("IMPL", impl)], check=True)


# --- the door -------------------------------------------------------------------------------


def with_changes(**changes):
    """A call of rotate that is right but for the changes."""
    good = {"x": torch.zeros(2, 4), "angles": torch.zeros(6), "schedule": givens.crossing(4)}
    return lambda: givens.rotate(**(good | changes))


BAD = {
    "too few angles": (
        with_changes(angles=torch.zeros(5)),
        r"angles must end in 6 entries, one per plane of crossing\(4\), got \(5,\)",
    ),
    "no axis of angles": (
        with_changes(angles=torch.zeros(())),
        r"angles must end in 6 entries.* got \(\)",
    ),
    "integer angles": (
        with_changes(angles=torch.zeros(6, dtype=torch.int64)),
        "angles must be real floating-point numbers, got torch.int64",
    ),
    "complex angles": (
        with_changes(angles=torch.zeros(6, dtype=torch.complex64)),
        "angles must be real floating-point numbers, got torch.complex64",
    ),
    "wrong last axis": (
        with_changes(x=torch.zeros(4, 2)),
        r"x must end in 4 entries, as crossing\(4\) does, got \(4, 2\)",
    ),
    "last axis too long": (with_changes(x=torch.zeros(2, 5)), r"got \(2, 5\)"),
    "no axis": (with_changes(x=torch.zeros(())), r"x must end in 4 entries.* got \(\)"),
    "angles for other rows": (
        with_changes(angles=torch.zeros(3, 6)),
        r"expected \(6,\) or \(2, 6\), got \(3, 6\)",
    ),
    "angles to broadcast": (
        with_changes(angles=torch.zeros(1, 6)),
        r"expected \(6,\) or \(2, 6\), got \(1, 6\)",
    ),
    "angles for rows of rows": (
        with_changes(x=torch.zeros(5, 2, 4), angles=torch.zeros(2, 6)),
        r"expected \(6,\) or \(5, 2, 6\), got \(2, 6\)",
    ),
    "two dtypes": (
        with_changes(x=torch.zeros(2, 4, dtype=torch.float64)),
        "must share dtype and device, got torch.float64 on cpu and torch.float32 on cpu",
    ),
    "two devices": (
        with_changes(x=torch.zeros(2, 4, device="meta")),
        "must share dtype and device, got torch.float32 on meta and torch.float32 on cpu",
    ),
    "unknown impl": (with_changes(impl="fast"), r"impl must be one of \(.*\), got 'fast'"),
    "matrix of too many angles": (
        lambda: givens.matrix(torch.zeros(2, 7), givens.crossing(4)),
        r"angles must end in 6 entries.* got \(2, 7\)",
    ),
    "matrix of integer angles": (
        lambda: givens.matrix(torch.zeros(6, dtype=torch.int64), givens.crossing(4)),
        "got torch.int64",
    ),
    "matrix of unknown impl": (
        lambda: givens.matrix(torch.zeros(6), givens.crossing(4), impl="fast"),
        "got 'fast'",
    ),
}


@pytest.mark.usefixtures("no_type_hook")
@pytest.mark.parametrize("case", BAD)
def test_bad_arguments_are_refused_in_plain_words(case):
    call, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        call()


def test_auto_is_one_of_the_named_implementations():
    # The product form serves some schedules only and Triton not every device: tested apart.
    assert set(givens.IMPLS) == {"auto", "reference", "product", "triton", *FAST}
    schedule, angles = givens.crossing(6), torch.randn(15)
    matrices = [givens.matrix(angles, schedule, impl=impl) for impl in ["reference", *FAST]]
    assert any(givens.matrix(angles, schedule).equal(matrix) for matrix in matrices)


@pytest.mark.parametrize(
    ("make", "numba", "impl"),
    [
        ("crossing", True, "compiled"),
        ("odd_even", True, "compiled"),
        ("crossing", False, "product"),
        ("odd_even", False, "rounds"),
    ],
)
def test_auto_takes_the_fastest_way_that_is_there(make, numba, impl, monkeypatch):
    monkeypatch.setattr(dispatch, "HAS_NUMBA", numba)
    schedule = getattr(givens, make)(64)
    angles = torch.randn(schedule.num_angles)
    assert torch.equal(givens.matrix(angles, schedule), givens.matrix(angles, schedule, impl=impl))
