"""Flows that learn the densities of ``datasets.densities`` for the same time: how near they come.

    python -m benchmarks.toy_density --seconds 45 --threads 1    # all ten; 2 hours
    python -m benchmarks.toy_density --densities two_moons --seeds 0 --output two_moons.json
    python -m benchmarks.toy_density --plot                      # docs/toy_density.png

A model trains in a process of its own, by the one loop of ``race.train``, on fresh batches of
the density; what is printed is KL(p, q) = E_p[log p - log q] on 100,000 points of p that
are the same for all, the median over seeds. Every model sees standardized data, as ours does by
itself, and has one learning rate and batch size for all densities, those that served it best on
two moons and checkerboard in runs of 15 to 20 s of processor time: of 0.003 to 0.02 with batches
of 512, and 0.01 with 256 and 2048, for zuko's NSF and nflows; of 0.004 to 0.01 with 512, 0.01 with
1024, 0.01 and 0.02 with 2048 for ours. zuko's MAF was tried on two moons only, with 0.01 and 512,
and 0.02 and 2048. normflows' layers are much like nflows' and take their numbers.
"""

import argparse
import json
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.plot import draw_toy_densities
from benchmarks.race import CLOCKS, race, train
from benchmarks.report import show_toy_densities
from benchmarks.timing import device_name, read_json, write_json
from datasets.densities import DENSITIES, Density
from flows.recipes import RotationSplineFlow

__all__ = ["MODELS", "Model", "Standardized", "kl_divergence", "run", "summary"]

FIGURE = Path(__file__).parents[1] / "docs" / "toy_density.png"
# Points are drawn so many at a time and then cut into batches, which is cheaper.
POOL = 2**16
TEST = 100_000


class Standardized(nn.Module):
    """A model of data with mean 0 and deviation 1, as a density in the data's own units.

    Args:
        log_prob: Log density of standardized points, shape (batch,).
        module: What holds the parameters.
        sample: Data, shape (n, features), whose mean and deviation are taken.
    """

    def __init__(
        self, log_prob: Callable[[nn.Module, Tensor], Tensor], module: nn.Module, sample: Tensor
    ) -> None:
        super().__init__()
        self.function = log_prob
        self.module = module
        self.register_buffer("mean", sample.mean(0))
        self.register_buffer("deviation", sample.std(0))

    def log_prob(self, inputs: Tensor) -> Tensor:
        standard = (inputs - self.mean) / self.deviation
        return self.function(self.module, standard) - self.deviation.log().sum()


def _ours(sample: Tensor) -> nn.Module:
    flow = RotationSplineFlow(features=2)
    with torch.no_grad():
        flow.log_prob(sample)  # fits Standardize and ActNorm
    return flow


def _zuko_nsf(sample: Tensor) -> nn.Module:
    import zuko

    flow = zuko.flows.NSF(2, transforms=3, hidden_features=(64, 64))
    return Standardized(lambda flow, x: flow().log_prob(x), flow, sample)


def _zuko_maf(sample: Tensor) -> nn.Module:
    import zuko

    flow = zuko.flows.MAF(2, transforms=5, hidden_features=(64, 64))
    return Standardized(lambda flow, x: flow().log_prob(x), flow, sample)


def _nflows_nsf(sample: Tensor) -> nn.Module:
    from nflows import transforms
    from nflows.distributions import StandardNormal
    from nflows.flows import Flow
    from nflows.nn.nets import ResidualNet

    def net(in_features: int, out_features: int) -> nn.Module:
        return ResidualNet(in_features, out_features, hidden_features=56, num_blocks=2)

    layers = []
    for k in range(4):
        layers += [
            transforms.LULinear(2),
            transforms.PiecewiseRationalQuadraticCouplingTransform(
                [k % 2, 1 - k % 2], net, num_bins=8, tails="linear", tail_bound=4.0
            ),
        ]
    flow = Flow(transforms.CompositeTransform(layers), StandardNormal([2]))
    return Standardized(lambda flow, x: flow.log_prob(x), flow, sample)


def _normflows_nsf(sample: Tensor) -> nn.Module:
    import normflows

    layers = []
    for k in range(4):
        layers += [
            normflows.flows.CoupledRationalQuadraticSpline(
                2, 2, 56, num_bins=8, tail_bound=4.0, reverse_mask=k % 2 == 1
            ),
            normflows.flows.LULinearPermute(2),
        ]
    base = normflows.distributions.DiagGaussian(2, trainable=False)
    flow = normflows.NormalizingFlow(base, layers)
    return Standardized(lambda flow, x: flow.log_prob(x), flow, sample)


