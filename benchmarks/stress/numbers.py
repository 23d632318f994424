"""What training leaves of exactness."""

import copy
import json
import math
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.stress.crashes import DEADLINE, ROOT, RUN, environment
from datasets.densities import DENSITIES
from flows import HouseholderRotation, Rotation, Rotation1x1, givens, orthogonal
from flows.diagnostics import audit
from flows.recipes import (
    GaussianizationFlow,
    MaskedSplineFlow,
    RotationSplineFlow,
    SplineCouplingFlow,
    VolumePreservingFlow,
)

# Layers with a weight that must stay orthogonal, and the weight.
ROTATIONS: dict[str, Callable[[], tuple[nn.Module, Callable[[nn.Module], Tensor]]]] = {
    "crossing": lambda: (Rotation(16), Rotation.matrix),
    "cosine_sine": lambda: (Rotation(16, givens.cosine_sine(16)), Rotation.matrix),
    "odd_even, random base": lambda: (
        Rotation(15, givens.odd_even(15), init="haar"),
        Rotation.matrix,
    ),
    "1x1": lambda: (Rotation1x1(12), Rotation1x1.matrix),
    "reflections": lambda: (HouseholderRotation(16), HouseholderRotation.matrix),
    "orthogonal(nn.Linear)": lambda: (
        orthogonal(nn.Linear(16, 16)),
        lambda layer: layer.weight,
    ),
}
RECIPES = {
    "RotationSplineFlow": RotationSplineFlow,
    "SplineCouplingFlow": SplineCouplingFlow,
    "GaussianizationFlow": GaussianizationFlow,
    "MaskedSplineFlow": MaskedSplineFlow,
    "VolumePreservingFlow": VolumePreservingFlow,
}
MAGNITUDES = [10.0**k for k in range(7)]
# Far from the data the conditioners of masked layers extrapolate. Slopes of 1e-3 in each of four
# layers then leave no digits to invert: at 17 an input comes back with an error of 7 in float32
# and of 1e-5 in float64.
NEAR = {"MaskedSplineFlow": [1.0]}


def orthogonality(*, steps: int) -> Iterator[dict]:
    """Train rotations towards targets that change all the time, with a rate that is too high."""
    for name, make in ROTATIONS.items():
        torch.manual_seed(0)
        layer, weight = make()
        optimizer = torch.optim.Adam(layer.parameters(), lr=0.1)
        for step in range(steps):
            w = weight(layer)
            optimizer.zero_grad(set_to_none=True)
            (w - torch.randn_like(w)).square().sum().backward()
            optimizer.step()
            if name == "crossing" and step % 1000 == 999:
                layer.recenter()
        w = weight(layer).detach().double()
        error = (w.mT @ w - torch.eye(len(w), dtype=w.dtype)).abs().max().item()
        yield _row(f"{name}, {steps} steps: W^T W - I", error, 1e-5)


def trained_flows(*, steps: int) -> Iterator[dict]:
    """Recipes trained on two moons: their integral, and float32 far from the data."""
    for name, recipe in RECIPES.items():
        torch.manual_seed(0)
        flow = recipe(features=2)
        density = DENSITIES["two_moons"]
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            flow.log_prob(density.sample(2048, generator))
        optimizer = torch.optim.Adam(flow.parameters(), lr=5e-3)
        for _ in range(steps):
            loss = -flow.log_prob(density.sample(512, generator)).mean()
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(flow.parameters(), 5.0)
            optimizer.step()
        flow.eval()
        found = audit(flow, density.sample(1000, generator))
        integral = found["integral"].value
        what = f"{name}, {steps} steps"
        yield _row(f"{what}: integral - 1", math.nan if integral is None else integral, 1e-3)
        inverse, log_det = far_away(flow, MAGNITUDES)
        yield _row(f"{what}: log-det, inputs to 1e6, of itself or 1 nat", log_det, 1e-2)
        if name in NEAR:
            inverse, _ = far_away(flow, NEAR[name])
            yield _row(f"{what}: inverse, inputs to 5", inverse, 1e-4)
        else:
            yield _row(f"{what}: inverse, inputs to 1e6, of the largest", inverse, 1e-4)


@torch.no_grad()
def far_away(flow: nn.Module, magnitudes: list[float]) -> tuple[float, float]:
    """Largest errors of a float32 flow on normal inputs times each of the magnitudes.

    Returns:
        That of the way there and back, in units of a row's largest input or 1; and that of the
        log-det against float64, in units of the log-det or 1 nat.
    """
    exact = copy.deepcopy(flow).double()
    features = 2
    generator = torch.Generator().manual_seed(0)
    scales = torch.tensor(magnitudes).repeat_interleave(500)[:, None]
    inputs = scales * torch.randn(len(scales), features, generator=generator)
    inputs = inputs.clamp(-1e6, 1e6)
    outputs, log_det = flow.transform(inputs)
    back, _ = flow.transform.inverse(outputs)
    _, right = exact.transform(inputs.double())
    unit = inputs.abs().amax(1, keepdim=True).clamp_min(1)
    inverse = ((back - inputs).abs() / unit).max().item()
    return inverse, ((log_det.double() - right).abs() / right.abs().clamp_min(1)).max().item()


def bfloat16(folder: Path, *, epochs: int) -> dict:
    """Bits/dim on digits in float32 and under autocast to bfloat16, each trained from scratch."""
    bits = {}
    for precision in ("32-true", "bf16-mixed"):
        root = folder / precision
        subprocess.run(
            [*RUN, "--config=configs/images/digits.yaml", f"--trainer.precision={precision}"]
            + [f"--trainer.max_epochs={epochs}", "--trainer.enable_progress_bar=false"]
            + [f"--trainer.default_root_dir={root}"],
            cwd=ROOT,
            env=environment(),
            stdout=subprocess.DEVNULL,
            check=True,
            timeout=DEADLINE,
        )
        bits[precision] = _test_bits(root)
    difference = abs(bits["bf16-mixed"] - bits["32-true"])
    what = f"digits, {epochs} epochs: bits/dim under bfloat16 autocast against float32"
    return _row(what, difference, 0.01) | bits


def _row(what: str, value: float, bound: float) -> dict:
    return {
        "what": what,
        "result": f"{value:.1e}",
        "asked": f"at most {bound:.0e}",
        "ok": value <= bound,
        "value": value,
        "bound": bound,
    }


def _test_bits(root: Path) -> float:
    (summary,) = root.glob("*/*/summary.json")
    return json.loads(summary.read_text())["test/bits_per_dim"]
