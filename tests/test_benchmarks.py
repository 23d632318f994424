"""The benchmarks run and write what they measured."""

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks import (
    checks,
    gpu,
    images,
    memory,
    optimizer_cost,
    optimizers,
    orthogonal,
    per_sample,
    race,
    spline,
    spline_methods,
    steps,
    timing,
    toy_density,
)
from benchmarks.loop import SAVED_PER_ROUND, plain_loop
from benchmarks.report import show_toy_densities
from flows import givens

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def as_zuko_wants_it(request):
    if find_spec("zuko"):
        request.getfixturevalue("zuko")


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Call a script's main with arguments; returns the content of its JSON."""
    monkeypatch.setattr(timing, "RESULTS", tmp_path)
    monkeypatch.setattr(race, "LOGS", tmp_path)

    def call(script, *arguments):
        monkeypatch.setattr(sys, "argv", [script.__name__, *arguments])
        script.main()
        (file,) = tmp_path.glob("*.json")
        return json.loads(file.read_text())

    return call


def test_orthogonal_writes_ratios_memory_and_errors_of_every_method(run, tmp_path, monkeypatch):
    monkeypatch.setattr(orthogonal, "COMPILED_TO", 0)  # no second process
    content = run(orthogonal, "--sizes", "2", "4", "--seconds", "0", "--device", "cpu")
    assert content["versions"]["torch"] == torch.__version__
    assert "--sizes 2 4" in content["command"]
    rows = {(row["method"], row["n"]): row for row in content["rows"]}
    methods = ["crossing, auto", "cosine_sine, product", "odd_even, rounds", "our CWY"]
    methods += ["torch matrix_exp", "torch cayley", "torch householder", "loop over rounds"]
    for method in methods:
        for n in (2, 4):
            row = rows[method, n]
            assert min(row[f"{mode}_ratio"] for mode in orthogonal.MODES) > 0
            assert row["orthogonality_float32"] < 2e-6
            assert row["gradient_error"] < (1e-3 if method == "torch matrix_exp" else 2e-6)
            assert row["orthogonality_float64"] < 1e-14
    assert "got odd_even(4)" in rows["odd_even, product", 4]["skipped"]["step"]
    run(orthogonal, "--plot", "--device", "cpu", "--figure", str(tmp_path / "figure.png"))
    assert (tmp_path / "figure.png").stat().st_size > 10_000


def test_auto_is_measured_in_a_process_without_numba():
    rows = orthogonal.without_compiled([2], seconds=0)
    assert {"crossing, auto without numba", "cosine_sine, auto without numba"} <= {
        row["method"] for row in rows
    }
    assert all(row["step_ratio"] > 0 for row in rows)


def test_what_is_too_slow_or_not_installed_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "nflows.transforms.orthogonal", None)
    rows = orthogonal.measure([2], seconds=0, only="nflows")
    assert all("nflows" in rows[1]["skipped"][mode] for mode in orthogonal.MODES)
    rows = orthogonal.measure([2, 4], seconds=0, limit=1e-9, only="our CWY")
    reasons = [row["skipped"]["step"] for row in rows if row["method"] == "our CWY"]
    assert "one call takes" in reasons[0] and "at n = 2" in reasons[1]


def test_per_sample_compares_with_a_copy_and_a_loop(run):
    options = ["--sizes", "4", "--samples", "8", "--seconds", "0", "--memory", "2e-6"]
    rows = run(per_sample, *options, "--device", "cpu")["rows"]
    assert {row["schedule"] for row in rows} == {"butterfly(4)", "round_robin(4)"}
    assert {row["samples"] for row in rows} == {8, 4}  # 4 where the loop would keep too much
    for row in rows:
        if row["method"] in ("auto", "rounds"):
            assert row["forward_over_copy"] > 0 and row["forward_backward_over_copy"] > 0
            assert row["saved_mib"] * 2**20 == 4 * 4 * row["samples"]  # the output alone
            beside_loop = row["samples"] == 4 or "butterfly" in row["schedule"]
            assert ("forward_over_loop" in row) == beside_loop


