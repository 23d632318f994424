"""The four ways to mix features, each in the same flow, learning for the same time.

    python -m benchmarks.mixing                            # 12 minutes of one core
    python -m benchmarks.mixing --clock processor          # on a machine that others use as well
    python -m benchmarks.mixing --data two_moons --seeds 0 --seconds 5

``RotationSplineFlow`` with its defaults learns densities in the plane from fresh batches and is
judged by its KL divergence on 100,000 points; ``Glow`` learns the digits and is judged by test
bits/dim with one noise for all. ``mixing`` is all that differs: learning rates and batches are
those of ``benchmarks.toy_density`` and ``configs/images/digits.yaml``, found with angles. Every
run is a process of its own with the one loop of ``race.train``.
"""

import argparse
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import torch
from torch import Tensor

from benchmarks.race import CLOCKS, race, train
from benchmarks.report import show_mixing
from benchmarks.timing import device_name, write_json
from benchmarks.toy_density import MODELS, TEST, kl_divergence
from datasets.densities import DENSITIES
from datasets.images import Digits
from flows.flow import Flow
from flows.objectives import bits_per_dim
from flows.recipes import Glow, RotationSplineFlow
from flows.recipes.mixing import Mixing

__all__ = ["run"]

MIXINGS = get_args(Mixing)
# Smaller than that of its config, so that it sees the digits about a hundred times.
DIGITS = {
    "grey_levels": Digits.grey_levels,
    "levels": 2,
    "steps": 4,
    "hidden_features": 32,
    "marginals": "empirical",
    "dropout": 0.2,
}
POOL = 2**16


def run(row: dict) -> dict:
    """Train the flow of a row for its time; returns what is found of it."""
    torch.manual_seed(row["seed"])
    return (_digits if row["data"] == "digits" else _density)(row)


def _density(row: dict) -> dict:
    density, ours = DENSITIES[row["data"]], MODELS["ours"]
    flow = RotationSplineFlow(features=2, mixing=row["mixing"])

    def batches() -> Iterator[Tensor]:
        while True:
            yield from density.sample(POOL).split(ours.batch)

    with torch.no_grad():
        flow.log_prob(density.sample(POOL // 4))  # fits Standardize and ActNorm
    flow, took = _train(row, flow, batches(), lr=ours.lr, clip=5.0)
    kl, error = kl_divergence(flow, density, row["points"])
    return {"loss": kl, "standard_error": error, **took}


def _digits(row: dict) -> dict:
    data = Digits()
    data.setup()
    images, test = (data.splits[split][0][:] for split in ("train", "test"))
    flow = Glow(data.shape, mixing=row["mixing"], **DIGITS)

    def batches() -> Iterator[Tensor]:
        while True:
            yield from images[torch.randperm(len(images))].split(100)

    with torch.no_grad():
        flow.log_prob(images)  # fits EmpiricalCDF and ActNorm
    flow, took = _train(row, flow, batches(), lr=2e-3, clip=50.0)
    torch.manual_seed(0)
    with torch.no_grad():
        bits = bits_per_dim(
            flow.log_prob(test), math.prod(data.shape), bits=math.log2(data.grey_levels)
        )
    error = bits.std().item() / math.sqrt(len(bits))
    return {"loss": bits.mean().item(), "standard_error": error, **took}


def _train(
    row: dict, flow: Flow, batches: Iterator[Tensor], *, lr: float, clip: float
) -> tuple[Flow, dict]:
    clock = CLOCKS[row["clock"]]
    return train(flow, batches, seconds=row["seconds"], lr=lr, clip=clip, clock=clock)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    data = ["two_moons", "checkerboard", "digits"]
    parser.add_argument("--data", nargs="+", choices=[*DENSITIES, "digits"], default=data)
    parser.add_argument("--mixings", nargs="+", choices=MIXINGS, default=list(MIXINGS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument(
        "--seconds", type=float, help="of training, each; 8 on densities, 20 on digits"
    )
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="what a second is")
    parser.add_argument("--points", type=int, default=TEST, help="points of the true density")
    parser.add_argument("--threads", type=int, default=1, help="of every process")
    parser.add_argument("--at-once", type=int, default=1, help="processes side by side")
    parser.add_argument("--resume", action="store_true", help="go on with an interrupted run")
    parser.add_argument("--output", type=Path, help="JSON file instead of benchmarks/results/...")
    parser.add_argument("--run", help="one row as JSON: what every process is called with")
    given = parser.parse_args()
    if given.run:
        row = json.loads(given.run)
        torch.set_num_threads(row["threads"])
        print(json.dumps(run(row)))
        return
    torch.set_num_threads(given.threads)
    rows = [
        {
            "data": name,
            "mixing": mixing,
            "seed": seed,
            "seconds": given.seconds or (20.0 if name == "digits" else 8.0),
            "clock": given.clock,
            "threads": given.threads,
            "points": given.points,
        }
        for seed in given.seeds
        for name in given.data
        for mixing in given.mixings
    ]
    rows = race("mixing", rows, threads=given.threads, at_once=given.at_once, resume=given.resume)
    file = write_json("mixing", rows, device="cpu", path=given.output, at_once=given.at_once)
    show_mixing(rows, device_name("cpu"))
    print(file)


if __name__ == "__main__":
    main()
