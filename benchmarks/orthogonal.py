"""Cost of an orthogonal weight: ours against other ways to make one, in dense products.

    python -m benchmarks.orthogonal --threads 2      # measure, print tables, write JSON
    python -m benchmarks.orthogonal --threads 2 --plot    # draw docs/orthogonal.png from the JSON

At each size n, float32:

forward            the matrix from its parameters, over one dense n x n product
forward, backward  the same with its gradient, over three such products
step               the weight from its parameters, its product with a batch of 256, the gradients
                   of parameters and batch, over the same step with a plain dense weight

Householder reflections of nflows and the loop over rounds turn the batch itself in a step, as
they do in use; the others make the matrix. Memory is the peak of a step beyond parameters and
batch; errors are max |U U^T - I| in float32 and float64, and the largest error of the gradient of
a random linear function of U in float32, over its largest entry in float64.
"""

import argparse
import copy
import importlib.util
import json
import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.plot import draw
from benchmarks.report import show
from benchmarks.timing import (
    FAILURES,
    device_name,
    interleaved,
    peak_mib,
    progress,
    read_json,
    write_json,
)
from benchmarks.weights import Weight, dense, double_by_default, weights
from flows import givens

BATCH = 256
SIZES = [2, 12, 48, 64, 192, 256, 512, 768, 1024, 2048]
# Up to this size a compiled engine matters, so we also measure what "auto" does without it.
COMPILED_TO = 48
OVERHEAD = 0.05  # seconds
OVER = "the time for the whole run was over"
FIGURE = Path(__file__).parents[1] / "docs" / "orthogonal.png"
PRODUCT, PLAIN = "dense product", "plain dense weight"
MODES = {"forward": 1, "forward_backward": 3, "step": 1}


class Run:
    """Measures size after size and remembers what became too slow."""

    def __init__(self, *, device: str, seconds: float, limit: float, budget: float, only: str):
        self.device, self.seconds, self.limit, self.only = device, seconds, limit, only
        self.deadline = time.perf_counter() + budget
        self.last: dict[tuple[str, str], tuple[int, float]] = {}  # n and seconds of a call

    def size(self, n: int) -> list[dict]:
        """One row per method; what could not be measured stands in its ``skipped``."""
        torch.manual_seed(0)
        rows: dict[str, dict] = {}
        exact: dict[str, Weight] = {}
        for name, make in [(PLAIN, lambda: dense(n, self.device)), *weights(n, self.device)]:
            if self.only not in name and name != PLAIN:
                continue
            skipped = {mode: reason for mode in MODES if (reason := self._too_slow(name, mode, n))}
            rows[name] = {"n": n, "method": name, "skipped": skipped}
            if len(skipped) == len(MODES):
                continue
            try:
                with double_by_default():
                    exact[name] = make()
            except FAILURES as error:
                rows[name]["skipped"] = dict.fromkeys(MODES, str(error))
        made = {name: copy.deepcopy(weight).float() for name, weight in exact.items()}
        for mode, products in MODES.items():
            progress(f"n = {n}: {mode}, {len(made)} methods, {device_name(self.device)}")
            times = self._times(mode, n, made, rows)
            floor = times.pop(PLAIN if mode == "step" else PRODUCT, None)
            for name, milliseconds in times.items():
                rows[name][f"{mode}_ms"] = milliseconds
                if floor is not None:
                    rows[name][f"{mode}_ratio"] = milliseconds / (products * floor)
            if floor is not None:
                rows[PLAIN]["step_ms" if mode == "step" else "product_ms"] = floor
        progress(f"n = {n}: memory and errors")
        for name, weight in made.items():
            if "step_ms" in rows[name]:
                step = _step(weight, n, self.device)
                rows[name]["step_peak_mib"] = peak_mib(step, self.device)
            if name != PLAIN and "forward_backward_ms" in rows[name]:
                self._errors(weight, exact[name], rows[name])
        return list(rows.values())

    def _times(self, mode: str, n: int, made: dict[str, Weight], rows: dict) -> dict[str, float]:
        candidates: dict[str, Callable[[], object]] = {}
        if mode != "step":
            a, b = torch.randn(2, n, n, device=self.device)
            candidates[PRODUCT] = lambda: a @ b
        for name, weight in made.items():
            if self._too_slow(name, mode, n) == OVER:
                rows[name]["skipped"][mode] = OVER
            elif mode not in rows[name]["skipped"] and (mode == "step" or name != PLAIN):
                candidates[name] = _task(mode, weight, n, self.device)
        results = interleaved(
            candidates, seconds=self.seconds, device=self.device, limit=self.limit
        )
        for name, result in results.items():
            if isinstance(result, float):
                self.last[name, mode] = (n, result / 1e3)
            elif name in rows:
                rows[name]["skipped"][mode] = result
                if "limit" in result:
                    self.last[name, mode] = (n, math.inf)
        return {name: result for name, result in results.items() if isinstance(result, float)}

    def _too_slow(self, name: str, mode: str, n: int) -> str | None:
        """Why not even one call is made."""
        if name == PLAIN:
            return None
        if time.perf_counter() > self.deadline:
            return OVER
        before, once = self.last.get((name, mode), (n, 0.0))
        # Once a call does more than start kernels, it costs at least n^2.
        expected = once * (n / before) ** 2 if once > OVERHEAD else once
        if expected <= self.limit or n == before:
            return None
        if once == math.inf:
            return f"over the limit of {self.limit:g} s at n = {before}"
        return f"about {expected:.1f} s a call expected, over the limit of {self.limit:g} s"

    def _errors(self, weight: Weight, exact: Weight, row: dict) -> None:
        try:
            row |= errors(weight, exact)
        except FAILURES as error:
            row["skipped"]["errors"] = str(error)


