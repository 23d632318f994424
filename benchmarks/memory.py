"""Memory and time of a training step against depth, for each ``memory`` of a Composite.

    python -m benchmarks.memory --threads 1

The flow is Glow with 8, 16 and 32 steps per level on images of 28 x 28. Memory is what torch
allocates at the peak of a step beyond the parameters and their gradients: on the CPU as torch's
profiler records it. Gradients are compared with those of ``memory="store"``.
"""

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.plot import draw_memory
from benchmarks.report import show_memory
from benchmarks.timing import (
    device_name,
    interleaved,
    peak_allocated,
    progress,
    read_json,
    write_json,
)
from flows.recipes import Glow
from flows.transforms import Composite

MODES = ("store", "checkpoint", "reversible")
SHAPE = (1, 28, 28)
FIGURE = Path(__file__).parents[1] / "docs/memory.png"


def measure(
    depths: list[int], *, batch: int = 32, device: str = "cpu", seconds: float = 5.0
) -> list[dict]:
    """A row for each depth and mode, in this order.

    Args:
        depths: Steps per level, ascending.
        batch: Images per step.
        device: "cpu" or "cuda".
        seconds: To time each; three turns at least.
    """
    images = torch.randint(256, (batch, *SHAPE), device=device) / 256
    rows: list[dict] = []
    for depth in depths:
        progress(f"{depth} steps per level, {device_name(device)}")
        flows = {mode: _flow(mode, depth, images) for mode in MODES}
        steps = {mode: _step(flow, images) for mode, flow in flows.items()}
        for step in steps.values():
            step()  # gradients exist from now on
        gradients = {mode: _gradients(flow) for mode, flow in flows.items()}
        peaks = {mode: peak_allocated(step, device) / 2**20 for mode, step in steps.items()}
        times = interleaved(steps, seconds=seconds, device=device)
        for mode in MODES:
            row = {"steps": depth, "memory": mode, "peak_mib": peaks[mode]}
            row |= {"step_ms": times[mode], "step_over_store": times[mode] / times["store"]}
            row["gradient_error"] = _distance(gradients[mode], gradients["store"])
            errors = [
                module.inversion_error.item()
                for module in flows[mode].modules()
                if isinstance(module, Composite) and module.inversion_error is not None
            ]
            row["inversion_error"] = max(errors, default=None)
            rows.append(row | _growth(row, rows))
    progress("")
    return rows


def _growth(row: dict, earlier: list[dict]) -> dict:
    """Memory for each step per level more than at the depth before, and beside "store"."""
    before = [r for r in earlier if r["memory"] == row["memory"] and r["steps"] < row["steps"]]
    if not before:
        return {}
    last = before[-1]
    growth = (row["peak_mib"] - last["peak_mib"]) / (row["steps"] - last["steps"])
    stored = [r for r in earlier if r["memory"] == "store" and r["steps"] == row["steps"]]
    unit = stored[0]["mib_per_more_step"] if stored else growth
    return {"mib_per_more_step": growth, "growth_over_store": growth / unit}


def _flow(memory: str, steps: int, images: Tensor) -> Glow:
    torch.manual_seed(0)
    flow = Glow(SHAPE, steps=steps, memory=memory).to(images.device)
    with torch.no_grad():
        flow(images)
        for parameter in flow.parameters():
            parameter += 0.02 * torch.randn_like(parameter)  # couplings start as the identity
    return flow


def _step(flow: nn.Module, images: Tensor) -> Callable[[], object]:
    def step() -> None:
        torch.manual_seed(0)  # the same noise between grey levels
        flow.zero_grad(set_to_none=False)
        (-flow(images).mean()).backward()

    return step


def _gradients(flow: nn.Module) -> Tensor:
    return torch.cat([parameter.grad.flatten() for parameter in flow.parameters()])


def _distance(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--depths", type=int, nargs="+", default=[8, 16, 32])
    parser.add_argument("--batch", type=int, default=32, help="images per step")
    parser.add_argument("--seconds", type=float, default=5.0, help="to time each")
    parser.add_argument("--threads", type=int, help="torch.set_num_threads")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, help="JSON file instead of benchmarks/results/...")
    parser.add_argument("--plot", action="store_true", help="draw the JSON instead of measuring")
    parser.add_argument("--figure", type=Path, default=FIGURE, help="where --plot draws")
    given = parser.parse_args()
    if given.threads:
        torch.set_num_threads(given.threads)
    if given.plot:
        draw_memory(read_json("memory", device=given.device), given.figure)
        print(given.figure)
        return
    depths = sorted(given.depths)
    rows = measure(depths, batch=given.batch, device=given.device, seconds=given.seconds)
    file = write_json("memory", rows, device=given.device, path=given.output, batch=given.batch)
    show_memory(rows, device_name(given.device))
    print(file)


if __name__ == "__main__":
    main()
