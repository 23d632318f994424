import math
import pickle
import subprocess
import sys

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vmap

from flows import givens
from flows.givens import Schedule, autograd, product, reference

# Torch itself scripts a few functions when forward mode is first used.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")

MAKERS = [givens.crossing, givens.cosine_sine]

every_maker = pytest.mark.parametrize("make", MAKERS, ids=lambda make: make.__name__)


def draw(schedule, *batch, dtype=torch.float64):
    return torch.randn(*batch, schedule.num_angles, dtype=dtype)


def error(value, exact):
    assert value.shape == exact.shape
    return (value - exact).abs().max().item() if value.numel() else 0.0


def pull(function, inputs, weight):
    """Value and gradients of a weighted sum of it."""
    inputs = [tensor.clone().requires_grad_() for tensor in inputs]
    value = function(*inputs)
    return value.detach(), *torch.autograd.grad(value, inputs, weight)


# --- values and gradients -------------------------------------------------------------------


@every_maker
@pytest.mark.parametrize("dim", range(2, 41))
def test_equals_the_definition_for_every_small_size(make, dim):
    schedule = make(dim)
    angles = draw(schedule, 2)
    exact = reference.matrix(angles, schedule)
    assert error(product.matrix(angles, schedule), exact) < 1e-14
    angles.requires_grad_()
    assert error(product.matrix(angles, schedule), exact) < 1e-14


@every_maker
@pytest.mark.parametrize("dim", [33, 34, 63, 64, 65, 100, 129])
def test_value_and_gradient_equal_those_of_the_rounds(make, dim):
    schedule = make(dim)
    angles, weight = draw(schedule, 2), torch.randn(2, dim, dim, dtype=torch.float64)
    fast = pull(lambda a: product.matrix(a, schedule), [angles], weight)
    exact = pull(lambda a: autograd.matrix(a, schedule), [angles], weight)
    assert error(fast[0], exact[0]) < 1e-14
    assert error(fast[1], exact[1]) < 1e-13 * dim


@every_maker
@pytest.mark.parametrize("dim", [3, 4, 7, 12, 18])
def test_gradient_equals_autograd_through_the_definition(make, dim):
    schedule = make(dim)
    angles, weight = draw(schedule), torch.randn(dim, dim, dtype=torch.float64)
    fast = pull(lambda a: product.matrix(a, schedule), [angles], weight)
    exact = pull(lambda a: reference.matrix(a, schedule), [angles], weight)
    assert error(fast[1], exact[1]) < 1e-13 * dim


@every_maker
@pytest.mark.parametrize("dim", [2, 3, 8, 17, 40, 64])
def test_float32_is_as_close_to_float64_as_the_definition(make, dim):
    schedule = make(dim)
    angles, weight = draw(schedule, dtype=torch.float32), torch.randn(dim, dim)
    run = {
        "exact": (reference.matrix, torch.float64),
        "plain": (reference.matrix, torch.float32),
        "fast": (product.matrix, torch.float32),
    }
    results = {
        name: pull(lambda a, f=f: f(a, schedule), [angles.to(dtype)], weight.to(dtype))
        for name, (f, dtype) in run.items()
    }
    # An angle's gradient is a sum of products of entries with the incoming gradient.
    ulp = torch.finfo(torch.float32).eps * weight.abs().max().item()
    for fast, plain, exact in zip(
        results["fast"], results["plain"], results["exact"], strict=True
    ):
        assert fast.dtype == torch.float32
        assert error(fast, exact) <= 2 * (error(plain, exact) + ulp)


@every_maker
@pytest.mark.parametrize("dim", [3, 12])
@pytest.mark.parametrize("batch", [(), (2, 3), (0,), (2, 0)], ids=str)
def test_leading_axes_of_the_angles_are_batch_axes(make, dim, batch):
    schedule = make(dim)
    angles = draw(schedule, *batch)
    weight = torch.randn(*batch, dim, dim, dtype=torch.float64)
    fast = pull(lambda a: product.matrix(a, schedule), [angles], weight)
    exact = pull(lambda a: autograd.matrix(a, schedule), [angles], weight)
    for value, expected in zip(fast, exact, strict=True):
        assert error(value, expected) < 1e-12
    assert error(product.matrix(angles, schedule), exact[0]) < 1e-12


