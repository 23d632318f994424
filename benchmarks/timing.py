"""Times that can be compared: candidates take turns within one run."""

import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

__all__ = ["device_name", "interleaved", "write_json"]

RESULTS = Path(__file__).parent / "results"


def interleaved(
    candidates: dict[str, Callable[[], object]], *, seconds: float = 1.0, device: str = "cpu"
) -> dict[str, float]:
    """Median milliseconds of each candidate; they take turns, so that a drift hits all alike.

    Args:
        candidates: Name to what is timed.
        seconds: Time to spend on every candidate, at least three turns each.
        device: Torch device whose work must be waited for.
    """
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for function in candidates.values():
        function()
    deadline = time.perf_counter() + seconds * len(candidates)
    while time.perf_counter() < deadline or min(map(len, times.values())) < 3:
        for name, function in candidates.items():
            wait()
            start = time.perf_counter()
            function()
            wait()
            times[name].append(1e3 * (time.perf_counter() - start))
    return {name: statistics.median(values) for name, values in times.items()}


def device_name(device: str) -> str:
    """A name for file names and tables."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    return f"{platform.machine()} CPU, {torch.get_num_threads()} threads"


def write_json(name: str, rows: list[dict], *, device: str) -> Path:
    """Write rows with the device and versions they were measured on; returns the file."""
    label = device_name(device)
    slug = "".join(c if c.isalnum() else "-" for c in label.lower()).replace("--", "-")
    path = RESULTS / f"{name}-{slug}.json"
    path.parent.mkdir(exist_ok=True)
    content = {"device": label, "torch": torch.__version__, "rows": rows}
    path.write_text(json.dumps(content, indent=1) + "\n")
    return path
