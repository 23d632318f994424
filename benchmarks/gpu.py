"""All that needs a GPU in one command: is every engine right there, and how fast is it?

    python -m benchmarks.gpu

Four parts, each within its share of ``--budget`` seconds: our own checks of every engine against
the definition in float64 (values, gradients, orthogonality, no TF32); the timings of
``benchmarks.orthogonal`` and ``benchmarks.per_sample``; the files of ``tests/givens`` that mention
CUDA or Triton, where pytest is installed. The JSON is written anew after each part.

Needs torch, numpy, rich and jaxtyping. Without nflows ``import flows`` fails, its numerical core
does not: then that alone is imported, and the peers that are missing are named. Where no GPU is
found the exit status is 2, where a check fails it is 1.
"""

import argparse
import importlib.util
import os
import subprocess
import sys
import time
import types
from collections.abc import Callable, Iterable
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
SHARES = {"checks": 0.25, "orthogonal": 0.35, "per_sample": 0.2, "tests": 0.2}
SIZES = [2, 12, 48, 64, 192, 256, 512, 1024, 2048, 4096]


def import_core() -> None:
    """Let ``flows.givens`` be imported where nflows, which ``flows`` needs, is missing."""
    if importlib.util.find_spec("nflows") is None and "flows" not in sys.modules:
        package = types.ModuleType("flows")
        package.__path__ = [str(ROOT / "flows")]
        sys.modules["flows"] = package
        print("nflows is not installed: its layer is left out (pip install nflows)")


def run_tests(seconds: float) -> dict:
    """The tests that mention CUDA or Triton, run here on the GPU; how they ended."""
    files = [
        str(file.relative_to(ROOT))
        for file in sorted((ROOT / "tests" / "givens").glob("test_*.py"))
        if any(word in file.read_text().lower() for word in ("cuda", "triton"))
    ]
    missing = [p for p in ("pytest", "hypothesis", "nflows") if not importlib.util.find_spec(p)]
    if missing or not files:
        return {"left out": f"not installed: {', '.join(missing)}" if missing else "no such test"}
    # The options in pyproject.toml ask for plugins that may be missing here.
    command = [sys.executable, "-m", "pytest", "-q", "--tb=short", "--import-mode=importlib"]
    command += ["-o", "addopts=", "-o", "filterwarnings=default", *files]
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    try:
        done = subprocess.run(
            command, cwd=ROOT, env=environment, timeout=seconds, capture_output=True, text=True
        )
    except subprocess.TimeoutExpired:
        return {"files": files, "left out": f"not done after {seconds:.0f} s"}
    return {"files": files, "status": done.returncode, "end": done.stdout.splitlines()[-15:]}


def measure(
    device: str,
    *,
    parts: Iterable[str] = SHARES,
    budget: float = 400.0,
    sizes: list[int] = SIZES,
    path: Path | None = None,
) -> dict[str, object]:
    """Results of the parts, which are also written to a JSON file after each part."""
    import_core()
    from benchmarks import checks, orthogonal, per_sample, timing

    actions: dict[str, Callable[[float], object]] = {
        "checks": lambda seconds: checks.run(device, budget=seconds),
        "orthogonal": lambda seconds: orthogonal.measure(
            sizes, device=device, seconds=0.1, limit=1.0, budget=seconds
        ),
        "per_sample": lambda seconds: per_sample.measure(
            [n for n in per_sample.SIZES if n <= max(sizes)],
            device=device,
            seconds=0.3,
            limit=5.0,
            memory=16.0,
            budget=seconds,
        ),
        "tests": run_tests,
    }
    results: dict[str, object] = {"gpu": _describe(device), "seconds": {}}
    for part in parts:
        start = time.perf_counter()
        results[part] = actions[part](budget * SHARES[part])
        results["seconds"][part] = round(time.perf_counter() - start, 1)
        results["file"] = str(timing.write_json("gpu", [], device=device, path=path, **results))
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--budget", type=float, default=400.0, help="seconds, all in all")
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES, help="of the weights")
    parser.add_argument("--parts", nargs="+", choices=SHARES, default=list(SHARES))
    parser.add_argument("--output", type=Path, help="JSON file instead of benchmarks/results/...")
    given = parser.parse_args()
    if not torch.cuda.is_available():
        print("benchmarks.gpu: torch finds no GPU on this machine, nothing was measured.")
        sys.exit(2)
    for package in ("numpy", "rich", "jaxtyping"):
        if importlib.util.find_spec(package) is None:
            sys.exit(f"benchmarks.gpu needs {package}: pip install {package}")
    results = measure(
        "cuda", parts=given.parts, budget=given.budget, sizes=given.sizes, path=given.output
    )
    sys.exit(show(results))


def show(results: dict[str, object]) -> int:
    """Print everything; returns the exit status."""
    from benchmarks import checks, report

    name, status = results["gpu"]["name"], 0
    if "orthogonal" in results:
        report.show(results["orthogonal"], name)
    if "per_sample" in results:
        report.show_samples(results["per_sample"], name)
    if "checks" in results:
        status = int(checks.show(results["checks"]) > 0)
    if "tests" in results:
        print("tests:", *results["tests"].pop("end", []), results["tests"], sep="\n  ")
        status = status or int(results["tests"].get("status", 0) > 0)
    print("seconds:", results["seconds"])
    print(results["file"])
    return status


def _describe(device: str) -> dict:
    if device == "cpu":
        return {"name": "CPU"}
    properties = torch.cuda.get_device_properties(0)
    return {
        "name": properties.name,
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "multiprocessors": properties.multi_processor_count,
        "capability": list(torch.cuda.get_device_capability()),
        "cuda": torch.version.cuda,
        "python": sys.version.split()[0],
    }


if __name__ == "__main__":
    main()
