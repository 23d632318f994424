import copy
import math
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.func import functional_call, jacrev
from torch.nn.utils import parametrize

from flows import givens, orthogonal

MODULES = {
    "square": lambda: nn.Linear(6, 6),
    "two by two": lambda: nn.Linear(2, 2),
    "tall": lambda: nn.Linear(3, 8),
    "wide": lambda: nn.Linear(9, 5),
    "nearly square": lambda: nn.Linear(5, 6),
    "half as tall": lambda: nn.Linear(4, 8),
    "unit row": lambda: nn.Linear(7, 1),
    "unit column": lambda: nn.Linear(1, 2),
    "conv1d": lambda: nn.Conv1d(4, 6, 3),
    "conv2d": lambda: nn.Conv2d(2, 20, 3),
    "conv3d": lambda: nn.Conv3d(2, 4, 2),
    "transposed": lambda: nn.ConvTranspose2d(4, 3, 2),
    "grouped": lambda: nn.Conv2d(8, 4, 2, groups=2),
    "depthwise, tall": lambda: nn.Conv2d(16, 16, 3, groups=16),
    "depthwise, wide": lambda: nn.Conv2d(4, 4, 3, groups=4),
}
every_module = pytest.mark.parametrize("make", MODULES.values(), ids=MODULES)


def defect(weight):
    """Largest error of the shorter side's inner products."""
    q = weight.detach().double().flatten(1)
    gram = q @ q.mT if len(q) <= q.shape[1] else q.mT @ q
    return (gram - torch.eye(len(gram))).abs().max().item()


def angles_of(module):
    return module.parametrizations.weight.original0


def learned(module, *args):
    """Angles somewhere else than where they start: the start would hide mistakes."""
    orthogonal(module, "weight", *args)
    nn.init.normal_(angles_of(module))
    return module


def haar(rows, columns=None):
    """Orthonormal columns, or rows if they are fewer."""
    columns = rows if columns is None else columns
    q = torch.linalg.qr(torch.randn(max(rows, columns), min(rows, columns)).double()).Q
    return q if rows >= columns else q.mT


# --- where it starts ------------------------------------------------------------------------


@every_module
def test_starts_at_the_nearest_orthogonal_matrix(make):
    module = make()
    before = module.weight.detach().clone()
    left, _, right = torch.linalg.svd(before.double().flatten(1), full_matrices=False)
    assert orthogonal(module) is module
    assert module.weight.shape == before.shape and module.weight.dtype == before.dtype
    nearest = (left @ right).float().view_as(before)
    torch.testing.assert_close(module.weight, nearest, rtol=0, atol=1e-6)
    assert (angles_of(module) == 0).all()


@every_module
def test_orthogonal_weight_stays_as_it_is(make):
    module = make().double()
    start = haar(*module.weight.flatten(1).shape).view_as(module.weight)
    with torch.no_grad():
        module.weight.copy_(start)
    orthogonal(module)
    torch.testing.assert_close(module.weight, start, rtol=0, atol=1e-13)


@pytest.mark.parametrize("shape", [(6, 6), (5, 8), (8, 2)], ids=str)
@pytest.mark.parametrize("make", [givens.cosine_sine, givens.round_robin, givens.butterfly])
def test_any_schedule_starts_there_too(make, shape):
    module = nn.Linear(*shape[::-1], dtype=torch.float64)
    start = haar(*shape)
    with torch.no_grad():
        module.weight.copy_(start)
    orthogonal(module, schedule=make(max(shape)))
    torch.testing.assert_close(module.weight, start, rtol=0, atol=1e-13)
    assert (angles_of(module) == 0).all() != (make is givens.cosine_sine)


