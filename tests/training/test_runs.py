"""Whole runs through the command line, as small as they can be."""

import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml

import flows
import train
from datasets.toy import FreshBatches

pytestmark = pytest.mark.usefixtures("undrawn")

ROOT = Path(train.__file__).parent
CONFIGS = sorted(ROOT.glob("configs/*/*.yaml"))
SMALL = [
    "--pictures_every_n_epochs=0",
    "--trainer.max_epochs=4",
    "--trainer.enable_progress_bar=false",
    "--model.flow.init_args.layers=2",
    "--data.init_args.batches_per_epoch=3",
    "--data.init_args.val_size=200",
    "--data.init_args.test_size=200",
]


def fit(root: Path, *args: str) -> Path:
    """Run train.py here and return the run folder, the only one below root."""
    train.main([*args, f"--trainer.default_root_dir={root}"])
    (folder,) = root.glob("*/*")
    return folder


def rows(folder: Path) -> list[dict[str, str]]:
    with open(folder / "metrics.csv") as file:
        return list(csv.DictReader(file))


def refused(capsys, *args: str) -> str:
    """The one line on stderr with which a command ends."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit:
        train.main(list(args))
    assert exit.value.code == 2
    printed = capsys.readouterr().err
    assert printed.startswith("error: ") and printed.count("\n") == 1, printed
    return printed


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    return fit(tmp_path_factory.mktemp("runs"), *SMALL)


@pytest.fixture
def copy(run, tmp_path) -> Path:
    return Path(shutil.copytree(run, tmp_path / "two_moons" / run.name))


def test_a_run_leaves_its_files(run):
    assert {path.name for path in run.iterdir()} == {
        "best.ckpt",
        "config.yaml",
        "density.png",
        "history.png",
        "last.ckpt",
        "metrics.csv",
        "report.html",
        "summary.json",
    }
    assert run.parent.name == "two_moons"
    assert [int(row["epoch"]) for row in rows(run)] == [0, 1, 2, 3]


def test_the_summary_holds_the_final_numbers(run):
    summary = json.loads((run / "summary.json").read_text())
    assert summary["test/kl"] > 0 and 0 < summary["test/kl_error"] < 0.2
    assert summary["seed"] == 0 and summary["wall_seconds"] > 0
    assert summary["steps"] == 12 and summary["epochs"] == 4
    assert summary["stopped_by"] == "max_epochs"
    assert Path(summary["checkpoint"]).samefile(run / "best.ckpt")
    assert summary["versions"]["torch"] == torch.__version__


def test_the_resolved_config_runs_again(run, tmp_path):
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert config["model"]["flow"]["init_args"]["layers"] == 2
    again = fit(tmp_path, "--config", str(run / "config.yaml"))
    assert rows(again) == rows(run)


def test_load_gives_the_trained_flow(run):
    flow = flows.load(run)
    assert not flow.training
    assert flow.sample(5).shape == (5, 2)
    weights = torch.load(run / "best.ckpt", weights_only=True)["state_dict"]
    for name, value in flow.state_dict().items():
        assert torch.equal(value, weights[f"flow.{name}"]), name


def test_the_test_command_repeats_the_summary(copy, capsys):
    train.main(["test", "--ckpt_path", str(copy / "best.ckpt")])
    summary = json.loads((copy / "summary.json").read_text())
    printed = capsys.readouterr().out
    assert f"{summary['test/nll']:.4f}" in printed and "test-best.json" in printed
    written = json.loads((copy / "test-best.json").read_text())
    assert written["checkpoint"] == str(copy / "best.ckpt")
    for name in ("test/nll", "test/kl", "test/kl_error"):
        assert written[name] == summary[name]


@pytest.mark.parametrize("suffix", [".png", ".npy", ".csv"])
def test_the_sample_command_writes(run, tmp_path, suffix, capsys):
    output = tmp_path / f"s{suffix}"
    train.main(["sample", "--ckpt_path", str(run), "--num_samples", "7", "--output", str(output)])
    assert capsys.readouterr().out.strip() == str(output)
    assert output.stat().st_size > 0


@pytest.mark.parametrize(
    "options",
    [
        [],
        [
            "--model.ema_decay=0.9",
            "--model.recenter_every_n_epochs=1",
            "--model.early_stopping_patience=4",
        ],
        ["--model.optimizer=NGPlus", "--model.optimizer.refresh_every=7"],
        ["--model.keep=0.3"],
    ],
    ids=["plain", "averaged, recentered, with patience", "NG+", "randomized"],
)
def test_a_resumed_run_ends_like_an_uninterrupted_one(run, tmp_path, options):
    whole = fit(tmp_path / "whole", *SMALL, *options) if options else run
    killed = tmp_path / "killed"
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "train.py"), *SMALL, *options]
        + [f"--trainer.default_root_dir={killed}"],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 120
    while not list(killed.glob("*/*/last.ckpt")) and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    (folder,) = killed.glob("*/*")
    assert not (folder / "summary.json").exists()
    train.main(["--ckpt_path", str(folder / "last.ckpt")])
    assert rows(folder) == rows(whole)
    assert list(killed.glob("*/*")) == [folder]
    summaries = [json.loads((f / "summary.json").read_text()) for f in (whole, folder)]
    assert summaries[0]["test/nll"] == summaries[1]["test/nll"]
    ends = [torch.load(f / "last.ckpt", weights_only=True) for f in (whole, folder)]
    for name, value in ends[0]["state_dict"].items():
        assert torch.equal(value, ends[1]["state_dict"][name]), name


def test_an_averaged_run_is_not_resumed_without_its_average(tmp_path, capsys):
    folder = fit(tmp_path, *SMALL, "--trainer.max_epochs=1", "--model.ema_decay=0.9")
    printed = refused(capsys, "--ckpt_path", str(folder), "--model.ema_decay=0")
    assert "expected a model.ema_decay greater than 0 to go on, got 0" in printed


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_every_config_takes_a_step(config, tmp_path):
    if "FashionMNIST" in config.read_text() and not (ROOT / "data/FashionMNIST/raw").is_dir():
        pytest.skip("Fashion-MNIST is not here: make fashion-mnist")
    folder = fit(
        tmp_path,
        f"--config={config}",
        "--trainer.max_epochs=1",
        "--trainer.limit_train_batches=1",
        "--trainer.limit_val_batches=1",
        "--trainer.limit_test_batches=1",
        "--trainer.enable_progress_bar=false",
    )
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["experiment"] == config.stem and summary["steps"] == 1


def test_images_report_bits_and_are_sampled(tmp_path, capsys):
    folder = fit(
        tmp_path,
        f"--config={ROOT / 'configs/images/digits.yaml'}",
        "--trainer.max_epochs=1",
        "--trainer.limit_train_batches=1",
        "--trainer.enable_progress_bar=false",
    )
    summary = json.loads((folder / "summary.json").read_text())
    assert 1 < summary["test/bits_per_dim"] < 4.1
    train.main(["sample", "--ckpt_path", str(folder), "--num_samples", "3"])
    assert (folder / "samples-3-temperature-1-seed-0.png").exists()


def test_wandb_logs_offline_without_asking(tmp_path):
    folder = fit(tmp_path, *SMALL, "--trainer.max_epochs=1", "--trainer.logger=WandbLogger")
    assert list(folder.glob("wandb/offline-run-*"))


def test_print_config_shows_every_key(capsys):
    with pytest.raises(SystemExit) as exit:
        train.main(["--print_config"])
    assert exit.value.code == 0
    config = yaml.safe_load(capsys.readouterr().out)
    assert {"bins", "layers", "tail_bound"} <= set(config["model"]["flow"]["init_args"])
    assert config["trainer"]["max_epochs"] > 1


def test_one_batch_is_one_batch_whatever_was_imported_before():
    code = (
        "from typing import Union; Union[float, int, None]; import train; "
        "train.main(['--trainer.limit_train_batches=1', '--print_config'])"
    )
    printed = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert yaml.safe_load(printed)["trainer"]["limit_train_batches"] == 1
    assert "limit_train_batches: 1\n" in printed


def test_help_fits_a_screen_and_names_commands_and_configs(capsys):
    train.main(["--help"])
    printed = capsys.readouterr().out
    assert printed.count("\n") <= 24 and max(map(len, printed.splitlines())) <= 80
    words = set(re.findall(r"\w+", printed))
    assert {"fit", "list", "test", "audit", "sample"} <= words
    assert {path.stem for path in CONFIGS} <= words


def test_the_list_has_a_line_for_every_experiment(capsys):
    train.main(["list"])
    _, *lines = capsys.readouterr().out.splitlines()
    names = [str(path.relative_to(ROOT / "configs").with_suffix("")) for path in CONFIGS]
    assert [line.split()[0] for line in lines] == names
    assert all(": " in line and len(line) < 90 for line in lines)
    assert "unrecognized arguments: --nope" in refused(capsys, "list", "--nope")


@pytest.mark.parametrize(
    "args, words",
    {
        "misspelt key": (["--model.flow.init_args.layerz=3"], ["layerz", "not accepted"]),
        "misspelt section": (["--modle.lr=3"], ["--modle.lr"]),
        "wrong type": (["--data.init_args.batch_size=many"], ["int", "many"]),
        "missing config": (["--config", "nowhere.yaml"], ["nowhere.yaml"]),
        "one feature": (["--model.flow.init_args.features=1"], ["at least 2", "got 1"]),
        "unknown flow": (["--model.flow.class_path=flows.recipes.Nope"], ["Nope"]),
        "unknown data": (
            ["--data=datasets.toy.Nope"],
            ['"data": Problem with given class_path', "no attribute 'Nope'"],
        ),
        "missing data": (
            ["--data=datasets.images.FashionMNIST", "--data.init_args.root=nowhere"],
            ["nowhere", "train-images-idx3-ubyte"],
        ),
        "missing checkpoint": (["--ckpt_path", "nowhere/last.ckpt"], ["nowhere/last.ckpt"]),
        "flow of other width": (["--model.flow.init_args.features=3"], ["3 features", "2)"]),
        "abbreviated option": (["--ckpt=nowhere/last.ckpt"], ["--ckpt=nowhere"]),
        "option without value": (["--ckpt_path", "--model.lr=1e-3"], ["--ckpt_path"]),
        "no batch": (["--data.init_args.batch_size=0"], ["batch_size", "at least 1, got 0"]),
        "fast_dev_run": (["--trainer.fast_dev_run=true"], ["fast_dev_run", "max_epochs=1"]),
        "optimizer and its decay": (
            ["--model.optimizer=NGPlus", "--model.weight_decay=0.1"],
            ["weight_decay belongs to the optimizer", "0.1"],
        ),
        "keep": (["--model.keep=0"], ["keep must be greater than 0", "got 0"]),
        "optimizer of randomized layers": (
            ["--model.optimizer=NGPlus", "--model.keep=0.5"],
            ["NGPlus needs the inputs of layers", "RandomizedLinear"],
        ),
        "optimizer out of range": (
            ["--model.optimizer=NGPlus", "--model.optimizer.damping=-1"],
            ["damping", "-1"],
        ),
        "no test": (["--trainer.limit_test_batches=0"], ["limit_test_batches must not be 0"]),
        "test without checkpoint": (["test"], ["--ckpt_path"]),
        "sample without checkpoint": (["sample"], ["required: --ckpt_path", "sample --help"]),
        "samples in words": (["sample", "--ckpt_path=x", "--num_samples=two"], ["'two'"]),
        "unknown command": (["evaluate"], ["evaluate: expected fit, list, test, audit, sample"]),
        "sample without file": (["sample", "--ckpt_path", "nowhere"], ["nowhere"]),
    }.values(),
    ids=lambda value: " ".join(value)[:40],
)
def test_a_mistake_is_one_line(args, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    printed = refused(capsys, *args)
    for word in words:
        assert word in printed
    assert not list(tmp_path.iterdir())


def test_a_missing_extra_is_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "torchvision", None)
    printed = refused(capsys, "--data=datasets.images.MNIST", "--data.init_args.download=true")
    assert "extra `vision`" in printed
    assert not list(tmp_path.iterdir())


def test_a_checkpoint_named_in_a_config_is_refused(run, tmp_path, capsys):
    config = tmp_path / "resume.yaml"
    config.write_text(f"ckpt_path: {run}/last.ckpt\n" + (run / "config.yaml").read_text())
    config.write_text(config.read_text().replace("\nckpt_path: null", ""))
    assert "command line" in refused(capsys, "--config", str(config))


def test_a_run_folder_stands_for_its_checkpoint(copy, capsys):
    before = rows(copy)
    train.main(["test", "--ckpt_path", str(copy)])
    train.main(["--ckpt_path", str(copy)])  # the run is complete: only its end is done again
    assert rows(copy) == before and (copy / "summary.json").exists()


def test_a_run_is_not_resumed_with_other_data(copy, capsys):
    before = contents(copy)
    printed = refused(capsys, "--ckpt_path", str(copy / "last.ckpt"), "--data.init_args.seed=5")
    assert "seed=5" in printed and "seed=0" in printed
    assert contents(copy) == before


def test_a_run_is_not_resumed_to_an_earlier_epoch(copy, capsys):
    before = contents(copy)
    printed = refused(capsys, "--ckpt_path", str(copy), "--trainer.max_epochs=3")
    assert "has 4 epochs behind it" in printed and "got 3" in printed
    assert contents(copy) == before


def test_weights_alone_are_not_resumed(copy, capsys):
    checkpoint = torch.load(copy / "last.ckpt", weights_only=True)
    del checkpoint["optimizer_states"]
    torch.save(checkpoint, copy / "last.ckpt")
    before = contents(copy)
    assert "optimizer_states" in refused(capsys, "--ckpt_path", str(copy / "last.ckpt"))
    assert contents(copy) == before


def test_a_checkpoint_outside_a_run_starts_a_folder_of_its_own(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copy(run / "last.ckpt", tmp_path / "lone.ckpt")
    config = ["--config", str(run / "config.yaml"), "--trainer.default_root_dir=out"]
    train.main([*config, "--ckpt_path", "lone.ckpt"])
    assert {path.name for path in tmp_path.iterdir()} == {"lone.ckpt", "out"}
    (folder,) = (tmp_path / "out").glob("*/*")
    assert folder.parent.name == "two_moons" and (folder / "summary.json").exists()


def test_divergence_ends_the_run_unfinished(tmp_path, capsys):
    with pytest.raises(SystemExit) as exit:
        fit(tmp_path, *SMALL, "--model.lr=1e12", "--model.warmup_steps=0")
    assert exit.value.code == 1
    printed = capsys.readouterr().err
    assert "error: training diverged in epoch 0, step " in printed
    assert not list(tmp_path.glob("*/*/summary.json"))


def test_a_run_that_diverged_goes_on_from_its_last_checkpoint(run, tmp_path, capsys, monkeypatch):
    whole = FreshBatches.__iter__

    def spoiled(self):
        for inputs, *_ in whole(self):
            inputs[5, 1] = torch.nan if self.epoch == 2 else inputs[5, 1]
            yield (inputs,)

    with monkeypatch.context() as patch, pytest.raises(SystemExit) as exit:
        patch.setattr(FreshBatches, "__iter__", spoiled)
        fit(tmp_path, *SMALL)
    assert exit.value.code == 1
    (printed,) = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert "epoch 2, step 6: nll is nan: the data: inputs of row 5, feature 1, is nan" in printed
    (last,) = tmp_path.glob("*/*/last.ckpt")
    assert str(last) in printed
    train.main(["--ckpt_path", str(last)])
    assert rows(last.parent) == rows(run)


def test_last_is_the_last_epoch_even_if_another_was_the_best(tmp_path):
    rising = ["--model.lr=1.0", "--model.warmup_steps=0", "--trainer.max_epochs=3"]
    folder = fit(tmp_path, *SMALL, *rising)
    best, last = (
        torch.load(folder / name, weights_only=True)["epoch"]
        for name in ("best.ckpt", "last.ckpt")
    )
    scores = [float(row["val/nll"]) for row in rows(folder)]
    assert best == scores.index(min(scores)) < 2 and last == 2


@pytest.mark.filterwarnings("ignore:.*could not find the monitored key")
@pytest.mark.parametrize(
    "limit", ["--trainer.limit_val_batches=0", "--trainer.max_steps=2", "--trainer.max_epochs=0"]
)
def test_a_run_without_validation_still_ends_well(tmp_path, limit):
    folder = fit(tmp_path, *SMALL, limit)
    summary = json.loads((folder / "summary.json").read_text())
    assert Path(summary["checkpoint"]).name == "last.ckpt" and (folder / "last.ckpt").exists()


def test_a_truncated_checkpoint_is_refused(copy, capsys):
    data = (copy / "last.ckpt").read_bytes()
    (copy / "last.ckpt").write_bytes(data[: len(data) // 2])
    before = contents(copy)
    for args in (["--ckpt_path"], ["test", "--ckpt_path"], ["sample", "--ckpt_path"]):
        assert "not a readable checkpoint" in refused(capsys, *args, str(copy / "last.ckpt"))
    assert contents(copy) == before


def test_a_checkpoint_of_another_architecture_is_refused(copy, capsys):
    before = contents(copy)
    printed = refused(
        capsys, "--ckpt_path", str(copy / "last.ckpt"), "--model.flow.init_args.layers=3"
    )
    assert "layers=3" in printed and "layers=2" in printed
    assert contents(copy) == before


@pytest.mark.filterwarnings("ignore:.*lr_scheduler.step")
@pytest.mark.parametrize("optimizer", [None, "NGPlus", "ProxProp"])
def test_mixed_precision_clips_gradients(tmp_path, optimizer):
    options = ["--trainer.precision=bf16-mixed", "--trainer.gradient_clip_val=1.0"]
    options += [f"--model.optimizer={optimizer}"] if optimizer else []
    folder = fit(tmp_path, *SMALL, *options, "--trainer.max_epochs=1")
    assert json.loads((folder / "summary.json").read_text())["test/kl"] > 0
