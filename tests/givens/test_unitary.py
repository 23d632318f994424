"""Phases make the rotations unitary."""

import math
import subprocess
import sys

import pytest
import torch
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vmap

from flows import givens
from flows.givens import Schedule

# Torch itself scripts a few functions when forward mode is first used.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")

COMPLEX = {torch.float32: torch.complex64, torch.float64: torch.complex128}

every_impl = pytest.mark.parametrize("impl", ["reference", "rounds", "auto"])
both_ways = pytest.mark.parametrize("inverse", [False, True], ids=["forward", "inverse"])
both_angles = pytest.mark.parametrize("per_sample", [False, True], ids=["shared", "per-sample"])


def draw(schedule, batch=(), per_sample=True, dtype=torch.float64):
    """Complex vectors, with angles and phases that fit them."""
    x = torch.randn(*batch, schedule.dim, dtype=COMPLEX[dtype])
    lead, count = batch if per_sample else (), schedule.num_angles
    angles = torch.randn(*lead, count, dtype=dtype)
    return x, angles, 3 * torch.randn(*lead, count + schedule.dim, dtype=dtype)


def error(value, exact):
    assert value.shape == exact.shape
    return (value - exact).abs().max().item() if value.numel() else 0.0


def assert_as_close(fast, plain, exact, terms=0.0):
    """Fast is at most twice as far from float64 as the reference, give or take an ulp."""
    assert fast.dtype == plain.dtype
    ulp = torch.finfo(plain.dtype).eps * max(error(exact, torch.zeros_like(exact)), terms)
    assert error(fast, exact) <= 2 * (error(plain, exact) + ulp)


# --- the definition -------------------------------------------------------------------------


@every_impl
@pytest.mark.parametrize("plane", [(0, 1), (0, 3), (2, 3)], ids=str)
def test_one_plane_is_the_exponential_of_its_generator(impl, plane):
    i, j = plane
    t, p, last = 0.7, 1.9, torch.randn(4, dtype=torch.float64)
    generator = torch.zeros(4, 4, dtype=torch.complex128)
    generator[i, j] = -complex(math.cos(p), -math.sin(p))
    generator[j, i] = complex(math.cos(p), math.sin(p))
    diagonal = torch.matrix_exp(torch.diag(1j * last))
    expected = diagonal @ torch.matrix_exp(t * generator)
    angles, phases = last.new_tensor([t]), torch.cat([last.new_tensor([p]), last])
    u = givens.matrix(angles, Schedule(4, [[plane]]), phases=phases, impl=impl)
    torch.testing.assert_close(u, expected, rtol=0, atol=1e-15)


@every_impl
def test_rounds_act_in_their_order_and_the_diagonal_last(impl):
    schedule = givens.crossing(5)
    _, angles, phases = draw(schedule)
    expected = torch.eye(5, dtype=torch.complex128)
    for k, plane in enumerate(schedule.planes.tolist()):
        single = torch.cat([phases[k : k + 1], torch.zeros(5)])
        alone = Schedule(5, [[tuple(plane)]])
        turn = givens.matrix(angles[k : k + 1], alone, phases=single)
        expected = turn @ expected
    expected = torch.exp(1j * phases[schedule.num_angles :])[:, None] * expected
    torch.testing.assert_close(givens.matrix(angles, schedule, phases=phases, impl=impl), expected)


@every_impl
@pytest.mark.parametrize("dtype", COMPLEX, ids=str)
def test_zero_phases_give_the_real_matrix(impl, dtype):
    schedule = givens.crossing(7)
    x, angles, phases = draw(schedule, (3,), dtype=dtype)
    u = givens.matrix(angles, schedule, phases=0 * phases, impl=impl)
    assert u.dtype == COMPLEX[dtype] and (u.imag == 0).all()
    torch.testing.assert_close(u.real, givens.matrix(angles, schedule))


