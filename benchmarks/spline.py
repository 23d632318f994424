"""Rational-quadratic splines: ours against nflows and zuko, forward, with gradients, inverse.

    python -m benchmarks.spline --threads 1

float32, linear tails, and all gradients: of the inputs and of the parameters. Every time stands
beside ours by whatever is chosen for it, which on the CPU is compiled code where numba is
installed, and "plain" tensor operations elsewhere. The methods are made in spline_methods.py.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.report import show_splines
from benchmarks.spline_methods import KINDS, OURS, Method, methods
from benchmarks.timing import FAILURES, device_name, interleaved, progress, write_json

MODES = ("forward", "forward_backward", "inverse")
VECTORS = [(256, 1), (512, 2), (256, 8), (1024, 32)]
IMAGES = (128, 64, 7, 7)
CASES = [
    *(("own", shape, bins) for bins in (8, 16) for shape in (*VECTORS, IMAGES)),
    *(("shared", shape, bins) for bins in (8, 16) for shape in VECTORS[1:]),
    *(("coupling", shape, 8) for shape in VECTORS[1:]),
]


def measure(
    cases: list[tuple[str, tuple[int, ...], int]] = CASES,
    *,
    device: str = "cpu",
    seconds: float = 0.2,
    budget: float = 170.0,
) -> list[dict]:
    """One row per case and method.

    Args:
        cases: Kind, shape of the inputs (batch, features, ...) and bins.
        device: "cpu" or "cuda".
        seconds: For every method and mode; three turns at least.
        budget: Seconds after which no further case is started.
    """
    deadline = time.perf_counter() + budget
    rows = []
    for kind, shape, bins in cases:
        progress(f"{KINDS[kind]}, {shape}, {bins} bins, {device_name(device)}")
        torch.manual_seed(0)
        label = {"kind": KINDS[kind], "shape": list(shape), "bins": bins}
        found: dict[str, dict] = {}
        made: dict[str, Method] = {}
        for name, make in methods(kind, shape, bins, device).items():
            found[name] = label | {"method": name, "skipped": {}}
            try:
                if time.perf_counter() > deadline:
                    raise RuntimeError("the time for the whole run was over")
                made[name] = make()
            except FAILURES as error:
                found[name]["skipped"] = dict.fromkeys(MODES, str(error))
        for mode in MODES:
            tasks = {name: _task(mode, method, shape, device) for name, method in made.items()}
            times = interleaved(tasks, seconds=seconds, device=device)
            for name, result in times.items():
                if isinstance(result, str):
                    found[name]["skipped"][mode] = result
                    continue
                found[name][f"{mode}_ms"] = result
                found[name][f"{mode}_over_ours"] = result / times[OURS]
        rows += found.values()
    progress("")
    return rows


def _task(mode: str, method: Method, shape: tuple[int, ...], device: str) -> Callable[[], object]:
    x, grad = 2 * torch.randn(2, *shape, device=device)
    if mode != "forward_backward":
        function = method.inverse if mode == "inverse" else method.forward
        return torch.no_grad()(lambda: function(x))
    inputs = [x.requires_grad_(), *method.parameters]

    def both() -> object:
        y, log_derivative = method.forward(x)
        weights = grad, torch.ones_like(log_derivative)
        return torch.autograd.grad((y, log_derivative), inputs, weights)

    return both


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--seconds", type=float, default=0.2, help="per method, case and mode")
    parser.add_argument("--budget", type=float, default=170.0, help="seconds, all in all")
    parser.add_argument("--threads", type=int, help="torch.set_num_threads")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, help="JSON file instead of benchmarks/results/...")
    given = parser.parse_args()
    if given.threads:
        torch.set_num_threads(given.threads)
    cases = [case for case in CASES if case[0] in given.kinds]
    rows = measure(cases, device=given.device, seconds=given.seconds, budget=given.budget)
    file = write_json("spline", rows, device=given.device, path=given.output)
    show_splines(rows, device_name(given.device))
    print(file)


if __name__ == "__main__":
    main()
