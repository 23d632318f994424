"""Training steps per second of one architecture, built with each library.

    python -m benchmarks.steps --threads 1

Eight spline couplings that exchange the halves of a vector: 8 bins, linear tails, conditioners
of two hidden layers of 64 with SiLU, a standard normal base. All have equally many parameters. A
step is the log-likelihood of a batch, its gradient and a fused AdamW update, in float32;
libraries take turns.
"""

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.report import show_steps
from benchmarks.timing import FAILURES, device_name, interleaved, progress, write_json
from flows import Composite, Flow, SplineCoupling
from flows.distributions import Normal

OURS = "ours"
BINS, BOUND, HIDDEN = 8, 5.0, 64
LAYERS = 8
# Features and rows.
CASES = [(2, 256), (2, 1024), (6, 512), (21, 512), (63, 512)]


def measure(
    cases: list[tuple[int, int]], *, device: str = "cpu", seconds: float = 3.0
) -> list[dict]:
    """A row for each case and library.

    Args:
        cases: Features, and rows of a batch.
        device: "cpu" or "cuda".
        seconds: For each library and case; three turns at least.
    """
    rows = []
    for features, batch in cases:
        case = f"{features} features, batch {batch}"
        progress(f"{case}, {device_name(device)}")
        inputs = torch.randn(batch, features, device=device)
        found, steps = {}, {}
        for name, make in MODELS.items():
            found[name] = {"case": case, "method": name, "skipped": {}}
            try:
                model = make(features).to(device)
            except FAILURES as error:
                found[name]["skipped"]["step"] = str(error)
                continue
            found[name]["parameters"] = sum(p.numel() for p in model.parameters())
            steps[name] = _step(model, inputs)
        for name, result in interleaved(steps, seconds=seconds, device=device).items():
            if isinstance(result, str):
                found[name]["skipped"]["step"] = result
            else:
                found[name]["steps_per_second"] = 1e3 / result
        for row in found.values():
            if "steps_per_second" in row:
                ours = found[OURS]["steps_per_second"]
                row["ours_over_this"] = ours / row["steps_per_second"]
        rows += found.values()
    progress("")
    return rows


def _step(model: nn.Module, inputs: Tensor) -> Callable[[], None]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step() -> None:
        optimizer.zero_grad()
        (-model.log_prob(inputs).mean()).backward()
        optimizer.step()

    return step


class Conditioner(nn.Sequential):
    """The same network in every library; a context is not used."""

    hidden_features = HIDDEN  # by which nflows divides what goes into the softmax

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(
            nn.Linear(in_features, HIDDEN),
            nn.SiLU(),
            nn.Linear(HIDDEN, HIDDEN),
            nn.SiLU(),
            nn.Linear(HIDDEN, out_features),
        )

    def forward(self, inputs: Tensor, context: Tensor | None = None) -> Tensor:
        return super().forward(inputs)


def _moved(features: int, layer: int) -> Tensor:
    """Which features a layer moves: in turn the last and the first ones, half of them or more."""
    order = torch.arange(features).flip(0) if layer % 2 else torch.arange(features)
    return order >= features // 2


def _ours(features: int) -> nn.Module:
    couplings = [
        SplineCoupling(features, Conditioner, bins=BINS, tail_bound=BOUND, flip=layer % 2 == 1)
        for layer in range(LAYERS)
    ]
    return Flow(Composite(couplings), Normal(features))


def _nflows(features: int) -> nn.Module:
    from nflows.distributions import StandardNormal
    from nflows.flows import Flow
    from nflows.transforms import CompositeTransform, PiecewiseRationalQuadraticCouplingTransform

    couplings = [
        PiecewiseRationalQuadraticCouplingTransform(
            _moved(features, layer), Conditioner, num_bins=BINS, tails="linear", tail_bound=BOUND
        )
        for layer in range(LAYERS)
    ]
    return Flow(CompositeTransform(couplings), StandardNormal([features]))


def _normflows(features: int) -> nn.Module:
    import normflows
    from normflows.flows.neural_spline.coupling import PiecewiseRationalQuadraticCoupling

    couplings = []
    for layer in range(LAYERS):
        coupling = normflows.flows.CoupledRationalQuadraticSpline(features, 1, HIDDEN)
        # With our network instead of its residual one, and no splines of the kept half.
        coupling.prqct = PiecewiseRationalQuadraticCoupling(
            _moved(features, layer), Conditioner, num_bins=BINS, tails="linear", tail_bound=BOUND
        )
        couplings.append(coupling)
    base = normflows.distributions.DiagGaussian(features, trainable=False)
    return normflows.NormalizingFlow(base, couplings)


class _Zuko(nn.Module):
    def __init__(self, features: int) -> None:
        super().__init__()
        from zuko.distributions import DiagNormal
        from zuko.flows import Flow, GeneralCouplingTransform
        from zuko.lazy import UnconditionalDistribution
        from zuko.transforms import MonotonicRQSTransform

        couplings = [
            GeneralCouplingTransform(
                features,
                mask=~_moved(features, layer),
                univariate=partial(MonotonicRQSTransform, bound=BOUND),
                shapes=[(BINS,), (BINS,), (BINS - 1,)],
                hidden_features=(HIDDEN, HIDDEN),
                activation=nn.SiLU,
            )
            for layer in range(LAYERS)
        ]
        base = UnconditionalDistribution(
            DiagNormal, torch.zeros(features), torch.ones(features), buffer=True
        )
        self.flow = Flow(couplings, base)

    def log_prob(self, inputs: Tensor) -> Tensor:
        return self.flow().log_prob(inputs)


MODELS: dict[str, Callable[[int], nn.Module]] = {
    OURS: _ours,
    "nflows": _nflows,
    "zuko": _Zuko,
    "normflows": _normflows,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seconds", type=float, default=3.0, help="per library and case")
    parser.add_argument("--threads", type=int, help="torch.set_num_threads")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, help="JSON file instead of benchmarks/results/...")
    given = parser.parse_args()
    if given.threads:
        torch.set_num_threads(given.threads)
    rows = measure(CASES, device=given.device, seconds=given.seconds)
    file = write_json("steps", rows, device=given.device, path=given.output)
    show_steps(rows, device_name(given.device))
    print(file)


if __name__ == "__main__":
    main()
