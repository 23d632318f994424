"""What only the compiled engine does: tiles, half turns, threads, operators for the compiler."""

import copy
import math
import os
import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch

pytest.importorskip("numba")

from flows import givens  # noqa: E402
from flows.givens import compiled  # noqa: E402
from flows.givens.lanes import PATTERNS, ROWS, TURNS  # noqa: E402
from flows.givens.program import program  # noqa: E402

FLOAT64 = torch.float64


@pytest.fixture
def two_threads(monkeypatch):
    """Two threads however little there is to do."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    monkeypatch.setattr(compiled, "TURNS_PER_THREAD", 1)
    yield
    torch.set_num_threads(before)


# --- programs --------------------------------------------------------------------------------

SCHEDULES = [
    schedule
    for make in (givens.crossing, givens.cosine_sine, givens.round_robin)
    for n in (2, 3, 7, 8, 9, 12, 16, 17, 24, 33)
    for schedule in (
        make(n),
        make(n).first_rounds(max(1, len(make(n)) // 2)),
        make(n).frame(max(1, n // 2)).first_rounds(max(1, len(make(n).frame(max(1, n // 2))) - 1)),
    )
]


@pytest.mark.parametrize("inverse", [False, True], ids=["forward", "inverse"])
@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_tiles_hold_every_turn_once_in_an_order_that_makes_the_same_matrix(schedule, inverse):
    todo, u, met = program(schedule, inverse=inverse), np.eye(schedule.dim), []
    angles = torch.randn(schedule.num_angles, dtype=FLOAT64)
    for kind, tiles, first, row, turn in todo.runs:
        for tile in range(first, first + tiles):
            rows = todo.rows[row : row + ROWS[kind]]
            low, high = todo.span[tile]
            assert not np.delete(u[rows], np.s_[low:high], axis=1).any(), "these are left out"
            for (i, j), number in zip(PATTERNS[kind], todo.number[turn:], strict=False):
                c, s = math.cos(angles[number]), math.sin(angles[number])
                x, y = u[rows[i]].copy(), u[rows[j]].copy()
                u[rows[i]], u[rows[j]] = c * x - s * y, s * x + c * y
                met.append(number)
            row, turn = row + ROWS[kind], turn + TURNS[kind]
    assert sorted(met) == list(range(schedule.num_angles))
    exact = givens.matrix(angles, schedule, impl="reference").numpy()
    np.testing.assert_allclose(u, exact.T if inverse else exact, atol=1e-13)


@pytest.mark.parametrize(("make", "share"), [("crossing", 0.9), ("cosine_sine", 1.0)])
def test_most_turns_of_the_recursions_are_in_tiles(make, share):
    runs = program(getattr(givens, make)(64)).runs
    turns = np.bincount(runs[:, 0], runs[:, 1] * TURNS[runs[:, 0]], minlength=4)
    assert turns[1:].sum() >= share * turns.sum()


# --- angles ----------------------------------------------------------------------------------


@pytest.mark.parametrize("per_sample", [False, True], ids=["shared", "per-sample"])
@pytest.mark.parametrize("size", [1e-3, math.pi, 10.0, 1e3, 1e6])
def test_angles_of_every_size(size, per_sample):
    schedule = givens.crossing(13)
    shape = (70, schedule.num_angles) if per_sample else (schedule.num_angles,)
    angles = (size * torch.randn(shape, dtype=FLOAT64)).requires_grad_()
    x = torch.randn(70, 13, dtype=FLOAT64, requires_grad=True)
    weight = torch.randn(70, 13, dtype=FLOAT64)
    results = []
    for impl in ("compiled", "reference"):
        y = givens.rotate(x, angles, schedule, impl=impl)
        results.append((y, *torch.autograd.grad(y, (x, angles), weight)))
    # The angle itself is known to an ulp only.
    tolerance = 1e-13 + 2 * size * torch.finfo(FLOAT64).eps
    for value, exact in zip(*results, strict=True):
        torch.testing.assert_close(value, exact, rtol=0, atol=70 * tolerance)


@pytest.mark.parametrize("turn", [0.5, 1, 1.5, 2, -0.5, -1, 7])
def test_right_angles_and_half_turns(turn):
    schedule = givens.odd_even(6)
    angles = torch.full((15,), turn * math.pi, dtype=FLOAT64)
    angles[::2] = 0.3
    fast, plain = (
        givens.matrix(angles, schedule, impl=impl) for impl in ("compiled", "reference")
    )
    torch.testing.assert_close(fast, plain, rtol=0, atol=1e-14)


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_angles_that_are_no_numbers_give_none(value):
    schedule = givens.crossing(4)
    angles = torch.zeros(6)
    angles[-1] = value
    assert givens.matrix(angles, schedule, impl="compiled")[schedule.planes[-1]].isnan().any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_computed_in_single(dtype):
    schedule = givens.crossing(8)
    angles = torch.randn(28).to(dtype).requires_grad_()
    u = givens.matrix(angles, schedule, impl="compiled")
    exact = givens.matrix(angles.float(), schedule, impl="reference")
    assert u.dtype == dtype
    torch.testing.assert_close(u, exact.to(dtype), rtol=0, atol=torch.finfo(dtype).eps)
    u.float().square().sum().backward()
    assert angles.grad.dtype == dtype


# --- sizes and threads -----------------------------------------------------------------------


@pytest.mark.parametrize("rows", [1, 15, 16, 17, 63, 64, 65, 80, 129])
@pytest.mark.parametrize("per_sample", [False, True], ids=["shared", "per-sample"])
def test_any_number_of_rows(rows, per_sample, two_threads):
    schedule = givens.cosine_sine(16)
    shape = (rows, 120) if per_sample else (120,)
    angles = torch.randn(shape, requires_grad=True)
    x = torch.randn(rows, 16, requires_grad=True)
    for inverse in (False, True):
        results = []
        for impl in ("compiled", "rounds"):
            y = givens.rotate(x, angles, schedule, inverse=inverse, impl=impl)
            results.append((y, *torch.autograd.grad(y.pow(3).sum(), (x, angles))))
        for value, exact in zip(*results, strict=True):
            torch.testing.assert_close(value, exact, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("sets", [(), (3,), (2, 2)], ids=str)
def test_threads_give_the_same_bits_forward_and_the_same_sums_each_time(sets, monkeypatch):
    schedule = givens.crossing(130)
    angles = torch.randn(*sets, schedule.num_angles, requires_grad=True)
    weight = torch.randn(*sets, 130, 130)
    results = []
    before = torch.get_num_threads()
    monkeypatch.setattr(compiled, "TURNS_PER_THREAD", 1)
    for threads in (1, 2, 2):
        torch.set_num_threads(threads)
        u = givens.matrix(angles, schedule, impl="compiled")
        results.append((u, torch.autograd.grad(u, angles, weight)[0]))
    torch.set_num_threads(before)
    (one, slope_one), (two, slope_two), (again, slope_again) = results
    assert torch.equal(one, two) and torch.equal(two, again)
    assert torch.equal(slope_two, slope_again)
    torch.testing.assert_close(slope_one, slope_two)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_a_forked_process_works_on_its_own(two_threads):
    schedule = givens.crossing(130)
    angles = torch.randn(schedule.num_angles)
    expected = givens.matrix(angles, schedule, impl="compiled")
    child = os.fork()
    if child == 0:
        torch.set_num_threads(1)  # as torch does in the workers of a DataLoader
        same = torch.equal(givens.matrix(angles, schedule, impl="compiled"), expected)
        os._exit(0 if same else 1)
    assert os.waitpid(child, 0)[1] == 0


def test_tensors_elsewhere_are_refused():
    angles = torch.zeros(6, device="meta")
    with pytest.raises(ValueError, match="works on the CPU, got tensors on meta"):
        givens.matrix(angles, givens.crossing(4), impl="compiled")


@pytest.mark.parametrize("dtype", [torch.float32, FLOAT64], ids=str)
def test_a_large_matrix_is_orthogonal(dtype):
    schedule = givens.crossing(1024)
    angles = (torch.rand(schedule.num_angles, dtype=dtype) * 2 - 1) * math.pi
    u = givens.matrix(angles, schedule, impl="compiled").double()
    defect = (u @ u.mT - torch.eye(1024)).abs().max()
    assert defect < {torch.float32: 5e-6, FLOAT64: 1e-13}[dtype]


# --- first-class -----------------------------------------------------------------------------


class Layer(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.schedule = givens.crossing(6)
        self.angles = torch.nn.Parameter(torch.randn(15))

    def forward(self, x):
        u = givens.matrix(self.angles, self.schedule, impl="compiled")
        return givens.rotate(x, self.angles, self.schedule, impl="compiled") + x @ u


def test_matrix_stays_in_single_precision_under_autocast():
    schedule = givens.crossing(6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        u = givens.matrix(torch.randn(15), schedule, impl="compiled")
    assert u.dtype == torch.float32
    torch.testing.assert_close(u @ u.mT, torch.eye(6))


def test_copies_and_pickles_work_alike():
    layer, x = Layer(), torch.randn(3, 6)
    expected = layer(x)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(other(x), expected)


COMPILED = """
import torch
from flows import givens
from flows.givens import autograd, compiled

