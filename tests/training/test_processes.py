"""Several processes train what one would."""

import subprocess

import pytest
import torch
from pytorch_lightning.strategies import SingleDeviceStrategy

from benchmarks.stress.crashes import RUN, environment
from benchmarks.stress.processes import SMALL, stopped_processes, two_nodes, two_processes
from flows.training.totals import Totals

FILES = [
    "best.ckpt",
    "config.yaml",
    "density.png",
    "history.png",
    "last.ckpt",
    "metrics.csv",
    "pictures",
    "report.html",
    "summary.json",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("processes")


@pytest.mark.parametrize("run", [two_processes, two_nodes])
def test_two_processes_do_what_one_with_twice_the_batch_does(folder, run):
    found = run(folder, epochs=2)
    assert found["ok"], found
    assert found["epochs"] == 2 and found["files"] == FILES


def test_processes_that_are_stopped_go_on_where_they_were(folder):
    found = stopped_processes(folder, epochs=2)
    assert found["ok"], found


def test_all_processes_end_when_one_diverges(tmp_path):
    options = ["--trainer.devices=2", "--trainer.strategy=ddp", "--model.lr=1e12"]
    root = f"--trainer.default_root_dir={tmp_path}"
    process = subprocess.run(
        [*RUN, *SMALL, *options, root],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert process.returncode == 1
    assert "training diverged in epoch 0, step " in process.stderr
    assert "Traceback" not in process.stderr
    assert not list(tmp_path.glob("*/*/summary.json"))


def test_totals_are_means_and_squares_over_all_batches():
    values = torch.randn(10, dtype=torch.float64) + 3
    totals = Totals()
    for part in values.split([1, 4, 0, 5]):
        totals.add("x", part.float() if len(part) == 0 else part)
    rows, total, squares = totals.over_processes(SingleDeviceStrategy())["x"]
    assert rows == 10
    torch.testing.assert_close(total, values.sum())
    torch.testing.assert_close(squares, values.square().sum())


def test_no_values_have_no_totals():
    assert Totals().over_processes(SingleDeviceStrategy()) == {}