@every_impl
@pytest.mark.parametrize("dtype", COMPLEX, ids=str)
@pytest.mark.parametrize("make", [givens.round_robin, givens.crossing, givens.cosine_sine])
def test_matrix_of_64_axes_is_unitary(impl, make, dtype):
    schedule = make(64)
    _, angles, phases = draw(schedule, dtype=dtype)
    u = givens.matrix(angles, schedule, phases=phases, impl=impl)
    assert u.dtype == COMPLEX[dtype] and u.imag.abs().max() > 0.01
    wide = u.to(torch.complex128)
    defect = (wide @ wide.mH - torch.eye(64)).abs().max()
    assert defect < {torch.float32: 5e-6, torch.float64: 1e-13}[dtype]


@every_impl
@both_angles
@pytest.mark.parametrize("real", [False, True], ids=["complex x", "real x"])
@pytest.mark.parametrize("batch", [(), (4,), (2, 3), (0,)], ids=str)
@pytest.mark.parametrize("dim", [2, 5, 8])
def test_rotate_is_the_product_with_the_matrix(impl, dim, batch, real, per_sample):
    schedule = givens.crossing(dim)
    x, angles, phases = draw(schedule, batch, per_sample)
    x = x.real if real else x
    options = {"phases": phases, "impl": impl}
    u = givens.matrix(angles, schedule, **options)
    y = givens.rotate(x, angles, schedule, **options)
    rows = x.to(torch.complex128).unsqueeze(-2)
    torch.testing.assert_close(y, (rows @ u.mT).squeeze(-2))
    z = givens.rotate(x, angles, schedule, inverse=True, **options)
    torch.testing.assert_close(z, (rows @ u.conj()).squeeze(-2))
    back = givens.rotate(y, angles, schedule, inverse=True, **options)
    torch.testing.assert_close(back, rows.squeeze(-2))


SCHEDULES = [
    *(make(n) for make in (givens.odd_even, givens.cosine_sine, givens.butterfly) for n in (3, 8)),
    givens.hurwitz(7).frame(3),
    Schedule(6, [[(4, 5)], [(0, 5), (1, 2)], [(4, 5)]]),
]


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_every_schedule_agrees_with_the_reference(schedule):
    x, angles, phases = draw(schedule, (4,))
    torch.testing.assert_close(
        givens.matrix(angles, schedule, phases=phases, impl="rounds"),
        givens.matrix(angles, schedule, phases=phases, impl="reference"),
    )
    for row in (slice(None), 0):
        for inverse in (False, True):
            options = {"phases": phases[row], "inverse": inverse}
            torch.testing.assert_close(
                givens.rotate(x, angles[row], schedule, **options, impl="rounds"),
                givens.rotate(x, angles[row], schedule, **options, impl="reference"),
            )


def test_each_sample_is_turned_by_its_own_angles_and_phases():
    schedule = givens.odd_even(5)
    x, angles, phases = draw(schedule, (2, 3))
    y = givens.rotate(x, angles, schedule, phases=phases)
    u = givens.matrix(angles, schedule, phases=phases)
    assert u.shape == (2, 3, 5, 5)
    for k in [(0, 0), (0, 2), (1, 1)]:
        own = {"phases": phases[k]}
        torch.testing.assert_close(y[k], givens.rotate(x[k], angles[k], schedule, **own))
        torch.testing.assert_close(u[k], givens.matrix(angles[k], schedule, **own))


# --- gradients ------------------------------------------------------------------------------


def gradients(x, angles, phases, weight, schedule, inverse, impl):
    inputs = [t.clone().requires_grad_() for t in (x, angles, phases)]
    y = givens.rotate(*inputs[:2], schedule, phases=inputs[2], inverse=inverse, impl=impl)
    return torch.autograd.grad(y, inputs, weight)


@both_ways
@both_angles
@pytest.mark.parametrize("batch", [(), (63,), (2, 5), (0,)], ids=str)
@pytest.mark.parametrize("dim", [2, 3, 17])
def test_gradients_are_as_close_to_float64_as_the_reference(dim, batch, per_sample, inverse):
    schedule = givens.crossing(dim)
    inputs = draw(schedule, batch, per_sample, torch.float32)
    weight = torch.randn(*batch, dim, dtype=torch.complex64)
    wide = [t.to(torch.promote_types(t.dtype, torch.float64)) for t in (*inputs, weight)]
    exact = gradients(*wide, schedule, inverse, "reference")
    plain = gradients(*inputs, weight, schedule, inverse, "reference")
    fast = gradients(*inputs, weight, schedule, inverse, "rounds")
    # Gradients of angles and phases are sums of products of outputs and incoming gradients.
    terms = error(inputs[0], 0 * inputs[0]) * error(weight, 0 * weight)
    for values in zip(fast, plain, exact, strict=True):
        assert_as_close(*values, terms)


