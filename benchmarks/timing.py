"""Times and memory that can be compared: candidates take turns within one run."""

import ctypes
import importlib.metadata
import itertools
import json
import math
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

__all__ = [
    "FAILURES",
    "device_name",
    "interleaved",
    "peak_allocated",
    "peak_mib",
    "progress",
    "read_json",
    "wait_for",
    "write_json",
]

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("torch", "numba", "triton", "geotorch", "nflows", "normflows", "zuko")
_told = 0.0  # when progress last said something to a file
# What a candidate may raise when it does not serve a size, a dtype or a device.
FAILURES = (ImportError, MemoryError, NotImplementedError, RuntimeError, ValueError)


def interleaved(
    candidates: dict[str, Callable[[], object]],
    *,
    seconds: float = 1.0,
    device: str = "cpu",
    limit: float = math.inf,
    turns: int = 3,
) -> dict[str, float | str]:
    """Median milliseconds of each candidate; they take turns, so that a drift hits all alike.

    A turn of a fast candidate is several calls in a row, about two milliseconds of them, after
    as many that do not count. On a GPU the work is waited for once per turn.

    Args:
        candidates: Name to what is timed.
        seconds: Time to spend on every candidate, ``turns`` turns at least.
        device: Torch device whose work must be waited for.
        limit: Seconds; a candidate whose call takes longer is left out.
        turns: Least number of turns.

    Returns:
        Name to milliseconds, or to the reason why there are none.
    """
    wait = wait_for(device)

    def clock(function: Callable[[], object], calls: int) -> float:
        wait()
        start = time.perf_counter()
        for _ in range(calls):
            function()
        wait()
        return (time.perf_counter() - start) / calls

    results: dict[str, float | str] = {}
    calls: dict[str, int] = {}
    for name, function in candidates.items():
        try:
            clock(function, 1)  # compiles, fills caches
            once = clock(function, 1)
        except FAILURES as error:
            results[name] = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
            continue
        if once > limit:
            results[name] = f"one call takes {once:.1f} s, over the limit of {limit:g} s"
            continue
        calls[name] = max(1, min(100, int(2e-3 / once)))
    times: dict[str, list[float]] = {name: [] for name in calls}
    deadline = time.perf_counter() + seconds * len(times)
    while times and (time.perf_counter() < deadline or min(map(len, times.values())) < turns):
        for name, count in calls.items():
            if count > 1:
                clock(candidates[name], count)  # forgets what the one before has left behind
            times[name].append(1e3 * clock(candidates[name], count))
    results |= {name: statistics.median(values) for name, values in times.items()}
    return {name: results[name] for name in candidates}


def wait_for(device: str) -> Callable[[], None]:
    """What returns when the device has done all its work."""
    return torch.cuda.synchronize if device == "cuda" else lambda: None


def peak_mib(function: Callable[[], object], device: str) -> float | None:
    """Memory that a call needs at its peak beyond what is in use before it, in MiB.

    On a GPU that is what torch allocates. On Linux it is the peak of the process's resident
    memory, which the kernel lets us reset: it holds the scratch of compiled code and of BLAS
    as well, and is exact to a few tenths of a MiB. Elsewhere None. Call the function once
    before, so that what it sets up for good does not count.
    """
    if device == "cuda":
        return peak_allocated(function, device) / 2**20
    try:
        ctypes.CDLL(None).malloc_trim(0)  # hand freed memory back: reusing it must show
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        before = _resident_kib("VmRSS")
        function()
        return max(0, _resident_kib("VmHWM") - before) / 1024
    except (AttributeError, OSError, TypeError):
        return None


def peak_allocated(function: Callable[[], object], device: str) -> int:
    """Bytes of tensors at the peak of a call, beyond what there is before it.

    On the CPU as torch's profiler records it: exact, but without the scratch of libraries.
    """
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(profile_memory=True) as profiler:
        function()
    events = profiler.profiler.kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    return max(itertools.accumulate((size for _, size in changes), initial=0))


def _resident_kib(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(key)).split()[1])


def progress(text: str) -> None:
    """One line on the error stream: on a terminal over the last one, else every ten seconds."""
    global _told
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)
    elif text and time.perf_counter() - _told > 10:
        _told = time.perf_counter()
        print(text, file=sys.stderr, flush=True)


def device_name(device: str) -> str:
    """A name for file names and tables."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    return f"{platform.machine()} CPU, {torch.get_num_threads()} threads"


def _path(name: str, device: str) -> Path:
    slug = "".join(c if c.isalnum() else "-" for c in device_name(device).lower())
    return RESULTS / f"{name}-{slug.replace('--', '-')}.json"


def read_json(name: str, *, device: str) -> dict:
    """What ``write_json`` wrote for this device and number of threads."""
    return json.loads(_path(name, device).read_text())


def write_json(
    name: str, rows: list[dict], *, device: str, path: Path | None = None, **more: object
) -> Path:
    """Write rows with the device and versions they were measured on; returns the file."""
    path = path or _path(name, device)
    path.parent.mkdir(parents=True, exist_ok=True)
    command = [f"python -m benchmarks.{name}", *map(shlex.quote, sys.argv[1:])]
    content = {
        "device": device_name(device),
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        "command": " ".join(command),
        "versions": {p: _version(p) for p in PACKAGES},
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
        **more,
        "rows": rows,
    }
    path.write_text(json.dumps(content, indent=1) + "\n")
    return path


def _version(package: str) -> str | None:
    if package == "torch":
        return torch.__version__  # with its CPU or CUDA tag
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if "model name" in line)
    except (OSError, StopIteration):
        return platform.processor()