@every_maker
@pytest.mark.parametrize("dim", [256, 1024])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_large_matrices_are_orthogonal(make, dim, dtype):
    schedule = make(dim)
    angles = (torch.rand(schedule.num_angles, dtype=dtype) * 2 - 1) * math.pi
    u = product.matrix(angles, schedule)
    assert u.dtype == dtype
    defect = torch.baddbmm(torch.eye(dim, dtype=dtype)[None], u[None], u.mT[None], beta=-1)
    assert defect.abs().max() < {torch.float32: 5e-6, torch.float64: 1e-13}[dtype]


@every_maker
@pytest.mark.parametrize("dim", [5, 20])
def test_nan_angle_gives_nan(make, dim):
    schedule = make(dim)
    angles = draw(schedule, 2)
    angles[1, 0] = math.nan
    u = product.matrix(angles, schedule)
    assert u[0].isfinite().all() and u[1].isnan().any()


# --- restrictions ---------------------------------------------------------------------------

RESTRICTED = {
    "frame": lambda s: s.frame(3),
    "between": lambda s: s.between([0, 4], [1, 7, 8]),
    "blocks": lambda s: s.blocks(3),
    "banded": lambda s: s.banded(2),
    "first rounds": lambda s: s.first_rounds(4),
    "several": lambda s: s.first_rounds(6).frame(4).first_rounds(3).banded(5),
}


@every_maker
@pytest.mark.parametrize("restrict", RESTRICTED.values(), ids=RESTRICTED.keys())
@pytest.mark.parametrize("dim", [9])
def test_restricted_schedules_equal_the_definition(make, dim, restrict):
    schedule = restrict(make(dim))
    angles, weight = draw(schedule, 2), torch.randn(2, dim, dim, dtype=torch.float64)
    fast = pull(lambda a: product.matrix(a, schedule), [angles], weight)
    exact = pull(lambda a: reference.matrix(a, schedule), [angles], weight)
    assert error(fast[0], exact[0]) < 1e-14
    assert error(fast[1], exact[1]) < 1e-12


@pytest.mark.parametrize(
    "schedule",
    [givens.odd_even(4), givens.hurwitz(5).frame(2), Schedule(3, [[(0, 1)]])],
    ids=str,
)
def test_schedules_without_product_form_are_refused(schedule):
    with pytest.raises(ValueError, match="exists for crossing, cosine_sine and restrictions"):
        product.matrix(draw(schedule), schedule)


# --- rotate ---------------------------------------------------------------------------------


@every_maker
@pytest.mark.parametrize("dim", [2, 33, 34, 37, 67])
@pytest.mark.parametrize("rows", [(), (2, 2), (0,), (500,)], ids=str)
@pytest.mark.parametrize("inverse", [False, True], ids=["forward", "inverse"])
def test_rotate_equals_the_rounds(make, dim, rows, inverse):
    schedule = make(dim)
    x, angles = torch.randn(*rows, dim, dtype=torch.float64), draw(schedule)
    weight = torch.randn_like(x)
    fast, exact = (
        pull(lambda x, a, f=f: f(x, a, schedule, inverse=inverse), [x, angles], weight)
        for f in (product.rotate, autograd.rotate)
    )
    for value, expected in zip(fast, exact, strict=True):
        assert error(value, expected) < 1e-12
    assert error(product.rotate(x, angles, schedule, inverse=inverse), exact[0]) < 1e-12


def test_rotate_refuses_angles_per_row():
    schedule = givens.crossing(4)
    with pytest.raises(ValueError, match=r"same angles, expected \(6,\), got \(3, 6\)"):
        product.rotate(torch.randn(3, 4), torch.randn(3, 6), schedule)


# --- derivatives of every kind --------------------------------------------------------------

# Leaves alone, even merges and odd merges.
DERIVED = [(make, dim) for make in MAKERS for dim in (3, 5, 6)]
every_derived = pytest.mark.parametrize(
    ("make", "dim"), DERIVED, ids=lambda v: str(v) if isinstance(v, int) else v.__name__
)