@both_ways
@both_angles
@pytest.mark.parametrize("real", [False, True], ids=["complex x", "real x"])
@pytest.mark.parametrize("schedule", [givens.crossing(4), givens.cosine_sine(3)], ids=str)
def test_derivatives_of_rotate_agree_with_finite_differences(schedule, real, per_sample, inverse):
    x, angles, phases = draw(schedule, (2,), per_sample)
    inputs = [t.clone().requires_grad_() for t in (x.real if real else x, angles, phases)]

    def function(x, angles, phases):
        return givens.rotate(x, angles, schedule, phases=phases, inverse=inverse)

    assert gradcheck(function, inputs, check_forward_ad=True, check_batched_grad=True)
    assert gradgradcheck(function, inputs, check_fwd_over_rev=True)


def test_derivatives_of_matrix_agree_with_finite_differences():
    schedule = givens.crossing(4)
    _, *inputs = draw(schedule, (2,))
    inputs = [t.requires_grad_() for t in inputs]

    def function(angles, phases):
        return givens.matrix(angles, schedule, phases=phases)

    assert gradcheck(function, inputs, check_forward_ad=True, check_batched_grad=True)
    assert gradgradcheck(function, inputs, check_fwd_over_rev=True)


@pytest.mark.parametrize("needed", [0, 1, 2], ids=["x", "angles", "phases"])
def test_one_gradient_can_be_had_without_the_others(needed):
    schedule = givens.crossing(5)
    inputs = draw(schedule, (3,), per_sample=False)
    weight = torch.randn_like(inputs[0])
    expected = gradients(*inputs, weight, schedule, False, "reference")[needed]
    inputs[needed].requires_grad_()
    x, angles, phases = inputs
    givens.rotate(x, angles, schedule, phases=phases).backward(weight)
    torch.testing.assert_close(inputs[needed].grad, expected)


@both_ways
@both_angles
def test_backward_leaves_the_incoming_gradient_alone(per_sample, inverse):
    schedule = givens.crossing(5)
    x, angles, phases = inputs = [t.requires_grad_() for t in draw(schedule, (3,), per_sample)]
    y = givens.rotate(x, angles, schedule, phases=phases, inverse=inverse)
    incoming, output = torch.randn_like(y), y.detach().clone()
    before = incoming.clone()
    first = torch.autograd.grad(y, inputs, incoming, retain_graph=True)
    second = torch.autograd.grad(y, inputs, incoming)
    assert torch.equal(incoming, before) and torch.equal(y, output)
    assert all(map(torch.equal, first, second))


def kept_bytes(function):
    """Bytes of the different tensors that autograd keeps for the backward pass of function()."""
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        function()
    return sum(kept.values())


@both_ways
@both_angles
@pytest.mark.parametrize("name", ["butterfly", "crossing", "hurwitz"])
def test_kept_memory_does_not_grow_with_the_rounds(name, per_sample, inverse):
    schedule = getattr(givens, name)(32)
    x, angles, phases = draw(schedule, (64,), per_sample)
    # The diagonal needs what it multiplies, which for the inverse is x itself, its entries and
    # their parts.
    allowed = (2 if inverse else 1) * x.nbytes + 2 * angles.nbytes
    allowed += phases.nbytes + 4 * phases[..., :32].nbytes
    for tensor in (x, angles, phases):
        tensor.requires_grad_()
    kept = kept_bytes(
        lambda: givens.rotate(x, angles, schedule, phases=phases, inverse=inverse, impl="rounds")
    )
    assert 0 < kept <= allowed


# --- function transforms, compiler ----------------------------------------------------------