def test_the_loop_rotates_and_keeps_what_we_say():
    schedule = givens.round_robin(32)
    x = torch.randn(64, 32, requires_grad=True)
    angles = torch.randn(64, schedule.num_angles, requires_grad=True)
    loop = plain_loop(schedule, "cpu")
    torch.testing.assert_close(loop(x, angles), givens.rotate(x, angles, schedule))
    torch.testing.assert_close(
        loop(x, angles[0]), givens.rotate(x, angles[0], schedule), atol=1e-5, rtol=1e-5
    )
    expected = 4 * 64 * (32 * SAVED_PER_ROUND * len(schedule) + schedule.num_angles) / 2**20
    assert per_sample.saved_mib(loop, x, angles) == pytest.approx(expected, rel=0.1)


def test_spline_compares_every_kind(run, monkeypatch):
    cases = [("own", (8, 4), 4), ("shared", (8, 4), 4), ("coupling", (8, 4), 4)]
    monkeypatch.setattr(spline, "CASES", [*cases, ("own", (2, 3, 2, 2), 4)])
    rows = run(spline, "--seconds", "0", "--device", "cpu")["rows"]
    for row in rows:
        if row["method"] != "zuko":  # which may not be installed
            assert min(row[f"{mode}_over_ours"] for mode in spline.MODES) > 0
    own = [row["method"] for row in rows if row["kind"] == spline_methods.KINDS["own"]]
    assert own == 2 * ["ours", "ours, plain", "nflows", "zuko"]


@pytest.mark.parametrize("kind", spline_methods.KINDS)
def test_splines_that_are_compared_are_bijections(kind):
    x = torch.randn(6, 4)
    for name, make in spline_methods.methods(kind, (6, 4), 4, "cpu").items():
        if name == "zuko" and not find_spec("zuko"):
            continue
        method = make()
        y, log_derivative = method.forward(x)
        back, opposite = method.inverse(y)
        torch.testing.assert_close(back, x, atol=1e-3, rtol=1e-3)
        torch.testing.assert_close(opposite, -log_derivative, atol=1e-3, rtol=1e-3)


def test_memory_of_reversible_chains_does_not_grow(run, tmp_path):
    options = ["--depths", "1", "2", "3", "--batch", "8", "--device", "cpu"]
    rows = run(memory, *options, "--seconds", "0")["rows"]
    assert [row["memory"] for row in rows] == 3 * list(memory.MODES)
    growth = {row["memory"]: row["mib_per_more_step"] for row in rows[-3:]}
    assert 0 <= growth["reversible"] < 0.03 * growth["store"]
    assert growth["reversible"] < growth["checkpoint"] < 0.1 * growth["store"]
    for row in rows:
        assert row["gradient_error"] < 1e-5 and row["step_over_store"] > 0
        assert (row["inversion_error"] is not None) == (row["memory"] == "reversible")
    run(memory, "--plot", "--device", "cpu", "--figure", str(tmp_path / "figure.png"))
    assert (tmp_path / "figure.png").stat().st_size > 10_000


def test_peak_of_what_is_allocated():
    def function() -> None:
        first = torch.empty(1000)
        del first
        second, third = torch.empty(2000), torch.empty(500)
        del second, third

    assert timing.peak_allocated(function, "cpu") == 4 * 2500


def test_steps_compares_one_architecture(run, monkeypatch):
    monkeypatch.setattr(steps, "CASES", [(2, 4), (5, 4)])
    rows = run(steps, "--seconds", "0", "--device", "cpu")["rows"]
    assert [row["method"] for row in rows] == 2 * list(steps.MODELS)
    for case in dict.fromkeys(row["case"] for row in rows):
        found = [row for row in rows if row["case"] == case and not row["skipped"]]
        assert {row["method"] for row in found} >= {"ours", "nflows"}
        assert len({row["parameters"] for row in found}) == 1
        assert all(row["ours_over_this"] > 0 for row in found)


@pytest.mark.parametrize("library", list(steps.MODELS))
def test_models_that_are_compared_have_the_same_shapes(library):
    if library in ("zuko", "normflows") and not find_spec(library):
        pytest.skip(f"{library} is not installed: it comes with the extra bench")
    torch.manual_seed(0)
    ours, theirs = steps.MODELS["ours"](5), steps.MODELS[library](5)
    pairs = zip(ours.parameters(), theirs.parameters(), strict=True)
    assert all(p.shape == q.shape for p, q in pairs)
    inputs = torch.randn(7, 5)
    log_prob = theirs.log_prob(inputs)
    (gradient,) = torch.autograd.grad(log_prob.sum(), next(theirs.parameters()))
    assert log_prob.shape == (7,) and log_prob.isfinite().all() and gradient.any()


