"""Loss against memory of flows whose conditioners keep a random part of their inputs.

    python -m benchmarks.randomized_autodiff --threads 1     # both flows, three seeds; 7 minutes
    python -m benchmarks.randomized_autodiff --flows two_moons --seeds 0
    python -m benchmarks.randomized_autodiff --plot          # docs/randomized_autodiff.png

A flow is trained for the same number of steps as it is; with ``flows.nets.randomize``, one choice
for all rows of a batch or one for each; and as it is on batches so much smaller that as much is
kept. Kept is what saved-tensor hooks see in the forward pass, parameters left out, each piece of
memory once; the peak is that of a step beyond parameters and gradients. Chains that repeat
their layers stand beside, whose gradients, and so whose losses, are those of the flow as it is.
The learning rates served the flow as it is best, of 0.001, 0.002, 0.005 and 0.01 with seed 0.

Before that, memory as the paper on randomized automatic differentiation counts it (Oktay et al.
2021, arXiv 2007.10412, Table 1), beside the paper's numbers and what our layers keep.
"""

import argparse
import copy
import itertools
import math
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.plot import draw_randomized
from benchmarks.race import train
from benchmarks.report import show_paper, show_randomized
from benchmarks.timing import (
    device_name,
    interleaved,
    peak_allocated,
    progress,
    read_json,
    write_json,
)
from benchmarks.toy_density import kl_divergence
from datasets.densities import DENSITIES
from datasets.images import Digits
from flows.nets import randomize
from flows.objectives import bits_per_dim
from flows.recipes import Glow, RotationSplineFlow

__all__ = ["FLOWS", "NETWORKS", "PAPER", "accounted_mb", "measure", "paper_rows", "saved_bytes"]

FIGURE = Path(__file__).parents[1] / "docs/randomized_autodiff.png"
KEEP = (0.5, 0.3, 0.1, 0.05)
METHODS = {"shared": {"per_sample": False}, "per sample": {"per_sample": True}}

# --- memory as the paper counts it -------------------------------------------------------------

# MB at the peak with weights, batches of 150, by the part that is kept.
PAPER = {
    "ConvNet": {1.0: 23.08, 0.8: 19.19, 0.5: 12.37, 0.3: 7.82, 0.1: 3.28, 0.05: 2.14},
    "fully connected": {1.0: 2.69, 0.8: 2.51, 0.5: 2.21, 0.3: 2.00, 0.1: 1.80, 0.05: 1.75},
}
PAPER_BATCH = 150


def _convnet() -> nn.Sequential:
    def block(channels: int, pool: bool) -> list[nn.Module]:
        layers = [nn.Conv2d(channels, 32, 5, padding=2)]
        return [*layers, *([nn.MaxPool2d(2)] if pool else []), nn.ReLU()]

    first = [nn.Conv2d(3, 16, 5, padding=2), nn.ReLU()]
    body = [*block(16, True), *block(32, False), *block(32, True)]
    return nn.Sequential(*first, *body, nn.Flatten(), nn.Linear(2048, 10))


def _fully_connected() -> nn.Sequential:
    hidden = [layer for _ in range(2) for layer in (nn.Linear(300, 300), nn.ReLU())]
    return nn.Sequential(nn.Linear(784, 300), nn.ReLU(), *hidden, nn.Linear(300, 10))


# Networks of the paper and the shapes of their inputs; ReLUs stand behind the pooling.
NETWORKS = {
    "ConvNet": (_convnet, (3, 32, 32)),
    "fully connected": (_fully_connected, (784,)),
}


def accounted_mb(network: nn.Module, shape: tuple, keep: float, *, batch: int) -> float:
    """Megabytes: weights, the kept part of what linear layers and convolutions are given, and a
    bit for each output of a ReLU, which with everything kept the next layer's inputs tell.

    Args:
        network: As it is, not randomized.
        shape: Of one of its inputs.
        keep: Part that is kept.
        batch: Rows.
    """
    inputs = bits = 0

    def count(module: nn.Module, given: tuple[Tensor], outputs: Tensor) -> None:
        nonlocal inputs, bits
        if isinstance(module, nn.Linear | nn.Conv2d):
            inputs += given[0].numel()
        elif isinstance(module, nn.ReLU) and keep < 1:
            bits += outputs.numel()

    handles = [part.register_forward_hook(count) for part in network.modules()]
    with torch.no_grad():
        network(torch.zeros(1, *shape))
    for handle in handles:
        handle.remove()
    return (_weight_bytes(network) + batch * (4 * keep * inputs + bits / 8)) / 1e6