@every_module
def test_weight_stays_orthogonal_and_learns_by_angles_alone(make):
    module = orthogonal(make())
    names = {name for name, _ in module.named_parameters()}
    assert names == {"bias", "parametrizations.weight.original0"}
    rows, columns = module.weight.flatten(1).shape
    m, n = sorted((rows, columns))
    assert angles_of(module).shape == (n * m - m * (m + 1) // 2,), "the dimension of the frames"
    optimizer = torch.optim.Adam(module.parameters(), lr=0.1)
    before, target = module.weight.detach(), torch.randn_like(module.weight)
    for _ in range(20):
        optimizer.zero_grad()
        (module.weight * target).sum().backward()
        optimizer.step()
    assert defect(module.weight) < 5e-6
    assert (module.weight - before).abs().max() > 0.05
    assert (module.weight * target).sum() < (before * target).sum()


def test_weight_is_base_times_first_columns_of_the_rotation():
    for size, count in [(6, 6), (8, 3), (12, 2)]:
        for wide in (False, True):
            shape = (size, count) if wide else (count, size)
            module = learned(nn.Linear(*shape, dtype=torch.float64))
            part = module.parametrizations.weight[0]
            u = givens.matrix(angles_of(module), part.schedule, impl="reference")
            frame = part.base @ u[:, :count]
            expected = frame.mT if wide and size > count else frame
            torch.testing.assert_close(module.weight, expected)


# --- what it reaches ------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(6, 6), (6, 5), (6, 4), (3, 6), (2, 6), (6, 1)], ids=str)
def test_default_reaches_random_targets_from_the_start(shape):
    target = haar(*shape)
    for _ in range(5):
        module = nn.Linear(*shape[::-1], dtype=torch.float64)
        with torch.no_grad():
            module.weight.copy_(haar(*shape))
            if shape[0] == shape[1]:  # the angles cannot change the determinant
                module.weight[0] *= torch.linalg.det(module.weight) * torch.linalg.det(target)
        angles = angles_of(orthogonal(module))
        optimizer = torch.optim.LBFGS(
            [angles],
            max_iter=2000,
            tolerance_grad=1e-13,
            tolerance_change=0,
            line_search_fn="strong_wolfe",
        )

        def closure(module=module, optimizer=optimizer):
            optimizer.zero_grad()
            loss = (module.weight - target).square().sum()
            loss.backward()
            return loss

        optimizer.step(closure)
        if closure() < 1e-16:
            return
    raise AssertionError("no start led to the target")


@pytest.mark.parametrize("shape", [(6, 6), (6, 5), (6, 4), (6, 3), (2, 6), (1, 6)], ids=str)
def test_start_is_an_immersion_and_isometric_for_square_weights(shape):
    module = orthogonal(nn.Linear(*shape[::-1], dtype=torch.float64))
    name = "parametrizations.weight.original0"

    def weight(angles):
        with parametrize.cached():
            return functional_call(Weight(module), {f"module.{name}": angles}, ())

    jacobian = jacrev(weight)(angles_of(module).detach()).flatten(0, 1)
    values = torch.linalg.svdvals(jacobian)
    assert len(values) == len(angles_of(module))
    # A plane inside the frame moves two of its columns, any other plane one.
    for value in values:
        assert min(abs(value - 1), abs(value - math.sqrt(2))) < 1e-12
    if shape[0] == shape[1]:
        torch.testing.assert_close(values, torch.full_like(values, math.sqrt(2)))


class Weight(nn.Module):
    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self):
        return self.module.weight


def test_gradient_of_the_angles_agrees_with_finite_differences():
    for shape in [(4, 4), (6, 2), (3, 5)]:
        module = learned(nn.Linear(*shape, dtype=torch.float64))
        part = module.parametrizations.weight[0]
        assert torch.autograd.gradcheck(part, angles_of(module).detach().requires_grad_())


# --- assignment -----------------------------------------------------------------------------


@every_module
def test_assigned_matrix_becomes_the_weight(make):
    module = learned(make())
    parameter = angles_of(module)
    q = haar(*module.weight.flatten(1).shape).view(module.weight.shape)
    module.weight = q  # float64 into float32
    torch.testing.assert_close(module.weight, q.float(), rtol=0, atol=1e-6)
    assert angles_of(module) is parameter, "the optimizer must not lose it"
    assert (parameter == 0).all() and parameter.requires_grad
    assert defect(module.parametrizations.weight[0].base) < 1e-6
    module.weight = module.weight.detach()
    torch.testing.assert_close(module.weight, q.float(), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (1.1 * torch.eye(4, 3), r"weight must be orthogonal, Q\^T Q = I; .* error is 0.21"),
        (torch.full((4, 3), math.nan), "error is nan"),
        (torch.eye(3, 4), r"weight must have shape \(4, 3\), got \(3, 4\)"),
    ],
    ids=["stretched", "nan", "transposed"],
)
def test_other_values_are_refused_and_change_nothing(value, message):
    module = learned(nn.Linear(3, 4))
    before = module.weight.detach()
    with pytest.raises(ValueError, match=message):
        module.weight = value
    assert torch.equal(module.weight, before)