def test_toy_density_trains_in_processes_and_draws(run, tmp_path):
    options = ["--densities", "banana", "--seconds", "0.2", "--points", "2000", "--seeds", "0"]
    first = run(toy_density, *options, "--models", "ours")["rows"]
    models = ["ours", "nflows NSF"]
    rows = run(toy_density, *options, "--models", *models, "--resume")["rows"]
    assert rows[:1] == first  # what is known is not run again
    assert [row["model"] for row in rows] == models
    for row in rows:
        assert 0 < row["kl"] < 5 and row["standard_error"] > 0 and row["steps"] > 0
    figure = tmp_path / "figure.png"
    run(toy_density, "--plot", "--figure", str(figure))
    assert figure.stat().st_size > 10_000


@pytest.mark.parametrize("name", toy_density.MODELS)
def test_flows_that_are_compared_are_densities_in_the_units_of_the_data(name):
    package = name.split()[0]
    if package != "ours":
        pytest.importorskip(package)
    flow = toy_density.MODELS[name].make(5 + 3 * torch.randn(1000, 2)).eval()
    axis = torch.linspace(-15, 25, 201)
    with torch.no_grad():
        mass = flow.log_prob(torch.cartesian_prod(axis, axis)).exp().sum() * 0.2**2
    assert mass == pytest.approx(1, abs=0.02)


def test_the_median_of_the_seeds_is_shown_and_failures_are_told(capsys):
    rows = [{"density": "banana", "model": "ours", "seconds": 1, "clock": "wall"}]
    rows = [rows[0] | {"seed": seed} for seed in range(4)]
    for row, kl in zip(rows, (0.3, 0.1, 0.2), strict=False):
        row.update(kl=kl, standard_error=kl / 10)
    rows[3]["error"] = "out of memory"
    chosen = toy_density.summary(rows)
    assert chosen["banana", "ours"]["seed"] == 2
    show_toy_densities(rows, chosen, "a CPU")
    shown = capsys.readouterr().out
    assert "200.00 ± 20.00" in shown and "seed 3: out of memory" in shown


def test_optimizers_train_and_are_drawn(run, tmp_path, capsys):
    options = ["--tasks", "breast_cancer", "--seeds", "0", "--scale", "0.03"]
    (row,) = run(optimizers, *options, "--budgets", "time", "--optimizers", "NG+")["rows"]
    assert "After equal time" in capsys.readouterr().out
    assert -100 < row["test"] < 100 and row["curve"]
    steps = optimizers.run(row | {"budget": "steps", "optimizer": "AdamW", "steps": 20})
    assert steps["taken"] == 20 and len(steps["curve"]) > 10
    figure = tmp_path / "figure.png"
    run(optimizers, "--plot", "--figure", str(figure))
    assert figure.stat().st_size > 10_000


@pytest.mark.parametrize("name", optimizers.OPTIMIZERS)
def test_every_optimizer_moves_every_parameter_of_its_task(name):
    task = optimizers.Task("breast_cancer")
    flow = task.make_flow()
    before = [parameter.detach().clone() for parameter in flow.parameters()]
    settings = optimizers.SETTINGS[name]["breast_cancer"]
    optimizer = optimizers.make_optimizer(name, task, settings, flow)
    batches = task.batches()
    for _ in range(3):
        optimizer.zero_grad()
        (-flow.log_prob(next(batches)).mean()).backward()
        optimizer.step()
    for (where, parameter), old in zip(flow.named_parameters(), before, strict=True):
        assert not torch.equal(parameter, old), where


def test_optimizer_cost_is_over_adamw(run, monkeypatch):
    monkeypatch.setattr(optimizer_cost, "STEPS", 2)
    rows = run(optimizer_cost, "--optimizers", "NG+", "--turns", "1")["rows"]
    assert [row["optimizer"] for row in rows] == ["AdamW", "NG+"]
    assert rows[0]["over_adamw"] == 1 and rows[1]["step_ms"] > 0