@dataclass
class Model:
    """How a model is made from some data, and how it is trained."""

    make: Callable[[Tensor], nn.Module]
    lr: float
    batch: int


MODELS = {
    "ours": Model(_ours, lr=1e-2, batch=2048),
    "zuko NSF": Model(_zuko_nsf, lr=2e-2, batch=512),
    "nflows NSF": Model(_nflows_nsf, lr=1e-2, batch=512),
    "normflows NSF": Model(_normflows_nsf, lr=1e-2, batch=512),
    "zuko MAF": Model(_zuko_maf, lr=2e-2, batch=2048),
}


def kl_divergence(model: nn.Module, density: Density, points: int = TEST) -> tuple[float, float]:
    """E_p[log p - log q] in nats on fresh points of p, and its standard error."""
    x = density.sample(points, torch.Generator().manual_seed(1_000_003))
    with torch.no_grad():
        gaps = [density.log_prob(part) - model.log_prob(part) for part in x.split(10_000)]
    gap = torch.cat(gaps).double()
    return gap.mean().item(), gap.std().item() / points**0.5


def run(row: dict) -> dict:
    """Train the model of a row for its time; returns what is found of it."""
    density, model = DENSITIES[row["density"]], MODELS[row["model"]]
    torch.manual_seed(row["seed"])
    flow = model.make(density.sample(POOL // 4))
    flow, took = train(
        flow,
        _batches(density, model.batch),
        seconds=row["seconds"],
        lr=model.lr,
        clock=CLOCKS[row["clock"]],
    )
    kl, error = kl_divergence(flow, density, row["points"])
    return {"kl": kl, "standard_error": error, "lr": model.lr, "batch": model.batch, **took}


def _batches(density: Density, size: int) -> Iterator[Tensor]:
    while True:
        yield from density.sample(POOL).split(size)


def summary(rows: list[dict]) -> dict[tuple[str, str], dict]:
    """By density and model the row whose divergence is the median of those of all seeds.

    Of an even number of seeds it is the lower one of the middle two, so that the standard error
    belongs to it.
    """
    groups: dict[tuple[str, str], list[dict]] = {}
    for row in rows:
        group = groups.setdefault((row["density"], row["model"]), [])
        if "kl" in row:
            group.append(row)
    chosen = {}
    for key, group in groups.items():
        if group:
            middle = statistics.median_low(row["kl"] for row in group)
            chosen[key] = next(row for row in group if row["kl"] == middle)
    return chosen


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--densities", nargs="+", choices=DENSITIES, default=list(DENSITIES))
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--seconds", type=float, default=45.0, help="of training, each model")
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="what a second is")
    parser.add_argument("--points", type=int, default=TEST, help="points of the true density")
    parser.add_argument("--threads", type=int, default=1, help="of every process")
    parser.add_argument("--at-once", type=int, default=1, help="processes side by side")
    parser.add_argument("--resume", action="store_true", help="go on with an interrupted run")
    parser.add_argument("--output", type=Path, help="JSON file instead of benchmarks/results/...")
    parser.add_argument("--plot", action="store_true", help="draw the JSON instead of measuring")
    parser.add_argument("--figure", type=Path, default=FIGURE, help="where --plot draws")
    parser.add_argument("--run", help="one row as JSON: what every process is called with")
    given = parser.parse_args()
    if given.run:
        row = json.loads(given.run)
        torch.set_num_threads(row["threads"])
        print(json.dumps(run(row)))
        return
    torch.set_num_threads(given.threads)
    if given.plot:
        content = json.loads(given.output.read_text()) if given.output else None
        content = content or read_json("toy_density", device="cpu")
        draw_toy_densities(content, summary(content["rows"]), given.figure)
        print(given.figure)
        return
    rows = [
        {
            "density": density,
            "model": model,
            "seed": seed,
            "seconds": given.seconds,
            "clock": given.clock,
            "threads": given.threads,
            "points": given.points,
        }
        for seed in given.seeds
        for density in given.densities
        for model in given.models
    ]
    rows = race(
        "toy_density", rows, threads=given.threads, at_once=given.at_once, resume=given.resume
    )
    file = write_json("toy_density", rows, device="cpu", path=given.output, at_once=given.at_once)
    show_toy_densities(rows, summary(rows), device_name("cpu"))
    print(file)


if __name__ == "__main__":
    main()
