"""Several processes that train together, and one that does the same alone."""

import csv
import json
import socket
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.stress.crashes import DEADLINE, ROOT, RUN, differences, environment

BATCH = 64
BOUND = 1e-6
# Sizes that two processes cannot share evenly.
SMALL = (
    "--trainer.enable_progress_bar=false",
    "--trainer.precision=64-true",
    "--trainer.accelerator=cpu",
    # At ten times this rate the first steps multiply a difference in rounding by ten each.
    "--model.lr=1e-3",
    "--data.init_args.batches_per_epoch=4",
    "--data.init_args.val_size=1501",
    "--data.init_args.test_size=2303",
)
# Epochs of which a signal meets the middle.
LONG = "--data.init_args.batches_per_epoch=150"


def two_processes(folder: Path, *, epochs: int) -> dict:
    """Lightning's own launcher with two processes, beside one with twice the batch."""
    pair = _train(folder / "pair", epochs, BATCH, "--trainer.devices=2", "--trainer.strategy=ddp")
    return _compared("two processes on one machine, two moons in float64", folder, pair, epochs)


def two_nodes(folder: Path, *, epochs: int) -> dict:
    """torchrun on two addresses of loopback, a process on each."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    root = folder / "nodes"
    options = _options(root, epochs, BATCH, "--trainer.strategy=ddp", "--trainer.num_nodes=2")
    nodes = [
        subprocess.Popen(
            [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=1"]
            + [f"--node_rank={rank}", "--master_addr=127.0.0.1", f"--master_port={port}"]
            + [f"--local_addr=127.0.0.{rank + 1}", RUN[1], *options],
            cwd=ROOT,
            env=environment(),
            stdout=subprocess.DEVNULL,
        )
        for rank in range(2)
    ]
    statuses = [node.wait(DEADLINE) for node in nodes]
    if any(statuses):
        raise RuntimeError(f"torchrun ended with statuses {statuses}.")
    (run,) = root.glob("*/*")
    return _compared("torchrun on two addresses, two moons in float64", folder, run, epochs)


def stopped_processes(folder: Path, *, epochs: int) -> dict:
    """SIGTERM to the first of two processes, and the run that goes on beside one left alone."""
    options = ("--trainer.devices=2", "--trainer.strategy=ddp", LONG)
    root = folder / "stopped"
    process = subprocess.Popen(
        [*RUN, *_options(root, epochs, BATCH, *options)],
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.DEVNULL,
    )
    limit = time.monotonic() + DEADLINE
    while not list(root.glob("*/*/metrics.csv")) and time.monotonic() < limit:
        time.sleep(0.01)
    time.sleep(0.3)  # into the second epoch
    process.terminate()
    status = process.wait(DEADLINE)
    (run,) = root.glob("*/*")
    stopped = json.loads((run / "summary.json").read_text())
    _finish("--ckpt_path", str(run))
    different = differences(run, _train(folder / "left_alone", epochs, BATCH, *options))
    return {
        "what": f"SIGTERM to two processes after {stopped['steps']} steps, resumed",
        "result": f"exit {status}, differs in: {', '.join(different) or 'nothing'}",
        "asked": "143, bit for bit the pair left alone",
        "ok": status == 143 and stopped["interrupted"] and not different,
        "exit_status": status,
        "steps": stopped["steps"],
        "different": different,
    }


def _compared(what: str, folder: Path, run: Path, epochs: int) -> dict:
    alone = folder / "alone"
    whole = next(alone.glob("*/*"), None) or _train(alone, epochs, 2 * BATCH)
    curves = [_metrics(path) for path in (run, whole)]
    summaries = [json.loads((path / "summary.json").read_text()) for path in (run, whole)]
    loss = _largest(curves, ("train/nll",))
    validation = _largest(curves, ("val/nll", "val/kl"))
    test = _largest([[summary] for summary in summaries], ("test/nll", "test/kl", "test/kl_error"))
    differences = f"training {loss:.0e}, validation {validation:.0e}, test {test:.0e}"
    return {
        "what": what,
        "result": differences,
        "asked": f"at most {BOUND:.0e}",
        "ok": max(loss, validation, test) <= BOUND and summaries[0]["processes"] == 2,
        "loss_difference": loss,
        "validation_difference": validation,
        "test_difference": test,
        "epochs": len(curves[0]),
        "processes": summaries[0]["processes"],
        "files": sorted(path.name for path in run.iterdir()),
    }


def _largest(tables: list[list[dict]], names: tuple[str, ...]) -> float:
    """Largest difference between two tables in the named columns."""
    rows = zip(*tables, strict=True)
    return max(abs(float(a[name]) - float(b[name])) for a, b in rows for name in names)


def _metrics(run: Path) -> list[dict]:
    with open(run / "metrics.csv") as file:
        return list(csv.DictReader(file))


def _train(root: Path, epochs: int, batch_size: int, *options: str) -> Path:
    _finish(*_options(root, epochs, batch_size, *options))
    (run,) = root.glob("*/*")
    return run


def _finish(*options: str) -> None:
    subprocess.run(
        [*RUN, *options],
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.DEVNULL,
        check=True,
        timeout=DEADLINE,
    )


def _options(root: Path, epochs: int, batch_size: int, *options: str) -> list[str]:
    return [
        *SMALL,
        f"--trainer.max_epochs={epochs}",
        f"--trainer.default_root_dir={root}",
        f"--data.init_args.batch_size={batch_size}",
        *options,
    ]
