"""Runs that are killed, and what they end with."""

import csv
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch
from torch import Tensor

ROOT = Path(__file__).parents[2]
# Noise in the data's layers and in dropout, an average, a schedule: all that must come back.
DIGITS = (
    "--config=configs/images/digits.yaml",
    "--model.flow.init_args.steps=1",
    "--model.flow.init_args.hidden_features=8",
    "--model.ema_decay=0.99",
    "--model.recenter_every_n_epochs=7",
)
RUN = (sys.executable, str(ROOT / "train.py"))
DEADLINE = 600.0


def killed_runs(folder: Path, *, kills: int, stops: int, epochs: int, seed: int = 0) -> dict:
    """Kill a run again and again, and compare its end with that of one left alone.

    Args:
        folder: Where both runs go.
        kills: How often SIGKILL, at any moment from the start of the program on.
        stops: How often SIGTERM, once it trains; this must end in exit status 143.
        epochs: Of the run; enough for it not to end before.
        seed: Of the moments.
    """
    options = [*DIGITS, f"--trainer.max_epochs={epochs}", "--trainer.enable_progress_bar=false"]
    whole, killed = folder / "whole", folder / "killed"
    finished = _start(*options, f"--trainer.default_root_dir={whole}").wait(DEADLINE)
    if finished:
        raise RuntimeError(f"the run that nobody stops ended with status {finished}.")
    chance = random.Random(seed)
    signals = [signal.SIGKILL] * kills + [signal.SIGTERM] * stops
    chance.shuffle(signals)
    done, statuses = 0, []
    for number in signals:
        status = _run_until(number, killed, options, chance)
        statuses.append(status)
        if status == 0:
            break
        done += 1
    if not statuses or statuses[-1]:
        process = _start(*_continued(killed, options))
        if process.wait(DEADLINE):
            raise RuntimeError(f"the last of the runs ended with status {process.returncode}.")
    # A kill may have left a folder that was empty as yet.
    (one,), (other,) = (list(root.glob("*/*/summary.json")) for root in (whole, killed))
    terminated = [s for s, number in zip(statuses, signals, strict=False) if number != 9]
    right_exits = all(status in (143, 0) for status in terminated)
    different = differences(one.parent, other.parent)
    return {
        "what": f"{kills} SIGKILL and {stops} SIGTERM in a run on digits, resumed each time",
        "result": f"{done} interruptions, differs in: {', '.join(different) or 'nothing'}",
        "asked": "bit for bit the run left alone",
        "ok": done == len(signals) and right_exits and not different,
        "interruptions": done,
        "exit_statuses": statuses,
        "different": different,
    }


def _run_until(number: int, root: Path, options: list[str], chance: random.Random) -> int | None:
    """Go on with a run and signal it at a moment that nobody foresees; its exit status."""
    process = _start(*_continued(root, options))
    if number == signal.SIGKILL and chance.random() < 0.25:
        wait = chance.uniform(0, 8)
    else:
        before = _progress(root)
        limit = time.monotonic() + DEADLINE
        while _progress(root) == before and process.poll() is None and time.monotonic() < limit:
            time.sleep(0.005)
        wait = chance.uniform(0, 1)
    try:
        process.wait(wait)
    except subprocess.TimeoutExpired:
        process.send_signal(number)
    return process.wait(DEADLINE)


def _start(*options: str) -> subprocess.Popen:
    command = [*RUN, *options]
    return subprocess.Popen(command, cwd=ROOT, env=environment(), stdout=subprocess.DEVNULL)


def environment() -> dict[str, str]:
    """Of the runs: a thread each, and no network."""
    return os.environ | {"OMP_NUM_THREADS": "1", "WANDB_MODE": "offline"}


def _continued(root: Path, options: list[str]) -> list[str]:
    """The command line that goes on with the run, or begins it."""
    folders = [path.parent for path in root.glob("*/*/config.yaml")]
    if not folders:
        return [*options, f"--trainer.default_root_dir={root}"]
    return ["--ckpt_path", str(folders[0])]


def _progress(root: Path) -> list[int]:
    return [path.stat().st_mtime_ns for path in root.glob("*/*/last.ckpt")]


def differences(one: Path, other: Path) -> list[str]:
    """What the last checkpoints and the tables of metrics of two run folders do not share."""
    found = []
    ends = [torch.load(f / "last.ckpt", weights_only=True) for f in (one, other)]
    for key in ("state_dict", "optimizer_states", "lr_schedulers", "parameter_average", "epoch"):
        if not _same(*(end.get(key) for end in ends)):
            found.append(key)
    bests = [torch.load(f / "best.ckpt", weights_only=True) for f in (one, other)]
    if not _same(bests[0]["state_dict"], bests[1]["state_dict"]):
        found.append("best.ckpt")
    tables = []
    for folder in (one, other):
        with open(folder / "metrics.csv") as file:
            tables.append(list(csv.DictReader(file)))
    return found if tables[0] == tables[1] else [*found, "metrics.csv"]


def _same(a: object, b: object) -> bool:
    """Equal bit for bit, all the way down."""
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(_same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(_same, a, b))
    return a == b