COMPOSED = {
    "grad": grad,
    "reverse over reverse": hessian,
    "forward over reverse": lambda f: jacfwd(jacrev(f)),
    "reverse over forward": lambda f: jacrev(jacfwd(f)),
    "vmap of grad": lambda f: lambda a: vmap(grad(f))(torch.stack([a, 2 * a])),
    "grad of vmap": lambda f: grad(lambda a: vmap(f)(torch.stack([a, 2 * a])).sum()),
    "vmap of jvp": lambda f: lambda a: vmap(lambda v: jvp(f, (a,), (v,))[1])(a.outer(a)),
}


@both_ways
@pytest.mark.parametrize("composed", COMPOSED)
def test_function_transforms_agree_with_the_reference(composed, inverse):
    schedule = givens.crossing(4)
    x, angles, phases = draw(schedule, (3,), per_sample=False)

    def loss(impl):
        def function(both):
            a, p = both.tensor_split([schedule.num_angles])
            y = givens.rotate(x, a, schedule, phases=p, inverse=inverse, impl=impl)
            u = givens.matrix(a, schedule, phases=p, impl=impl)
            return y.real.pow(3).sum() + (u.real * u.imag.square()).sum()

        return function

    both = torch.cat([angles, phases])
    fast, plain = (COMPOSED[composed](loss(impl))(both) for impl in ("rounds", "reference"))
    torch.testing.assert_close(fast, plain)


@pytest.mark.parametrize("mapped", [(0, None, None), (None, 0, 0), (None, None, 0), (0, 0, 0)])
def test_vmap_equals_a_loop(mapped):
    schedule = givens.crossing(4)
    inputs = [
        t if axis == 0 else t[0] for t, axis in zip(draw(schedule, (3, 2)), mapped, strict=True)
    ]

    def function(x, angles, phases):
        return givens.rotate(x, angles, schedule, phases=phases)

    loop = [
        function(*(t[k] if axis == 0 else t for t, axis in zip(inputs, mapped, strict=True)))
        for k in range(3)
    ]
    torch.testing.assert_close(vmap(function, in_dims=mapped)(*inputs), torch.stack(loop))


@both_ways
@both_angles
def test_jvp_agrees_with_the_reference(per_sample, inverse):
    schedule = givens.crossing(5)
    inputs, tangents = (draw(schedule, (3,), per_sample) for _ in range(2))

    def push(impl):
        def function(x, angles, phases):
            return givens.rotate(x, angles, schedule, phases=phases, inverse=inverse, impl=impl)

        with forward_ad.dual_level():
            duals = map(forward_ad.make_dual, inputs, tangents)
            by_hand = forward_ad.unpack_dual(function(*duals)).tangent
        return by_hand, jvp(function, inputs, tangents)[1]

    for fast, plain in zip(push("rounds"), push("reference"), strict=True):
        torch.testing.assert_close(fast, plain)


COMPILED = """
import torch
from flows import givens

schedule = givens.crossing(5)
angles = torch.randn(10, dtype=torch.float64, requires_grad=True)
phases = torch.randn(15, dtype=torch.float64, requires_grad=True)
x = torch.randn(3, 5, dtype=torch.complex128)

def loss(angles, phases, impl):
    y = givens.rotate(x, angles, schedule, phases=phases, impl=impl)
    u = givens.matrix(angles, schedule, phases=phases, impl=impl)
    return y.real.pow(3).sum() + (u.real * u.imag.square()).sum()

compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
fast = torch.autograd.grad(compiled(angles, phases, "rounds"), (angles, phases))
plain = torch.autograd.grad(loss(angles, phases, "reference"), (angles, phases))
torch.testing.assert_close(fast, plain)
"""


def test_compiles_into_one_graph():
    # In a process of its own: the compiler cannot look into this run's type checks.
    subprocess.run([sys.executable, "-c", COMPILED], check=True)


# --- what it reaches ------------------------------------------------------------------------