# --- saving, copying, moving ----------------------------------------------------------------


@every_module
def test_state_dict_carries_everything(make, tmp_path):
    module, twin = learned(make()), orthogonal(make())
    torch.save(module.state_dict(), tmp_path / "weights.pt")
    twin.load_state_dict(torch.load(tmp_path / "weights.pt", weights_only=True))
    assert torch.equal(twin.weight, module.weight)


@pytest.mark.parametrize("strict", [True, False], ids=["strict", "lax"])
def test_weights_of_another_schedule_are_refused_and_change_no_angles(strict):
    state = learned(nn.Linear(4, 4)).state_dict()
    module = orthogonal(nn.Linear(4, 4), schedule=givens.odd_even(4))
    with pytest.raises(ValueError, match=r"belong to the schedule crossing\(4\).* odd_even\(4\)"):
        module.load_state_dict(state, strict=strict)
    assert (angles_of(module) == 0).all()
    with pytest.raises(ValueError, match="5x3"):
        orthogonal(nn.Linear(5, 3)).load_state_dict(learned(nn.Linear(3, 5)).state_dict())


def test_deepcopy_is_independent():
    module = learned(nn.Conv2d(4, 6, 3))
    twin, before = copy.deepcopy(module), module.weight.detach()
    assert torch.equal(twin.weight, before)
    nn.init.normal_(angles_of(twin))
    assert torch.equal(module.weight, before) and not torch.equal(twin.weight, before)
    with pytest.raises(ValueError, match="belong to"):
        twin.load_state_dict(learned(nn.Conv2d(4, 6, 3), givens.crossing(36)).state_dict())


@every_module
def test_finer_dtype_makes_it_orthogonal_to_that_precision(make):
    module = learned(make()).double()
    assert module.weight.dtype == torch.float64
    assert defect(module.weight) < 1e-14
    again = module.to(torch.bfloat16).to(torch.float32)
    assert defect(again.weight) < 2e-6


def test_half_precision_rounds_a_matrix_made_in_float32():
    module = learned(nn.Linear(16, 16)).bfloat16()
    part = module.parametrizations.weight[0]
    turned = givens.matrix(angles_of(module).float(), part.schedule)
    assert torch.equal(module.weight, (part.base.float() @ turned).bfloat16())
    assert defect(module.weight) < 0.02
    assert module(torch.randn(3, 16, dtype=torch.bfloat16)).dtype == torch.bfloat16
    module.weight = part.base
    module.weight.sum().backward()
    assert angles_of(module).grad.dtype == torch.bfloat16


def test_autocast_leaves_the_weight_in_float32():
    module = learned(nn.Linear(8, 5))
    plain = module.weight
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(module.weight, plain)
        assert module(torch.randn(2, 8)).dtype == torch.bfloat16
        assert orthogonal(nn.Linear(8, 5)).weight.dtype == torch.float32


@every_module
def test_removing_it_leaves_a_plain_parameter(make):
    module = learned(make())
    before = module.weight.detach()
    parametrize.remove_parametrizations(module, "weight", leave_parametrized=True)
    assert isinstance(module.weight, nn.Parameter) and torch.equal(module.weight, before)
    assert {name for name, _ in module.named_parameters()} == {"bias", "weight"}
    assert type(module) is type(make())
    orthogonal(module)
    torch.testing.assert_close(module.weight, before, rtol=0, atol=1e-6)


def test_frozen_weight_stays_frozen():
    module = nn.Linear(4, 4).requires_grad_(False)
    assert not orthogonal(module).weight.requires_grad


