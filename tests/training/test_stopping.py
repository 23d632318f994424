"""Early stopping: when, why, and what a resumed run makes of it."""

import json

import pytest

import train
from flows import Flow, Rotation
from flows.distributions import Normal
from flows.training import DensityEstimator

pytestmark = pytest.mark.usefixtures("undrawn")

SMALL = [
    "--trainer.enable_progress_bar=false",
    "--trainer.max_epochs=30",
    "--model.flow.init_args.layers=1",
    "--model.flow.init_args.blocks=0",
    "--data.init_args.batches_per_epoch=2",
    "--data.init_args.val_size=200",
    "--data.init_args.test_size=200",
    # So large a rate makes the first epochs the best ones.
    "--model.lr=2.0",
    "--model.warmup_steps=0",
]


def summary_of(folder) -> dict:
    return json.loads((folder / "summary.json").read_text())


def column(folder, name: str) -> list[float]:
    lines = (folder / "metrics.csv").read_text().splitlines()
    place = lines[0].split(",").index(name)
    return [float(line.split(",")[place]) for line in lines[1:]]


def validations(folder) -> list[float]:
    return column(folder, "val/nll")


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    root = tmp_path_factory.mktemp("stopped")
    train.main([*SMALL, f"--trainer.default_root_dir={root}", "--model.early_stopping_patience=3"])
    (folder,) = root.glob("*/*")
    return folder


def test_a_run_stops_after_so_many_epochs_without_a_better_one(stopped):
    scores = validations(stopped)
    best = scores.index(min(scores))
    assert len(scores) == best + 1 + 3 < 30
    assert summary_of(stopped)["stopped_by"] == "early_stopping_patience"
    assert summary_of(stopped)["epochs"] == len(scores)
    assert summary_of(stopped)["checkpoint"].endswith("best.ckpt")


def test_resumed_it_only_ends_again_unless_it_may_be_more_patient(stopped):
    scores = validations(stopped)
    train.main(["--ckpt_path", str(stopped)])
    assert validations(stopped) == scores
    assert summary_of(stopped)["stopped_by"] == "early_stopping_patience"
    train.main(["--ckpt_path", str(stopped), "--model.early_stopping_patience=4"])
    assert validations(stopped)[: len(scores)] == scores
    assert len(validations(stopped)) > len(scores)


@pytest.mark.parametrize(
    "limit", ["max_epochs=1", "max_epochs=0", "max_steps=3", "max_time=00:00:00:00"]
)
def test_the_summary_names_what_else_ended_a_run(tmp_path, limit):
    train.main([*SMALL, f"--trainer.default_root_dir={tmp_path}", f"--trainer.{limit}"])
    (folder,) = tmp_path.glob("*/*")
    assert summary_of(folder)["stopped_by"] == limit.partition("=")[0]


def test_the_learning_rate_falls_to_zero_by_the_end_of_max_time(tmp_path):
    options = ["--trainer.max_time=00:00:00:02", "--trainer.max_epochs=-1"]
    train.main([*SMALL, f"--trainer.default_root_dir={tmp_path}", *options])
    (folder,) = tmp_path.glob("*/*")
    rates = column(folder, "lr")
    assert rates == sorted(rates, reverse=True) and len(rates) > 3
    assert rates[0] > 1.0 and rates[-1] < 0.1
    assert summary_of(folder)["stopped_by"] == "max_time"


@pytest.mark.parametrize("patience", [0, -1])
def test_patience_is_at_least_one(patience):
    with pytest.raises(ValueError, match="early_stopping_patience must be at least 1, got"):
        DensityEstimator(Flow(Rotation(2), Normal(2)), early_stopping_patience=patience)