def _task(mode: str, weight: Weight, n: int, device: str) -> Callable[[], object]:
    if mode == "step":
        return _step(weight, n, device)
    if mode == "forward_backward":
        cotangent = torch.randn(n, n, device=device)
        return lambda: torch.autograd.grad(weight(), list(weight.parameters()), cotangent)

    @torch.no_grad()
    def forward() -> Tensor:
        return weight()

    return forward


def _step(weight: Weight, n: int, device: str) -> Callable[[], object]:
    x = torch.randn(BATCH, n, device=device, requires_grad=True)
    cotangent = torch.randn(BATCH, n, device=device)
    inputs = [x, *weight.parameters()]
    return lambda: torch.autograd.grad(weight.times(x), inputs, cotangent)


def errors(weight: Weight, exact: Weight) -> dict[str, float]:
    """Distance from orthogonality in both precisions, and of the gradient from float64.

    ``weight`` is ``exact`` rounded to float32.
    """
    gradients, distances = [], []
    for one in (weight, exact):
        u = one()
        torch.manual_seed(0)
        cotangent = torch.randn(u.shape, dtype=torch.float64).to(u.device, u.dtype)
        gradients.append(torch.autograd.grad(u, list(one.parameters()), cotangent))
        wide = u.detach().double()
        identity = torch.eye(len(u), dtype=wide.dtype, device=u.device)
        distances.append((wide @ wide.mT - identity).abs().max().item())
    error = max((f - e).abs().max() for f, e in zip(*gradients, strict=True))
    scale = max(e.abs().max() for e in gradients[1])
    return {
        "orthogonality_float32": distances[0],
        "orthogonality_float64": distances[1],
        "gradient_error": (error / scale).item(),
    }


def measure(
    sizes: list[int],
    *,
    device: str = "cpu",
    seconds: float = 0.15,
    limit: float = 1.0,
    budget: float = 440.0,
    only: str = "",
) -> list[dict]:
    """Rows of all methods whose name contains ``only`` at all sizes.

    Args:
        sizes: Dimensions n.
        device: "cpu" or "cuda".
        seconds: For every method, size and way of timing; three turns at least.
        limit: Seconds; a method whose call takes longer is left out there and above.
        budget: Seconds after which nothing more is started.
        only: Part of the names of the methods to measure.
    """
    run = Run(device=device, seconds=seconds, limit=limit, budget=budget, only=only)
    rows = [row for n in sorted(sizes) for row in run.size(n)]
    progress("")
    return rows


def without_compiled(sizes: list[int], *, seconds: float) -> list[dict]:
    """What "auto" does where numba is not installed, measured in a process without it."""
    code = (
        "import sys; sys.modules['numba'] = None\n"
        "from benchmarks import orthogonal; orthogonal.main()"
    )
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "rows.json"
        options = ["--only", "auto", "--output", file, "--quiet", "--device", "cpu"]
        options += ["--seconds", seconds, "--threads", torch.get_num_threads()]
        options += ["--sizes", *sizes]
        root = Path(__file__).parents[1]
        subprocess.run([sys.executable, "-c", code, *map(str, options)], check=True, cwd=root)
        rows = json.loads(file.read_text())["rows"]
    rows = [row for row in rows if row["method"] != PLAIN]
    return [row | {"method": f"{row['method']} without numba"} for row in rows]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES)
    parser.add_argument("--seconds", type=float, default=0.15, help="per method, size and mode")
    parser.add_argument("--limit", type=float, default=1.0, help="seconds of one call, at most")
    parser.add_argument("--budget", type=float, default=440.0, help="seconds, all in all")
    parser.add_argument("--threads", type=int, help="torch.set_num_threads")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--only", default="", help="part of the names of the methods to measure")
    parser.add_argument("--quiet", action="store_true", help="no tables")
    parser.add_argument("--output", type=Path, help="JSON file instead of benchmarks/results/...")
    parser.add_argument("--plot", action="store_true", help="draw the JSON instead of measuring")
    parser.add_argument("--figure", type=Path, default=FIGURE, help="where --plot draws")
    given = parser.parse_args()
    if given.threads:
        torch.set_num_threads(given.threads)
    if given.plot:
        draw(read_json("orthogonal", device=given.device), given.figure)
        print(given.figure)
        return
    rows = measure(
        given.sizes,
        device=given.device,
        seconds=given.seconds,
        limit=given.limit,
        budget=given.budget,
        only=given.only,
    )
    small = [n for n in given.sizes if n <= COMPILED_TO]
    compiled = "compiled" in givens.IMPLS and importlib.util.find_spec("numba") is not None
    if small and compiled and given.device == "cpu" and not given.only:
        rows += without_compiled(small, seconds=given.seconds)
    file = write_json("orthogonal", rows, device=given.device, path=given.output, batch=BATCH)
    if not given.quiet:
        show(rows, device_name(given.device))
        print(file)


if __name__ == "__main__":
    main()