@every_derived
def test_derivatives_agree_with_finite_differences(make, dim):
    schedule = make(dim)
    angles = draw(schedule).requires_grad_()

    def function(angles):
        return product.matrix(angles, schedule)

    assert gradcheck(function, angles, check_forward_ad=True, check_batched_grad=True)
    assert gradgradcheck(function, angles, check_fwd_over_rev=True)


@every_maker
@pytest.mark.parametrize("dim", [4, 5])
def test_derivatives_of_rotate_agree_with_finite_differences(make, dim):
    schedule = make(dim)
    inputs = (
        torch.randn(2, dim, dtype=torch.float64).requires_grad_(),
        draw(schedule).requires_grad_(),
    )

    def function(x, angles):
        return product.rotate(x, angles, schedule)

    assert gradcheck(function, inputs, check_forward_ad=True, check_batched_grad=True)
    assert gradgradcheck(function, inputs)


COMPOSED = {
    "grad": lambda f: grad(f),
    "hessian": lambda f: hessian(f),
    "reverse over reverse": lambda f: jacrev(jacrev(f)),
    "reverse over forward": lambda f: jacrev(jacfwd(f)),
    "vmap of grad": lambda f: lambda a: vmap(grad(f))(torch.stack([a, 2 * a])),
    "grad of vmap": lambda f: grad(lambda a: vmap(f)(torch.stack([a, 2 * a])).sum()),
    "vmap of jvp": lambda f: lambda a: vmap(lambda v: jvp(f, (a,), (v,))[1])(a.outer(a)),
    "vmap of vmap": lambda f: lambda a: vmap(vmap(f))(torch.stack([a, 2 * a])[None]),
}


@every_maker
@pytest.mark.parametrize("composed", COMPOSED)
def test_function_transforms_agree_with_the_rounds(make, composed):
    schedule = make(5)

    def loss(form):
        return lambda a: form.matrix(a, schedule).pow(3).sum()

    angles = draw(schedule)
    fast, exact = (COMPOSED[composed](loss(form))(angles) for form in (product, autograd))
    torch.testing.assert_close(fast, exact)


@every_maker
@pytest.mark.parametrize("dim", [6, 40])
def test_second_derivatives_agree_with_the_rounds(make, dim):
    schedule = make(dim)
    angles = draw(schedule)
    direction, weight = torch.randn_like(angles), torch.randn(dim, dim, dtype=torch.float64)
    results = []
    for form in (product, autograd):
        a, w = angles.clone().requires_grad_(), weight.clone().requires_grad_()
        (g,) = torch.autograd.grad(form.matrix(a, schedule), a, w, create_graph=True)
        results.append(torch.autograd.grad(g, (a, w), direction))
    for fast, exact in zip(*results, strict=True):
        torch.testing.assert_close(fast, exact)


# --- good manners ---------------------------------------------------------------------------


@every_maker
@pytest.mark.parametrize("dim", [2, 7, 8, 40])
def test_backward_leaves_the_incoming_gradient_alone(make, dim):
    schedule = make(dim)
    angles, incoming = draw(schedule).requires_grad_(), torch.randn(dim, dim, dtype=torch.float64)
    before = incoming.clone()
    u = product.matrix(angles, schedule)
    output = u.detach().clone()
    first = torch.autograd.grad(u, angles, incoming, retain_graph=True)[0]
    second = torch.autograd.grad(u, angles, incoming)[0]
    assert torch.equal(incoming, before) and torch.equal(u, output)
    assert torch.equal(first, second), "a second backward must find things as they were"


@every_maker
@pytest.mark.parametrize("dim", [64, 65, 85, 96, 100, 128, 129, 171, 192, 256, 341])
def test_saved_numbers_stay_within_their_bound(make, dim):
    schedule = make(dim)
    storages = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    angles = draw(schedule, dtype=torch.float32).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        product.matrix(angles, schedule)
    bound = {"cosine_sine": math.log2(dim) + 2, "crossing": 2 * (math.log2(dim) + 1)}
    assert 0 < sum(storages.values()) <= 4 * dim**2 * bound[make.__name__]