def test_crossing_with_phases_reaches_a_random_unitary():
    schedule = givens.crossing(4)
    _, angles, phases = draw(schedule)
    assert len(angles) + len(phases) == 4 * 4
    target = torch.linalg.qr(torch.randn(4, 4, dtype=torch.complex128)).Q
    parameters = [angles.requires_grad_(), phases.requires_grad_()]
    optimizer = torch.optim.LBFGS(
        parameters,
        max_iter=1000,
        tolerance_grad=1e-13,
        tolerance_change=0,
        line_search_fn="strong_wolfe",
    )

    def closure():
        optimizer.zero_grad()
        loss = (givens.matrix(angles, schedule, phases=phases) - target).abs().square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    assert error(givens.matrix(angles, schedule, phases=phases), target) < 1e-10


@pytest.mark.parametrize("at_zero", [False, True])
def test_the_map_has_full_rank_but_for_phases_of_resting_planes(at_zero):
    schedule = givens.crossing(4)
    _, angles, phases = draw(schedule)
    angles = 0 * angles if at_zero else angles

    def function(both):
        a, p = both.tensor_split([schedule.num_angles])
        return torch.view_as_real(givens.matrix(a, schedule, phases=p)).flatten()

    jacobian = jacrev(function)(torch.cat([angles, phases]))
    assert torch.linalg.matrix_rank(jacobian, rtol=1e-9) == (6 + 4 if at_zero else 16)


# --- the door -------------------------------------------------------------------------------


def with_changes(function, **changes):
    good = {"angles": torch.zeros(6), "schedule": givens.crossing(4), "phases": torch.zeros(10)}
    if function is givens.rotate:
        good["x"] = torch.zeros(2, 4)
    return lambda: function(**(good | changes))


BAD = {
    "too few phases": (
        with_changes(givens.matrix, phases=torch.zeros(6)),
        r"phases must have shape \(10,\): 6, one per plane of crossing\(4\), and 4, one per axis.*"
        r"got \(6,\)",
    ),
    "phases of other batch": (
        with_changes(givens.matrix, phases=torch.zeros(3, 10)),
        r"phases must have shape \(10,\).* got \(3, 10\)",
    ),
    "shared phases for angles per sample": (
        with_changes(givens.rotate, angles=torch.zeros(2, 6)),
        r"phases must have shape \(2, 10\).* got \(10,\)",
    ),
    "phases of other dtype": (
        with_changes(givens.rotate, phases=torch.zeros(10, dtype=torch.float64)),
        "phases and angles must share dtype and device, got torch.float64 on cpu and",
    ),
    "complex phases": (
        with_changes(givens.matrix, phases=torch.zeros(10, dtype=torch.complex64)),
        "phases and angles must share dtype",
    ),
    "half precision": (
        with_changes(
            givens.matrix, angles=torch.zeros(6).bfloat16(), phases=torch.zeros(10).bfloat16()
        ),
        "phases need angles of torch.float32 or torch.float64, got torch.bfloat16",
    ),
    "x of other precision": (
        with_changes(givens.rotate, x=torch.zeros(2, 4, dtype=torch.complex128)),
        "x must be torch.float32 or torch.complex64 on cpu, as angles are, got torch.complex128",
    ),
    "x elsewhere": (
        with_changes(givens.rotate, x=torch.zeros(2, 4, device="meta")),
        "got torch.float32 on meta",
    ),
    "product form": (
        with_changes(givens.matrix, impl="product"),
        "impl 'product' builds real matrices only; with phases use 'rounds', 'reference' or",
    ),
    "product form of rotate": (
        with_changes(givens.rotate, impl="product"),
        "impl 'product' builds real matrices only",
    ),
    "unknown impl": (with_changes(givens.rotate, impl="fast"), "impl must be one of .* 'fast'"),
    "complex x without phases": (
        with_changes(givens.rotate, x=torch.zeros(2, 4, dtype=torch.complex64), phases=None),
        "must share dtype",
    ),
}


@pytest.mark.usefixtures("no_type_hook")
@pytest.mark.parametrize("case", BAD)
def test_bad_arguments_are_refused_in_plain_words(case):
    call, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        call()


def test_auto_takes_rounds_for_any_size():
    schedule = givens.crossing(64)
    _, angles, phases = draw(schedule)
    u = givens.matrix(angles, schedule, phases=phases)
    assert torch.equal(u, givens.matrix(angles, schedule, phases=phases, impl="rounds"))
