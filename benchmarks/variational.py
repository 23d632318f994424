"""Flows that learn a posterior from its unnormalized density, by each bound for the same time.

    python -m benchmarks.variational --seconds 20 --threads 1    # 2 flows, 3 seeds; 10 minutes

The posterior has two modes, of which a flow may lose one. A run trains in a process of its own,
by the one loop of ``race.train``, with as many draws a step for every bound; two bounds share the
time. What is printed is of the median seed: KL(p, q) = E_p[log p - log q] on 50,000 exact draws of
the posterior p, KL(q, p) on as many of the flow q, the part of these in the smaller mode, and what
a draw is worth where each is weighted.
"""

import argparse
import json
import statistics
from functools import partial
from itertools import repeat
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from benchmarks.race import CLOCKS, race, train
from benchmarks.timing import write_json
from datasets.densities import Density
from datasets.posteriors import POSTERIORS
from flows import (
    Composite,
    Flow,
    Rotation,
    SplineCoupling,
    effective_sample_size,
    importance_sample,
)
from flows.distributions import GaussianMixture
from flows.nets import MLP
from flows.recipes import VolumePreservingFlow
from flows.training.variational import BOUNDS

__all__ = ["Bound", "measure", "run"]

COMPONENTS, DRAWS, TEST = 4, 512, 50_000


def _volume_preserving() -> Flow:
    return VolumePreservingFlow(
        features=2, layers=4, hidden_features=32, blocks=1, components=COMPONENTS
    )


def _splines() -> Flow:
    net = partial(MLP, hidden_features=32, blocks=1, knots=16, bound=4.0)
    layers = []
    for k in range(3):
        layers += [Rotation(2), SplineCoupling(2, net, bins=16, tail_bound=4.0, flip=k % 2 == 1)]
    return Flow(Composite(layers), GaussianMixture(2, COMPONENTS))


FLOWS = {"volume preserving": _volume_preserving, "splines": _splines}
# Draws of one bound: iwae has as many as siwae has in all.
SAMPLES = {"elbo": 1, "iwae": COMPONENTS, "selbo": 1, "siwae": 1}
STAGES = ("elbo", "iwae", "selbo", "siwae", "siwae then selbo")


class Bound(nn.Module):
    """What ``race.train`` maximizes: a bound in the place of a log density.

    Args:
        flow: What is trained.
        density: What it is to learn.
        name: Name of the bound.
        num_samples: Draws of one bound, or of each component.
    """

    def __init__(self, flow: Flow, density: Density, name: str, num_samples: int) -> None:
        super().__init__()
        self.flow = flow
        self.density = density
        self.name = name
        self.num_samples = num_samples

    def log_prob(self, inputs: Tensor) -> Tensor:
        target = self.density.unnormalized_log_prob
        return BOUNDS[self.name](target, self.flow, self.num_samples, repeats=len(inputs))


@torch.no_grad()
def measure(flow: Flow, density: Density) -> dict[str, float]:
    """What a flow has learned of a density, in nats and parts of one."""
    x = density.sample(TEST, torch.Generator().manual_seed(1_000_003))
    forward = (density.log_prob(x) - flow.log_prob(x)).double()
    torch.manual_seed(1_000_003)
    samples, log_q = flow.sample_and_log_prob(TEST)
    reverse = (log_q - density.log_prob(samples)).double()
    draws, log_weights = importance_sample(density.unnormalized_log_prob, flow, 4096)
    return {
        "kl": forward.mean().item(),
        "standard_error": forward.std().item() / TEST**0.5,
        "reverse_kl": reverse.mean().item(),
        "smaller_mode": (samples[:, 0] > samples[:, 1]).double().mean().item(),
        "true_smaller_mode": (x[:, 0] > x[:, 1]).double().mean().item(),
        "efficiency": (effective_sample_size(log_weights) / len(draws.flatten(0, -2))).item(),
    }


def run(row: dict) -> dict:
    """Train by the bounds of a row for its time; returns what is found."""
    density, stages = POSTERIORS[row["density"]], row["objective"].split(" then ")
    torch.manual_seed(row["seed"])
    flow, steps = FLOWS[row["flow"]](), 0
    for name in stages:
        draws = SAMPLES[name] * (COMPONENTS if name in ("selbo", "siwae") else 1)
        bound, took = train(
            Bound(flow, density, name, SAMPLES[name]),
            repeat(torch.empty(DRAWS // draws)),  # its rows are only counted
            seconds=row["seconds"] / len(stages),
            lr=row["lr"],
            ema_decay=0.99,
            clock=CLOCKS[row["clock"]],
        )
        flow, steps = bound.flow, steps + took["steps"]
    return measure(flow, density) | {"steps": steps}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--flows", nargs="+", choices=FLOWS, default=list(FLOWS))
    parser.add_argument("--objectives", nargs="+", choices=STAGES, default=list(STAGES))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--seconds", type=float, default=20.0, help="of training, each run")
    parser.add_argument("--lr", type=float, default=1e-2, help="peak of the learning rate")
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="what a second is")
    parser.add_argument("--threads", type=int, default=1, help="of every process")
    parser.add_argument("--at-once", type=int, default=1, help="processes side by side")
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
            "density": "two_means",
            "flow": flow,
            "objective": objective,
            "seed": seed,
            "seconds": given.seconds,
            "lr": given.lr,
            "clock": given.clock,
            "threads": given.threads,
        }
        for seed in given.seeds
        for flow in given.flows
        for objective in given.objectives
    ]
    rows = race("variational", rows, threads=given.threads, at_once=given.at_once)
    file = write_json("variational", rows, device="cpu", path=given.output, at_once=given.at_once)
    show(rows)
    print(file)


def show(rows: list[dict]) -> None:
    """A line for each bound: the run whose KL(p, q) is the median, and the range of it."""
    table = Table()
    heads = ("", "", "KL(p, q)", "range", "KL(q, p)", "smaller mode", "efficiency", "steps")
    for head in heads:
        table.add_column(head, no_wrap=True)
    groups: dict[tuple[str, str], list[dict]] = {}
    for row in rows:
        if "error" in row:
            print(f"failed: {row['flow']}, {row['objective']}, seed {row['seed']}: {row['error']}")
        else:
            groups.setdefault((row["flow"], row["objective"]), []).append(row)
    for names, group in groups.items():
        values = [row["kl"] for row in group]
        row = next(r for r in group if r["kl"] == statistics.median_low(values))
        table.add_row(
            *names,
            f"{row['kl']:.4f} ± {row['standard_error']:.4f}",
            f"{min(values):.4f} to {max(values):.4f}",
            f"{row['reverse_kl']:.4f}",
            f"{row['smaller_mode']:.3f} of {row['true_smaller_mode']:.3f}",
            f"{row['efficiency']:.2f}",
            f"{row['steps']:,}",
        )
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