schedule = givens.crossing(6)
angles = torch.randn(15, requires_grad=True)
x = torch.randn(3, 6, requires_grad=True)

def function(x, angles):
    u = givens.matrix(angles, schedule, impl="compiled")
    return givens.rotate(x, angles, schedule, impl="compiled") + x @ u

def results(function):
    y = function(x, angles)
    return y, *torch.autograd.grad(y.pow(3).sum(), (x, angles))

graphs = []

def backend(graph, inputs):
    graphs.append(graph)
    return graph

torch.testing.assert_close(
    torch.compile(function, fullgraph=True, backend=backend)(x, angles), function(x, angles)
)
assert sum("givens_flows" in str(node.target) for node in graphs[0].graph.nodes) == 2
compiled_results = results(torch.compile(function, fullgraph=True, backend="aot_eager"))
torch.testing.assert_close(compiled_results, results(function))

rest = schedule.name, False, compiled.__name__
for rows in (torch.randn(1, 3, 6, requires_grad=True), None):
    given = rows, angles.detach()[None].requires_grad_()
    torch.library.opcheck(autograd._turn, (*given, *rest))
    y = autograd._turn(*given, *rest).detach()
    torch.library.opcheck(
        autograd._pull, (y, torch.randn_like(y), given[1].detach(), *rest, rows is None)
    )
"""


def test_a_compiled_graph_takes_the_engine_as_one_operator_of_torch():
    # In a process of its own: the compiler cannot look into this run's type checks.
    subprocess.run([sys.executable, "-c", COMPILED], check=True)


def test_export_and_back():
    layer, x = Layer(), torch.randn(3, 6)
    program = torch.export.export(layer, (x,))
    torch.testing.assert_close(program.module()(x), layer(x))


def test_a_graph_wants_its_schedule_to_exist():
    with pytest.raises(ValueError, match=r"crossing\(77\) must be made before"):
        givens.Schedule.named("crossing(77)")