def test_any_parameter_name_and_several_of_one_module():
    cell = nn.RNNCell(3, 5)
    orthogonal(orthogonal(cell, "weight_hh"), "weight_ih")
    assert defect(cell.weight_hh) < 1e-6 and defect(cell.weight_ih) < 1e-6
    with parametrize.cached():
        assert cell.weight_hh is cell.weight_hh
    assert cell(torch.randn(2, 3), torch.zeros(2, 5)).shape == (2, 5)


COMPILED = """
import torch
from torch import nn
from flows import orthogonal

for layer, x in [
    (nn.Linear(6, 6), torch.randn(2, 6)),
    (nn.Conv2d(2, 4, 3), torch.randn(2, 2, 5, 5)),
]:
    orthogonal(layer)
    angles = layer.parametrizations.weight.original0
    nn.init.normal_(angles)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    fast = torch.autograd.grad(compiled(x).pow(3).sum(), angles)
    plain = torch.autograd.grad(layer(x).pow(3).sum(), angles)
    torch.testing.assert_close(fast, plain, rtol=1e-4, atol=1e-4)
"""


def test_compiles_into_one_graph():
    # In a process of its own: the compiler cannot look into this run's type checks.
    subprocess.run([sys.executable, "-c", COMPILED], check=True)


# --- the door -------------------------------------------------------------------------------


def changed(module, function):
    module.weight = nn.Parameter(function(module.weight.detach()), requires_grad=False)
    return module


BAD = {
    "no such parameter": (
        lambda: orthogonal(nn.Linear(3, 3), "weigth"),
        r"name must be a parameter of the module, one of \['weight', 'bias'\], got 'weigth'",
    ),
    "absent parameter": (lambda: orthogonal(nn.Linear(3, 3, bias=False), "bias"), "got 'bias'"),
    "buffer": (lambda: orthogonal(nn.BatchNorm1d(3), "running_mean"), "got 'running_mean'"),
    "container": (lambda: orthogonal(nn.Sequential(nn.Linear(3, 3))), r"one of \[\]"),
    "twice": (lambda: orthogonal(orthogonal(nn.Linear(3, 3))), "weight is parametrized already"),
    "vector": (lambda: orthogonal(nn.Linear(3, 3), "bias"), r"at least two axes.* got \(3,\)"),
    "one by one": (lambda: orthogonal(nn.Linear(1, 1)), r"two elements, got \(1, 1\)"),
    "no elements": (
        lambda: orthogonal(changed(nn.Linear(3, 3), lambda w: w[:0])),
        r"got \(0, 3\)",
    ),
    "complex": (
        lambda: orthogonal(nn.Linear(3, 3, dtype=torch.complex64)),
        "weight must be real floating-point numbers, got torch.complex64",
    ),
    "integer": (
        lambda: orthogonal(changed(nn.Linear(3, 3), lambda w: w.long())),
        "got torch.int64",
    ),
    "nan": (
        lambda: orthogonal(changed(nn.Linear(3, 3), lambda w: w * math.nan)),
        "weight must be finite",
    ),
    "lazy": (lambda: orthogonal(nn.LazyLinear(3)), "has no values yet"),
    "meta": (lambda: orthogonal(nn.Linear(3, 3, device="meta")), "has no values yet"),
    "schedule of other dimension": (
        lambda: orthogonal(nn.Linear(3, 5), schedule=givens.crossing(3)),
        r"schedule must have dimension 5, the longer side of the 5 x 3 weight, got crossing\(3\)",
    ),
}


@pytest.mark.filterwarnings("ignore:Lazy modules:UserWarning")
@pytest.mark.filterwarnings("ignore:Complex modules:UserWarning")
@pytest.mark.parametrize("case", BAD)
def test_bad_arguments_are_refused_in_plain_words(case):
    call, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        call()


def test_a_refusal_leaves_the_module_as_it_was():
    module = nn.Linear(3, 5)
    before = module.weight
    with pytest.raises(ValueError):
        orthogonal(module, schedule=givens.crossing(3))
    assert module.weight is before and type(module) is nn.Linear


def test_repr_names_shape_and_schedule():
    text = repr(orthogonal(nn.Conv2d(3, 8, 2)))
    assert "8 x 12, schedule=hurwitz(12).frame(8), angles=60" in text