@every_maker
@pytest.mark.parametrize("rows", [None, 3])
def test_autocast_leaves_the_product_exact(make, rows):
    schedule = make(64)
    angles = draw(schedule, dtype=torch.float32).requires_grad_()
    x = torch.randn(rows or 1, 64)

    def function():
        if rows is None:
            return product.matrix(angles, schedule)
        return product.rotate(x, angles, schedule)

    exact = function()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = function()
        assert value.dtype == torch.float32 and torch.equal(value, exact)
        (gradient,) = torch.autograd.grad(value.sum(), angles)
    assert torch.equal(gradient, torch.autograd.grad(exact.sum(), angles)[0])


@every_maker
def test_lower_matmul_precision_is_not_obeyed_and_left_as_it_was(make):
    schedule = make(256)
    angles = draw(schedule, dtype=torch.float32).requires_grad_()
    exact = product.matrix(angles, schedule)
    gradient = torch.autograd.grad(exact.sum(), angles)[0]
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        settings = torch.backends.mkldnn.matmul.fp32_precision
        seen = torch.randn(256, 256) @ torch.randn(256, 256)  # the setting is in use
        value = product.matrix(angles, schedule)
        assert torch.equal(value, exact) and seen.isfinite().all()
        assert torch.equal(torch.autograd.grad(value.sum(), angles)[0], gradient)
        assert torch.get_float32_matmul_precision() == "medium"
        assert torch.backends.mkldnn.matmul.fp32_precision == settings
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
@every_maker
def test_a_first_call_without_gradients_does_not_spoil_a_later_one(make, mode):
    schedule = make(35).frame(3 if mode is torch.no_grad else 4)
    schedule._derived.clear()
    angles = draw(schedule)
    with mode():
        product.matrix(angles, schedule)
    angles.requires_grad_()
    (gradient,) = torch.autograd.grad(
        product.matrix(angles, schedule).pow(3).sum(), angles, create_graph=True
    )
    gradient.sum().backward()
    assert angles.grad.isfinite().all()


def test_a_first_call_inside_a_transform_does_not_spoil_a_later_one():
    schedule = givens.cosine_sine(11).frame(7)
    schedule._derived.clear()
    angles = draw(schedule)
    inside = vmap(grad(lambda a: product.matrix(a, schedule).pow(3).sum()))(angles[None])[0]
    angles.requires_grad_()
    (outside,) = torch.autograd.grad(product.matrix(angles, schedule).pow(3).sum(), angles)
    torch.testing.assert_close(inside, outside)


@every_maker
def test_a_pickled_schedule_carries_no_plans(make):
    schedule = make(33).frame(5)
    product.matrix(draw(schedule), schedule)
    copy = pickle.loads(pickle.dumps(schedule))
    assert schedule._derived and not copy._derived
    angles = draw(schedule)
    assert torch.equal(product.matrix(angles, schedule), product.matrix(angles, copy))


COMPILED = """
import torch
from flows import givens
from flows.givens import product, reference

torch.manual_seed(0)
for schedule in (givens.crossing(9), givens.cosine_sine(9).frame(2)):
    angles = torch.randn(schedule.num_angles, dtype=torch.float64, requires_grad=True)
    x = torch.randn(3, schedule.dim, dtype=torch.float64)

    def loss(angles, form):
        y = form.rotate(x, angles, schedule)
        return y.pow(3).sum() + form.matrix(angles, schedule).pow(3).sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    fast = torch.autograd.grad(compiled(angles, product), angles)
    plain = torch.autograd.grad(loss(angles, reference), angles)
    torch.testing.assert_close(fast, plain)

    # The guarded product is an operator that the compiler leaves alone, and there is no other.
    operators = set()

    def backend(graph, inputs):
        operators.update(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    torch.compiler.reset()
    torch.compile(product.matrix, fullgraph=True, backend=backend)(angles, schedule)
    products = {name for name in operators if "mm" in name or "matmul" in name}
    assert products and all("givens_flows.matmul" in name for name in products), products
"""


def test_compiles_into_one_graph_that_stays_exact():
    # In a process of its own: the compiler cannot look into this run's type checks.
    subprocess.run([sys.executable, "-c", COMPILED], check=True)
