"""Samples from checkpoints: plain, of a class, given a context."""

from pathlib import Path

import numpy as np
import pytest
import torch

import flows
import train
from flows.training.sampling import read_context, write_samples

TABLE = {"features": 2, "layers": 1, "hidden_features": 4, "blocks": 0}
IMAGES = {"shape": [1, 4, 4], "grey_levels": 4, "levels": 1, "steps": 1, "hidden_features": 4}
FLOWS = {
    "plain": ("RotationSplineFlow", TABLE),
    "wide": ("RotationSplineFlow", {**TABLE, "features": 3}),
    "context": ("RotationSplineFlow", {**TABLE, "context_features": 2}),
    "classes": ("Glow", {**IMAGES, "classes": 3}),
    "images": ("Glow", IMAGES),
    "vae": ("SylvesterVAE", {"shape": [1, 4, 4], "grey_levels": 4}),
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[str, Path]:
    """A run folder for every flow, as train.py leaves it; random weights."""
    torch.manual_seed(0)
    root = tmp_path_factory.mktemp("runs")
    for name, (recipe, options) in FLOWS.items():
        flow = getattr(flows.recipes, recipe)(**options)
        for parameter in flow.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
        config = {"class_path": f"flows.recipes.{recipe}", "init_args": options}
        weights = {f"flow.{key}": value for key, value in flow.state_dict().items()}
        (root / name).mkdir()
        torch.save({"state_dict": weights, "flow_config": config}, root / name / "best.ckpt")
    return {name: root / name for name in FLOWS}


def drawn(run: Path, n: int, given: torch.Tensor | None, seed: int, **options) -> torch.Tensor:
    flow = flows.load(run)
    torch.manual_seed(seed)
    with torch.no_grad():
        return flow.sample(n, given, **options)


def test_labels_give_a_row_each(runs, tmp_path):
    path = write_samples(runs["classes"], 5, labels=[2, 0], seed=3, output=tmp_path / "x.npy")
    expected = drawn(runs["classes"], 5, torch.tensor([2, 0]), 3)
    assert expected.shape == (2, 5, 1, 4, 4)
    assert np.array_equal(np.load(path), expected.numpy())


@pytest.mark.parametrize("suffix", [".npy", ".csv"])
def test_context_rows_give_a_row_each(runs, tmp_path, suffix):
    rows = torch.tensor([[0.5, 1.0], [-1.0, 2.0], [0.0, 0.25]])
    path = tmp_path / f"x{suffix}"
    write_samples(runs["context"], 4, context=rows, temperature=0.5, seed=1, output=path)
    expected = drawn(runs["context"], 4, rows, 1, temperature=0.5)
    assert expected.shape == (3, 4, 2)
    if suffix == ".npy":
        assert np.array_equal(np.load(path), expected.numpy())
    else:
        found = np.loadtxt(path, delimiter=",")
        np.testing.assert_allclose(found, expected.flatten(0, 1).numpy(), rtol=1e-5)


def test_samples_depend_on_the_seed_alone(runs, tmp_path):
    files = [
        write_samples(runs["plain"], 4, seed=seed, output=tmp_path / f"{i}.npy").read_bytes()
        for i, seed in enumerate((5, 5, 6))
    ]
    assert files[0] == files[1] != files[2]


@pytest.mark.parametrize("name", ["plain", "images", "vae"])
def test_without_context_there_are_64(runs, tmp_path, name):
    path = write_samples(runs[name], output=tmp_path / "x.npy")
    assert len(np.load(path)) == 64


@pytest.mark.parametrize(
    "args, name, shape",
    [
        (["--labels", "1"], "samples-8-labels-1-temperature-1-seed-0.png", None),
        (["--labels", "0,1,2", "--num_samples", "3"], "samples-3-labels-0-1-2-temp*.png", None),
        (["--labels", "0,2", "--output", "x.npy"], "x.npy", (2, 8, 1, 4, 4)),
    ],
)
def test_the_command_takes_labels(runs, tmp_path, monkeypatch, capsys, args, name, shape):
    monkeypatch.chdir(tmp_path)
    train.main(["sample", "--ckpt_path", str(runs["classes"]), *args])
    written = Path(capsys.readouterr().out.strip())
    assert written.match(name) and written.stat().st_size > 0
    if shape is not None:
        assert np.load(written).shape == shape


@pytest.mark.parametrize("suffix", [".npy", ".csv"])
def test_the_command_takes_context_rows(runs, tmp_path, monkeypatch, capsys, suffix):
    monkeypatch.chdir(tmp_path)
    rows = np.array([[0.5, 1.0], [-1.0, 2.0]])
    np.save("rows.npy", rows)
    np.savetxt("rows.csv", rows, delimiter=",", header="age,height", comments="")
    args = ["sample", "--ckpt_path", str(runs["context"]), "--context", f"rows{suffix}"]
    train.main([*args, "--output", "x.npy", "--seed", "4"])
    expected = drawn(runs["context"], 8, torch.from_numpy(rows).float(), 4)
    assert np.array_equal(np.load("x.npy"), expected.numpy())
    capsys.readouterr()
    train.main(args)
    assert (
        Path(capsys.readouterr().out.strip()).name
        == "samples-8-context-2-temperature-1-seed-0.png"
    )


@pytest.mark.parametrize(
    "text, expected",
    [
        ("1,2\n3,4\n", [[1, 2], [3, 4]]),
        ("a,b\n1,2\n\n3,4\n", [[1, 2], [3, 4]]),
        ("7\n8\n", [[7], [8]]),
        ("7,8", [[7, 8]]),
        ("\ufeff7,8\n9,10\n", [[7, 8], [9, 10]]),
    ],
)
def test_contexts_are_read_with_and_without_a_header(tmp_path, text, expected):
    (tmp_path / "c.csv").write_text(text)
    assert torch.equal(read_context(tmp_path / "c.csv"), torch.tensor(expected).double())


def written(flow: torch.nn.Module, recipe: str, path: Path) -> Path:
    config = {"class_path": "flows.recipes.RotationSplineFlow", "init_args": FLOWS[recipe][1]}
    weights = {f"flow.{key}": value for key, value in flow.state_dict().items()}
    torch.save({"state_dict": weights, "flow_config": config}, path)
    return path


def test_contexts_far_from_zero_keep_their_digits(runs, tmp_path):
    near = torch.tensor([[-1.0, 0.0], [0.0, 0.0], [1.0, 0.0]], dtype=torch.float64)
    far = near + torch.tensor([1.7e9, 0.0], dtype=torch.float64)
    flow = flows.load(runs["context"])
    flow.train().log_prob(torch.zeros(3, 2), far)
    path = written(flow, "context", tmp_path / "far.ckpt")
    np.save(tmp_path / "c.npy", far.numpy())
    context = read_context(tmp_path / "c.npy")
    write_samples(path, 1, context=context, temperature=0, output=tmp_path / "x.npy")
    assert len(np.unique(np.load(tmp_path / "x.npy")[:, 0, 0])) == 3


def test_samples_far_from_zero_keep_their_digits(runs, tmp_path):
    rows = torch.randn(200, 2, dtype=torch.float64)
    flow = flows.load(runs["plain"])
    flow.train().log_prob(rows + torch.tensor([1.7e9, 0.0], dtype=torch.float64))
    path = written(flow, "plain", tmp_path / "far.ckpt")
    write_samples(path, 50, output=tmp_path / "x.csv")
    found = np.loadtxt(tmp_path / "x.csv", delimiter=",")
    assert len(np.unique(found[:, 0])) == 50


@pytest.mark.parametrize(
    "text, words",
    [
        ("", "it has no row"),
        ("a,b\n", "it has no row"),
        ("1,2\n3\n", "no table of numbers: expected 2 numbers in line 2, got '3'"),
        ("a,b\n1,2\n\n3,x\n", "no table of numbers: expected 2 numbers in line 4, got '3,x'"),
        ("1,x\n3,4\n", "no table of numbers: expected 2 numbers in line 1, got '1,x'"),
        ("1,nan\n", "must hold finite numbers"),
    ],
)
def test_a_damaged_context_is_refused(tmp_path, text, words):
    (tmp_path / "c.csv").write_text(text)
    with pytest.raises(ValueError, match=words) as error:
        read_context(tmp_path / "c.csv")
    assert "c.csv" in str(error.value)


@pytest.mark.parametrize("array", [np.zeros(3), np.zeros((0, 2)), np.array([["a"]])])
def test_arrays_of_another_kind_are_refused(tmp_path, array):
    np.save(tmp_path / "c.npy", array)
    with pytest.raises(ValueError, match=r"c.npy (must hold|is no table)"):
        read_context(tmp_path / "c.npy")


@pytest.mark.parametrize(
    "run, args, words",
    [
        ("classes", [], "draws given labels, 0 to 2: name them with --labels; got neither"),
        ("classes", ["--context", "rows.csv"], "0 to 2: name them with --labels; got context"),
        ("classes", ["--labels", "0,3,-1"], "labels must be 0 to 2, got [3, -1]"),
        ("classes", ["--labels", "zero"], "whole numbers with commas between, got 'zero'"),
        ("classes", ["--labels", "0", "--context", "rows.csv"], "got labels and context"),
        ("context", [], "name a file of its rows with --context; got neither"),
        ("context", ["--labels", "1"], "with --context; got labels"),
        ("context", ["--context", "wide.csv"], "context must have 2 features, got (1, 3)"),
        ("context", ["--context", "gone.csv"], "gone.csv"),
        ("context", ["--context", "rows.txt"], "must end in .npy or .csv"),
        ("context", ["--context", "many.csv"], "a picture has 16 panels, got 17 rows"),
        ("plain", ["--labels", "1"], "draws without labels or context; got labels"),
        ("plain", ["--context", "rows.csv"], "draws without labels or context; got context"),
        ("vae", ["--labels", "1"], "draws without labels or context; got labels"),
        ("wide", ["--output", "x.png"], "must end in .npy or .csv, got x.png"),
        ("plain", ["--num_samples", "0"], "num_samples must be at least 1, got 0"),
        ("plain", ["--temperature", "nan"], "temperature must be finite"),
    ],
)
def test_a_mistake_is_one_line(runs, tmp_path, monkeypatch, capsys, run, args, words):
    monkeypatch.chdir(tmp_path)
    Path("rows.csv").write_text("1,2\n")
    Path("rows.txt").write_text("1,2\n")
    Path("wide.csv").write_text("1,2,3\n")
    Path("many.csv").write_text("1,2\n" * 17)
    with pytest.raises(SystemExit) as exit:
        train.main(["sample", "--ckpt_path", str(runs[run]), *args])
    assert exit.value.code == 2
    printed = capsys.readouterr().err
    assert printed.startswith("error: ") and printed.count("\n") == 1, printed
    assert words in printed


def test_names_of_files_are_taken_as_they_are(runs, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert write_samples(runs["plain"], 3, output="~/x.NPY") == tmp_path / "x.NPY"
    assert np.load(tmp_path / "x.NPY").shape == (3, 2)
    with pytest.raises(ValueError, match="output must be in a folder that exists, got "):
        write_samples(runs["plain"], 3, output=tmp_path / "none" / "x.npy")