def paper_rows() -> list[dict]:
    """The paper's numbers, the count above, and what our layers keep, with weights."""
    rows = []
    for name, numbers in PAPER.items():
        make, shape = NETWORKS[name]
        for keep, paper in numbers.items():
            network = make()
            row = {"network": name, "keep": keep, "paper_mb": paper}
            row["accounted_mb"] = accounted_mb(network, shape, keep, batch=PAPER_BATCH)
            if keep < 1:
                randomize(network, keep)
            kept = saved_bytes(network, torch.randn(PAPER_BATCH, *shape))
            rows.append(row | {"measured_mb": (_weight_bytes(network) + kept) / 1e6})
    return rows


def _weight_bytes(network: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in network.parameters())


def saved_bytes(module: nn.Module, inputs: Tensor) -> int:
    """What a call keeps for the backward pass besides parameters, each piece of memory once."""
    given = {parameter.untyped_storage().data_ptr() for parameter in module.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in given:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        outputs = module(inputs)
    del outputs  # until here it holds what is kept, so that no memory is counted twice
    return sum(kept.values())


# --- flows -------------------------------------------------------------------------------------


@dataclass
class Task:
    """A flow, its data, and how it is trained.

    Attributes:
        make: Flow for a way to keep inputs, as ``memory`` of its recipe.
        batches: Endless, of so many rows.
        loss: On held-out data, of a flow in eval mode.
        unit: Of the loss.
        batch, steps, lr, clip: Of the training.
    """

    make: Callable[[str], nn.Module]
    batches: Callable[[int], Iterator[Tensor]]
    loss: Callable[[nn.Module], float]
    unit: str
    batch: int
    steps: int
    lr: float
    clip: float


def _two_moons() -> Task:
    density = DENSITIES["two_moons"]

    def batches(size: int) -> Iterator[Tensor]:
        while True:
            yield density.sample(size)

    return Task(
        make=lambda memory: RotationSplineFlow(
            2, hidden_features=128, bins=16, knots=16, memory=memory
        ),
        batches=batches,
        loss=lambda flow: kl_divergence(flow, density, points=20_000)[0],
        unit="KL, nats",
        batch=512,
        steps=300,
        lr=1e-2,
        clip=5.0,
    )


def _digits() -> Task:
    data = Digits()
    data.setup()
    images = {split: data.splits[split][0][:] for split in ("train", "test")}

    def batches(size: int) -> Iterator[Tensor]:
        while True:
            yield images["train"][torch.randint(len(images["train"]), (size,))]

    def loss(flow: nn.Module) -> float:
        with torch.random.fork_rng(), torch.no_grad():
            torch.manual_seed(0)  # the same noise for all
            log_prob = flow(images["test"])
        bits = math.log2(data.grey_levels)
        return bits_per_dim(log_prob, math.prod(data.shape), bits=bits).mean().item()

    return Task(
        make=lambda memory: Glow(data.shape, grey_levels=data.grey_levels, steps=2, memory=memory),
        batches=batches,
        loss=loss,
        unit="test bits/dim",
        batch=64,
        steps=150,
        lr=1e-2,
        clip=50.0,
    )


FLOWS = {"two_moons": _two_moons, "digits": _digits}


def measure(
    name: str,
    keeps: list[float],
    seeds: list[int],
    *,
    steps: int | None = None,
    seconds: float = 1.0,
) -> list[dict]:
    """A row for each way and part to keep: memory, milliseconds of a step, loss of every seed.

    Args:
        name: Of the flow, in ``FLOWS``.
        keeps: Parts to keep, below 1.
        seeds: Of the flow and its batches.
        steps: Instead of the task's own.
        seconds: To time each; three turns at least.
    """
    task = FLOWS[name]()
    steps = task.steps if steps is None else steps
    rows = [{"method": "exact", "keep": 1.0}]
    rows += [{"method": method, "keep": keep} for method in METHODS for keep in keeps]
    rows += [{"method": memory, "keep": 1.0} for memory in ("checkpoint", "reversible")]
    for row in rows:
        row |= {"flow": name, "unit": task.unit, "batch": task.batch, "steps": steps}
    _costs(task, rows, seconds)
    whole = rows[0]["saved_mib"]
    for shared in [row for row in rows if row["method"] == "shared"]:
        batch = max(1, round(task.batch * shared["saved_mib"] / whole))
        rows.append(shared | {"method": "smaller batch", "batch": batch})
    _costs(task, rows[-len(keeps) :], seconds)
    for row in rows:
        if row["method"] not in ("checkpoint", "reversible"):
            row["losses"] = [_train(task, row, seed) for seed in seeds]
            row["loss"] = statistics.median(row["losses"])
        row["step_over_exact"] = row["step_ms"] / rows[0]["step_ms"]
    progress("")
    return rows


def _flow(task: Task, row: dict, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    flow = task.make(row["method"] if row["method"] in ("checkpoint", "reversible") else "store")
    with torch.no_grad():
        flow(next(task.batches(1000)))  # fits Standardize and ActNorm, to the same rows for all
    if row["method"] in METHODS:
        randomize(flow, row["keep"], **METHODS[row["method"]])
    return flow


def _costs(task: Task, rows: list[dict], seconds: float) -> None:
    """Memory and time of a step, in turns."""
    steps = {}
    for k, row in enumerate(rows):
        flow, inputs = _flow(task, row, seed=0), next(task.batches(row["batch"]))
        steps[k] = _step(flow, inputs)
        steps[k]()  # gradients exist from now on
        row["saved_mib"] = saved_bytes(flow, inputs) / 2**20
        row["peak_mib"] = peak_allocated(steps[k], "cpu") / 2**20
    for k, time in interleaved(steps, seconds=seconds).items():
        rows[k]["step_ms"] = time


def _step(flow: nn.Module, inputs: Tensor) -> Callable[[], None]:
    def step() -> None:
        flow.zero_grad(set_to_none=False)
        (-flow(inputs).mean()).backward()

    return step


def _train(task: Task, row: dict, seed: int) -> float:
    progress(f"{row['flow']}: {row['method']}, keep {row['keep']}, seed {seed}")
    flow, _ = train(
        _flow(task, row, seed),
        task.batches(row["batch"]),
        # Its clock is read once before the first step, and once before every step.
        seconds=row["steps"] + 1,
        clock=itertools.count().__next__,
        lr=task.lr,
        clip=task.clip,
    )
    return task.loss(copy.deepcopy(flow).eval())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--flows", nargs="+", choices=FLOWS, default=list(FLOWS))
    parser.add_argument("--keep", nargs="+", type=float, default=list(KEEP), help="below 1")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, help="of training; 300 and 150 by default")
    parser.add_argument("--seconds", type=float, default=1.0, help="to time each")
    parser.add_argument("--threads", type=int, help="torch.set_num_threads")
    parser.add_argument("--output", type=Path, help="JSON file instead of benchmarks/results/...")
    parser.add_argument("--plot", action="store_true", help="draw the JSON instead of measuring")
    parser.add_argument("--figure", type=Path, default=FIGURE, help="where --plot draws")
    given = parser.parse_args()
    if given.threads:
        torch.set_num_threads(given.threads)
    if given.plot:
        draw_randomized(read_json("randomized_autodiff", device="cpu"), given.figure)
        print(given.figure)
        return
    paper = paper_rows()
    show_paper(paper)
    rows = [
        row
        for name in given.flows
        for row in measure(name, given.keep, given.seeds, steps=given.steps, seconds=given.seconds)
    ]
    file = write_json("randomized_autodiff", rows, device="cpu", path=given.output, paper=paper)
    show_randomized(rows, device_name("cpu"))
    print(file)


if __name__ == "__main__":
    main()
