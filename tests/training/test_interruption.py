"""Runs that are asked to stop, killed, or out of disk: nothing is lost."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import train
from benchmarks.stress.crashes import differences
from flows.training.callbacks import BestAndLast
from flows.training.files import AtomicCheckpointIO, write_atomically

pytestmark = pytest.mark.usefixtures("undrawn")

ROOT = Path(train.__file__).parent
# Epochs of which a signal meets the middle, with noise that must come back.
LONG = [
    "--pictures_every_n_epochs=0",
    "--trainer.max_epochs=2",
    "--trainer.enable_progress_bar=false",
    "--model.flow.init_args.layers=1",
    "--model.ema_decay=0.99",
    "--data.init_args.batch_size=64",
    "--data.init_args.batches_per_epoch=600",
    "--data.init_args.val_size=200",
    "--data.init_args.test_size=200",
]


def start(*options: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, str(ROOT / "train.py"), *options],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # Programs in the background are started deaf to it.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )


def wait_for(pattern: str, root: Path) -> None:
    deadline = time.monotonic() + 120
    while not list(root.glob(pattern)) and time.monotonic() < deadline:
        time.sleep(0.01)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("whole")
    train.main([*LONG, f"--trainer.default_root_dir={root}"])
    (folder,) = root.glob("*/*")
    return folder


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_within_an_epoch_and_nothing_is_lost(whole, tmp_path, number, status):
    process = start(*LONG, f"--trainer.default_root_dir={tmp_path}")
    wait_for("*/*/metrics.csv", tmp_path)  # the first epoch is over
    time.sleep(0.2)
    process.send_signal(number)
    printed, errors = process.communicate(timeout=120)
    assert process.returncode == status, errors
    (folder,) = tmp_path.glob("*/*")
    last = folder / "last.ckpt"
    assert printed == (
        f"interrupted by {number.name}; resume with: python train.py --ckpt_path {last}\n"
    )
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["interrupted"] and summary["stopped_by"] == number.name
    assert summary["checkpoint"] == str(last) and 600 < summary["steps"] < 1200
    assert torch.load(last, weights_only=True)["global_step"] == summary["steps"]
    train.main(["--ckpt_path", str(folder)])
    assert not differences(whole, folder)
    assert not json.loads((folder / "summary.json").read_text())["interrupted"]


def test_the_same_signal_again_ends_a_run_at_once(tmp_path):
    # A validation that takes long: the first signal waits for it.
    process = start(
        *LONG[:-2],
        "--data.init_args.val_size=20000000",
        "--data.init_args.batches_per_epoch=2",
        f"--trainer.default_root_dir={tmp_path}",
    )
    wait_for("*/*/config.yaml", tmp_path)
    time.sleep(1)
    deadline = time.monotonic() + 60
    while process.poll() is None and time.monotonic() < deadline:
        process.terminate()
        time.sleep(0.5)
    process.communicate(timeout=1)
    assert process.returncode in (-signal.SIGTERM, 143)


def test_a_run_killed_before_its_first_checkpoint_begins_anew_in_its_folder(whole, tmp_path):
    folder = tmp_path / "two_moons" / "killed"
    folder.mkdir(parents=True)
    shutil.copy(whole / "config.yaml", folder)
    train.main(["--ckpt_path", str(folder)])
    assert not differences(whole, folder)
    assert [path.name for path in folder.parent.iterdir()] == ["killed"]


def test_what_is_being_written_replaces_nothing_before_it_is_whole(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(KeyboardInterrupt), write_atomically(path) as file:
        file.write("new")
        raise KeyboardInterrupt
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
    with write_atomically(path, "wb") as file:
        file.write(b"new")
    assert path.read_bytes() == b"new" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("room", [0, 1000, 100_000])
def test_a_full_disk_leaves_the_checkpoint_before(tmp_path, room):
    path = tmp_path / "last.ckpt"
    writer = AtomicCheckpointIO()
    old = {"state_dict": {"x": torch.arange(1000)}}
    writer.save_checkpoint(old, path)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1]))
    try:
        with pytest.raises(OSError, match=r"last.ckpt cannot be written: .*File too large"):
            writer.save_checkpoint({"state_dict": {"x": torch.zeros(1_000_000)}}, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert torch.equal(writer.load_checkpoint(path)["state_dict"]["x"], torch.arange(1000))
    assert list(tmp_path.iterdir()) == [path]


def test_a_kill_while_a_checkpoint_is_written_leaves_the_one_before(tmp_path):
    code = """