def test_images_trains_every_model_and_draws_what_it_found(run, tmp_path):
    options = ["--data", "digits", "--minutes", "0.005", "--samples", str(tmp_path)]
    rows = run(images, *options)["rows"]
    assert [row["model"] for row in rows] == ["ours", "normflows", "nflows"]
    for row in rows:
        if row["model"] == "normflows" and not find_spec("normflows"):
            assert "normflows" in row["error"]
            continue
        assert row["steps"] > 0 and 1 < row["test_bits_per_dim"] < 20
        assert row["inverse_error"] < 1e-4
    assert (tmp_path / "digits.png").stat().st_size > 1_000
    run(images, "--plot", "--figure", str(tmp_path / "figure.png"))
    assert (tmp_path / "figure.png").stat().st_size > 10_000


@pytest.mark.filterwarnings("ignore:torch.lu is deprecated:UserWarning")  # normflows
@pytest.mark.parametrize("alpha", [0.05, None])
@pytest.mark.parametrize("made", ["normflows", "nflows"])
def test_log_prob_of_image_peers_counts_every_step(made, alpha):
    """Against the log-det of the whole map by autograd, which knows nothing of their books."""
    if not find_spec(made):
        pytest.skip(f"{made} is not installed")
    settings = images.SETTINGS["digits", made]["init_args"] | {"alpha": alpha, "steps": 2}
    model = images.MODELS[made]((1, 4, 4), 17, **settings).double()
    inputs = torch.randint(17, (30, 1, 4, 4)).double() / 17
    model.train().log_prob(inputs)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.05)
    model.eval()
    x = model.dequantize(inputs)[0]
    torch.testing.assert_close(model.there_and_back(x), x, atol=1e-5, rtol=1e-5)
    model.dequantize.forward = lambda inputs: (inputs, None)
    noise, base = model.noise_and_base(x[:1])
    jacobian = torch.autograd.functional.jacobian(lambda x: model.noise_and_base(x)[0], x[:1])
    logabsdet = jacobian.view(16, 16).slogdet()[1]
    assert noise.shape == (1, 16)
    torch.testing.assert_close(model.log_prob(x[:1]), base + logabsdet)


def test_checks_accept_our_engines_and_catch_a_wrong_one(monkeypatch):
    rows = checks.run("cpu", budget=60, sizes=(3,), large=(8,))
    assert checks.show(rows) == 0
    assert {"rounds", "product"} <= {row["impl"] for row in rows if row["ok"]}
    exact = givens.matrix

    def wrong(angles, schedule, *, impl="auto"):
        return exact(angles, schedule, impl=impl) * (1 + 1e-5 * (impl == "rounds"))

    monkeypatch.setattr(givens, "matrix", wrong)
    rows = checks.run("cpu", budget=60, sizes=(3,), large=(8,))
    assert {row["impl"] for row in rows if row["ok"] is False} == {"rounds", "auto"} - {"auto"}


def test_gpu_writes_every_part(tmp_path, capsys):
    path = tmp_path / "gpu.json"
    parts = ["orthogonal", "per_sample"]
    results = gpu.measure("cpu", parts=parts, budget=0, sizes=[2], path=path)
    assert gpu.show(results) == 0
    content = json.loads(path.read_text())
    assert content["orthogonal"] and set(content["seconds"]) == set(parts)


def test_gpu_says_that_there_is_none(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["gpu"])
    with pytest.raises(SystemExit) as stop:
        gpu.main()
    assert stop.value.code == 2 and "no GPU" in capsys.readouterr().out


def test_gpu_needs_no_nflows():
    code = (
        "import sys; sys.modules['nflows'] = None\n"
        "from benchmarks import gpu; gpu.import_core()\n"
        "from benchmarks import checks, orthogonal, per_sample\n"
        "print([m for m in sys.modules if m.startswith('nflows.')])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "[]", done.stderr


def test_candidates_take_turns_and_failures_are_told():
    order = []
    candidates = {name: lambda name=name: order.append(name) for name in "ab"}
    candidates["c"] = lambda: [][0:1].index(0)  # raises ValueError
    times = timing.interleaved(candidates, seconds=0)
    assert order[:4] == list("aabb") and order[4:] and min(times["a"], times["b"]) > 0
    assert times["c"].startswith("ValueError")


def test_peak_memory_is_seen():
    peak = timing.peak_mib(lambda: torch.ones(2**24).sum(), "cpu")
    assert peak is None or 60 < peak < 80
