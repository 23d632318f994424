"""Models that learn the same data for the same time, each in a process of its own.

A process of its own because libraries change global state, and so that neither caches nor
threads of one model serve another. A benchmark module names its models; called with ``--run`` it
trains one of them and prints its row as JSON, and ``race`` starts it so for every row.
"""

import copy
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Lock
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from benchmarks import timing

__all__ = ["CLOCKS", "race", "train"]

CLOCKS = {"wall": time.perf_counter, "processor": time.process_time}

ROOT = Path(__file__).parents[1]
LOGS = ROOT / "runs" / "benchmarks"


def train(
    model: nn.Module,
    batches: Iterator[Tensor],
    *,
    seconds: float,
    lr: float,
    warmup: float = 0.02,
    clip: float = 5.0,
    weight_decay: float = 0.0,
    ema_decay: float = 0.0,
    validate: Callable[[nn.Module], float] | None = None,
    validations: int = 20,
    clock: Callable[[], float] = time.perf_counter,
    make_optimizer: Callable[[nn.Module], Any] | None = None,
    steps: int | None = None,
) -> tuple[nn.Module, dict]:
    """Maximize ``model.log_prob`` of the batches with AdamW for so many seconds, or steps.

    The learning rate rises for a part ``warmup`` of the time, then falls to zero as a cosine.
    One step of a copy comes first and does not count: it compiles and fills caches. Drawing the
    batches counts, and so does validation.

    Args:
        model: With ``log_prob(inputs)``, shape (batch,), nats.
        batches: Endless.
        seconds: Time by the clock.
        lr: Peak of the learning rate.
        warmup: Part of the time in which the learning rate rises.
        clip: Largest norm of the gradient.
        weight_decay: Decoupled weight decay of all matrices.
        ema_decay: Decay per step of an average of the parameters, which is then the result;
            0 for none.
        validate: Loss on held-out data of a model in eval mode; the best of ``validations``
            states, at equal distances in time, is then the result.
        validations: Number of validations.
        clock: ``time.process_time`` counts the processor's time instead of wall time: for one
            thread on a machine that others use as well.
        make_optimizer: What makes another optimizer of a model; each of its groups begins at the
            peak of its learning rate, and ``lr`` and ``weight_decay`` do not count.
        steps: Steps to take, however long they last; None to go by the clock.

    Returns:
        The trained model in eval mode, and what it took: steps, seconds of wall and of
        processor time, curve of the validations (seconds, loss).
    """

    def step(model: nn.Module, optimizer: torch.optim.Optimizer, inputs: Tensor) -> None:
        optimizer.zero_grad()
        loss = -model.log_prob(inputs).mean()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()

    def make_adamw(model: nn.Module) -> torch.optim.Optimizer:
        matrices = [p for p in model.parameters() if p.ndim > 1]
        others = [p for p in model.parameters() if p.ndim <= 1]
        groups = [
            {"params": matrices, "weight_decay": weight_decay},
            {"params": others, "weight_decay": 0.0},
        ]
        return torch.optim.AdamW([g for g in groups if g["params"]], lr=lr, fused=True)

    make_optimizer = make_optimizer or make_adamw
    model.train()
    spare = copy.deepcopy(model)
    step(spare, make_optimizer(spare), next(batches))
    optimizer = make_optimizer(model)
    peaks = [group["lr"] for group in optimizer.param_groups]
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(ema_decay))
    best, best_loss, curve, done = None, math.inf, [], 0
    begin, start, processor = clock(), time.perf_counter(), time.process_time()

    def progress() -> float:
        return done / steps if steps else (clock() - begin) / seconds

    while (part := progress()) < 1:
        rate = min(1.0, part / warmup) * 0.5 * (1 + math.cos(math.pi * part))
        for group, peak in zip(optimizer.param_groups, peaks, strict=True):
            group["lr"] = peak * rate
        step(model, optimizer, next(batches))
        if ema_decay:
            average.update_parameters(model)
        done += 1
        if validate is not None and part * validations >= len(curve) + 1:
            result = _result(model, average, ema_decay)
            with torch.no_grad():
                loss = validate(result)
            curve.append((clock() - begin, loss))
            if loss < best_loss:
                best, best_loss = copy.deepcopy(result), loss
            model.train()
    took = {
        "steps": done,
        "wall_seconds": time.perf_counter() - start,
        "processor_seconds": time.process_time() - processor,
        "parameters": sum(p.numel() for p in model.parameters()),
    }
    result = _result(model, average, ema_decay)
    if validate is not None:
        took["curve"] = curve
        with torch.no_grad():
            if validate(result) > best_loss:
                result = best
    return result, took


def _result(model: nn.Module, average: AveragedModel, ema_decay: float) -> nn.Module:
    return (average.module if ema_decay else model).eval()


def race(
    module: str, rows: list[dict], *, threads: int, at_once: int, resume: bool = False
) -> list[dict]:
    """Run ``python -m benchmarks.<module> --run <row as JSON>`` for every row.

    What is found stands in ``runs/benchmarks/<module>.jsonl`` at once, a line for each row.

    Args:
        module: Name of the benchmark.
        rows: What says which model is to be trained on what.
        threads: Threads of every process.
        at_once: Processes side by side; times are fair where each has its own cores.
        resume: Take rows that stand in that file from there. Otherwise it is put aside as
            ``<module>.old.jsonl`` and begun anew.

    Returns:
        The rows with what their processes found; ``"error"`` where one failed.
    """
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "WANDB_MODE": "offline"}
    log = LOGS / f"{module}.jsonl"
    log.parent.mkdir(parents=True, exist_ok=True)
    if not resume and log.exists():
        log.replace(log.with_suffix(".old.jsonl"))
    log.touch()
    earlier = [json.loads(line) for line in log.read_text().splitlines()]
    lock, done = Lock(), 0

    def run(row: dict) -> dict:
        command = [sys.executable, "-m", f"benchmarks.{module}", "--run", json.dumps(row)]
        finished = subprocess.run(
            command, env=environment, cwd=ROOT, capture_output=True, text=True
        )
        if finished.returncode:
            lines = finished.stderr.strip().splitlines() or [f"exit {finished.returncode}"]
            return {"error": lines[-1]}
        return json.loads(finished.stdout.splitlines()[-1])

    def look_up_or_run(row: dict) -> dict:
        nonlocal done
        known = [old for old in earlier if row.items() <= old.items() and "error" not in old]
        found = known[0] if known else row | run(row)
        with lock:
            done += 1
            values = " ".join(str(value) for value in row.values())
            timing.progress(f"{done} of {len(rows)}: {values}")
            if not known:
                with log.open("a") as file:
                    file.write(json.dumps(found) + "\n")
        return found

    with ThreadPoolExecutor(at_once) as pool:
        found = list(pool.map(look_up_or_run, rows))
    timing.progress("")
    return found