import sys, torch
from pathlib import Path
from flows.training.files import AtomicCheckpointIO
writer, path = AtomicCheckpointIO(), Path(sys.argv[1])
for step in range(1_000_000):
    writer.save_checkpoint({"state_dict": {"x": torch.full((2_000_000,), step)}}, path)
"""
    path = tmp_path / "last.ckpt"
    process = subprocess.Popen([sys.executable, "-c", code, str(path)], cwd=ROOT)
    wait_for("last.ckpt", tmp_path)
    wait_for("last.ckpt.*.partial", tmp_path)
    process.kill()
    process.wait()
    values = AtomicCheckpointIO().load_checkpoint(path)["state_dict"]["x"]
    assert len(values) == 2_000_000 and (values == values[0]).all()


def test_a_full_disk_ends_a_run_in_one_line(tmp_path):
    code = (
        "import resource, sys\n"
        "sys.path.insert(0, sys.argv.pop(1))\n"
        "import train\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))\n"
        "train.main(sys.argv[1:])"
    )
    options = [*LONG, f"--trainer.default_root_dir={tmp_path}"]
    process = subprocess.run(
        [sys.executable, "-c", code, str(ROOT), *options], capture_output=True, text=True
    )
    assert process.returncode == 1
    (line,) = [line for line in process.stderr.splitlines() if line.startswith("error")]
    assert "last.ckpt cannot be written" in line or "best.ckpt cannot be written" in line
    assert "before the first checkpoint" in line and "Traceback" not in process.stderr


SHORT = [*LONG[:-3], "--data.init_args.batches_per_epoch=20", *LONG[-2:]]


@pytest.mark.parametrize("step", [3, 5, 20, 27, 40, 49])
@pytest.mark.parametrize(
    "options",
    [
        ["--trainer.max_steps=50", "--trainer.max_epochs=-1"],
        ["--trainer.val_check_interval=5", "--trainer.max_epochs=3"],
        ["--trainer.accumulate_grad_batches=3", "--trainer.max_epochs=3"],
        ["--trainer.check_val_every_n_epoch=2", "--trainer.max_epochs=3"],
    ],
    ids=lambda options: options[0].rpartition(".")[2],
)
def test_a_run_goes_on_from_any_step(short_runs, tmp_path, monkeypatch, capsys, options, step):
    whole = short_runs(options)

    usual = BestAndLast.on_train_batch_end

    def signalled(self, trainer, *arguments) -> None:
        if trainer.fit_loop.epoch_loop.total_batch_idx == step - 1:
            self._signal = signal.SIGTERM
        usual(self, trainer, *arguments)

    with monkeypatch.context() as patch, pytest.raises(SystemExit) as exit:
        patch.setattr(BestAndLast, "on_train_batch_end", signalled)
        train.main([*SHORT, *options, f"--trainer.default_root_dir={tmp_path}"])
    assert exit.value.code == 143
    (folder,) = tmp_path.glob("*/*")
    train.main(["--ckpt_path", str(folder)])
    assert not differences(whole, folder)
    ends = [json.loads((f / "summary.json").read_text()) for f in (whole, folder)]
    for key in ("test/nll", "epochs", "steps", "stopped_by"):
        assert ends[0][key] == ends[1][key], key


@pytest.fixture(scope="module")
def short_runs(tmp_path_factory):
    """Runs that nobody stops, one for each choice of options."""
    runs = {}

    def run(options: list[str]) -> Path:
        key = tuple(options)
        if key not in runs:
            root = tmp_path_factory.mktemp("short")
            train.main([*SHORT, *options, f"--trainer.default_root_dir={root}"])
            (runs[key],) = root.glob("*/*")
        return runs[key]

    return run
