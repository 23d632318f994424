"""Samples from a trained flow, as a picture or as numbers."""

import math
from pathlib import Path

import numpy as np
import torch

from flows import plots
from flows.checks import check_at_least
from flows.flow import load
from flows.transforms import Dequantize, VariationalDequantize

__all__ = ["write_samples"]


def write_samples(
    path: str | Path,
    num_samples: int,
    *,
    temperature: float = 1.0,
    seed: int = 0,
    output: str | Path | None = None,
) -> Path:
    """Draw samples from a run or checkpoint and write them to ``output``.

    Args:
        path: Run folder or checkpoint.
        num_samples: Number of samples, at least 1.
        temperature: Multiplies the standard deviation of the noise.
        seed: Seed of the noise.
        output: File ending in .png (images and 2-D points), .npy or .csv; by default a PNG,
            or NPY where there is no picture, beside the checkpoint.

    Returns:
        The file written.
    """
    path = Path(path).expanduser()
    check_at_least(1, num_samples=num_samples)
    if not 0 <= temperature < math.inf:
        raise ValueError(f"temperature must be finite and at least 0, got {temperature}.")
    flow = load(path)
    torch.manual_seed(seed)
    with torch.no_grad():
        samples = flow.sample(num_samples, temperature=temperature)
    drawable = samples.ndim == 4 or samples.shape[1:] == (2,)
    if output is None:
        folder = path if path.is_dir() else path.parent
        name = f"samples-{num_samples}-temperature-{temperature:g}-seed-{seed}"
        output = folder / f"{name}{'.png' if drawable else '.npy'}"
    output = Path(output)
    match output.suffix.lower():
        case ".npy":
            np.save(output, samples.numpy())
        case ".csv":
            np.savetxt(output, samples.flatten(1).numpy(), delimiter=",", fmt="%.7g")
        case ".png" if drawable:
            layers = [
                m for m in flow.modules() if isinstance(m, Dequantize | VariationalDequantize)
            ]
            grey_levels = [layer.grey_levels for layer in layers]
            plots.save(plots.samples(samples, grey_levels=(grey_levels or [None])[0]), output)
        case _:
            kinds = ".png, .npy or .csv" if drawable else ".npy or .csv"
            raise ValueError(f"output must end in {kinds}, got {output.name}.")
    return output
