"""Rotations with one set of angles per sample: ours against a loop and against moving bytes.

    python -m benchmarks.per_sample --threads 2

``rotate`` of 4,096 samples by float32 angles of their own, forward, and forward with the gradients
of samples and angles. Beside it stand, in the same run: the time to copy angles and samples once
into memory that is already there, which is about what one pass of a perfect kernel has to move,
and a plain loop over the rounds with autograd. Where the loop would keep more than ``--memory``
GiB for its backward, everything is measured once more at fewer samples, with the loop. "saved" is
what autograd keeps between forward and backward beyond angles and samples.
"""

import argparse
import math
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.loop import SAVED_PER_ROUND, plain_loop
from benchmarks.report import show_samples
from benchmarks.timing import device_name, interleaved, progress, write_json
from flows import givens

SAMPLES = 4096
SIZES = [16, 64, 256]
SCHEDULES = ("butterfly", "round_robin")
COPY, LOOP = "copy of the bytes", "loop over rounds"
NOT_TIMED = ("reference",)  # the definition is no engine

Rotate = Callable[[Tensor, Tensor], Tensor]


def measure(
    sizes: list[int],
    *,
    device: str = "cpu",
    samples: int = SAMPLES,
    schedules: tuple[str, ...] = SCHEDULES,
    seconds: float = 0.5,
    limit: float = 30.0,
    memory: float = 2.0,
    budget: float = 900.0,
) -> list[dict]:
    """Rows of all engines, the loop and the copy at all sizes.

    Args:
        sizes: Dimensions n.
        device: "cpu" or "cuda".
        samples: Rows of x, each with angles of its own.
        schedules: Names of constructors in ``flows.givens``.
        seconds: For every method and way of timing; three turns at least.
        limit: Seconds; a method whose call takes longer is left out.
        memory: GiB that the loop may keep for its backward.
        budget: Seconds after which no further size is started.
    """
    deadline = time.perf_counter() + budget
    rows = []
    for n in sorted(sizes):
        for name in schedules:
            schedule = getattr(givens, name)(n)
            kept = 4 * SAVED_PER_ROUND * n * len(schedule) + 16 * schedule.num_angles
            fit = min(samples, 2 ** int(math.log2(max(1, memory * 2**30 / kept))))
            for count in sorted({samples, fit}, reverse=True):
                label = {"n": n, "schedule": repr(schedule), "samples": count}
                if time.perf_counter() > deadline:
                    skipped = {"all": "the time for the whole run was over"}
                    rows.append(label | {"method": COPY, "skipped": skipped})
                    continue
                progress(f"{schedule}, {count} samples, {device_name(device)}")
                methods = {LOOP: plain_loop(schedule, device)} if count == fit else {}
                methods = _engines(schedule) | methods
                found = _compare(methods, schedule, count, device, seconds, limit)
                rows += [label | row for row in found]
    progress("")
    return rows


def _engines(schedule: givens.Schedule) -> dict[str, Rotate]:
    return {
        impl: lambda x, angles, impl=impl: givens.rotate(x, angles, schedule, impl=impl)
        for impl in givens.IMPLS
        if impl not in NOT_TIMED
    }


def _compare(
    methods: dict[str, Rotate],
    schedule: givens.Schedule,
    samples: int,
    device: str,
    seconds: float,
    limit: float,
) -> list[dict]:
    torch.manual_seed(0)
    x = torch.randn(samples, schedule.dim, device=device, requires_grad=True)
    angles = torch.randn(samples, schedule.num_angles, device=device, requires_grad=True)
    cotangent = torch.randn_like(x)
    rows = {name: {"method": name, "skipped": {}} for name in (COPY, *methods)}
    rows[COPY]["bytes"] = 4 * (x.numel() + angles.numel())
    for mode in ("forward", "forward_backward"):
        backward = mode == "forward_backward"
        tasks = {name: _task(f, x, angles, cotangent, backward) for name, f in methods.items()}
        tasks = {COPY: _copy(x, angles)} | tasks
        times = interleaved(tasks, seconds=seconds, device=device, limit=limit)
        numbers = {name: ms for name, ms in times.items() if isinstance(ms, float)}
        for name, result in times.items():
            if name not in numbers:
                rows[name]["skipped"][mode] = result
                continue
            rows[name][f"{mode}_ms"] = result
            for other, key in ((COPY, "copy"), (LOOP, "loop")):
                if other in numbers and name != COPY:
                    rows[name][f"{mode}_over_{key}"] = result / numbers[other]
        del tasks  # and the copy's buffer
    for name, function in methods.items():
        if "forward_ms" in rows[name]:
            rows[name]["saved_mib"] = saved_mib(function, x, angles)
    return list(rows.values())


def _copy(x: Tensor, angles: Tensor) -> Callable[[], object]:
    targets = torch.empty_like(x), torch.empty_like(angles)
    return torch.no_grad()(
        lambda: [to.copy_(a) for to, a in zip(targets, (x, angles), strict=True)]
    )


def _task(
    function: Rotate, x: Tensor, angles: Tensor, cotangent: Tensor, backward: bool
) -> Callable[[], object]:
    if backward:
        return lambda: torch.autograd.grad(function(x, angles), [x, angles], cotangent)
    return torch.no_grad()(lambda: function(x, angles))


def saved_mib(function: Rotate, x: Tensor, angles: Tensor) -> float:
    """What is kept for the backward pass beyond x and angles, each piece of memory once."""
    given = {tensor.untyped_storage().data_ptr() for tensor in (x, angles)}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in given:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = function(x, angles)
    del y
    return sum(kept.values()) / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES)
    parser.add_argument("--samples", type=int, default=SAMPLES)
    parser.add_argument("--schedules", nargs="+", default=SCHEDULES, help="such as crossing")
    parser.add_argument("--seconds", type=float, default=0.5, help="per method and size")
    parser.add_argument("--limit", type=float, default=30.0, help="seconds of one call, at most")
    parser.add_argument("--memory", type=float, default=2.0, help="GiB that the loop may keep")
    parser.add_argument("--budget", type=float, default=900.0, help="seconds, all in all")
    parser.add_argument("--threads", type=int, help="torch.set_num_threads")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, help="JSON file instead of benchmarks/results/...")
    given = parser.parse_args()
    if given.threads:
        torch.set_num_threads(given.threads)
    rows = measure(
        given.sizes,
        device=given.device,
        samples=given.samples,
        schedules=tuple(given.schedules),
        seconds=given.seconds,
        limit=given.limit,
        memory=given.memory,
        budget=given.budget,
    )
    file = write_json("per_sample", rows, device=given.device, path=given.output)
    show_samples(rows, device_name(given.device))
    print(file)


if __name__ == "__main__":
    main()
