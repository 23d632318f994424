"""Pictures of densities, samples and training; needs matplotlib, so import it by name."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import BinaryIO, Protocol, runtime_checkable

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from flows.flow import Flow

__all__ = [
    "clouds",
    "density",
    "history",
    "image_grid",
    "marginals",
    "points",
    "samples",
    "save",
]

COLORS = "magma"
FILL = {"data": 0.5, "samples": 1.0}


@runtime_checkable
class Density(Protocol):
    """A two-dimensional law that training data come from."""

    extent: tuple[float, float, float, float]

    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor: ...

    def log_prob(self, x: Tensor) -> Tensor: ...


def save(figure: Figure, path: str | Path | BinaryIO) -> None:
    """Write a figure as PNG."""
    figure.savefig(path, format="png", dpi=110)


@torch.no_grad()
def density(flow: Flow, truth: Density, *, num_samples: int = 5000, pixels: int = 200) -> Figure:
    """Data and samples above, true and learned density below, on the same scales."""
    left, right, bottom, top = truth.extent
    xs = torch.linspace(left, right, pixels)
    ys = torch.linspace(bottom, top, pixels)
    grid = torch.cartesian_prod(ys, xs).flip(1)
    reference = next(flow.parameters())
    true = truth.log_prob(grid).exp().view(pixels, pixels)
    learned = flow.log_prob(grid.to(reference)).exp().view(pixels, pixels)
    panel = 3.6 * (top - bottom) / (right - left)
    figure = Figure(figsize=(8.2, 2 * panel + 0.9), layout="constrained")
    axes = figure.subplots(2, 2, sharex=True, sharey=True)
    clouds = {"data": truth.sample(num_samples), "samples": flow.sample(num_samples)}
    for axis, (title, values) in zip(axes[0], clouds.items(), strict=True):
        points(axis, values, title)
    for axis, (title, values) in zip(
        axes[1], {"true density": true, "learned density": learned}.items(), strict=True
    ):
        image = axis.imshow(
            values.cpu().numpy(),
            origin="lower",
            extent=truth.extent,
            cmap=COLORS,
            vmin=0,
            vmax=float(true.max()),
        )
        axis.set_title(title)
    figure.colorbar(image, ax=axes[1], label="density")
    for axis in axes.flat:
        axis.set(xlim=(left, right), ylim=(bottom, top), aspect="equal")
    return figure


def image_grid(axis: Axes, images: Tensor, title: str, *, columns: int = 8) -> None:
    """Images (n, channels, height, width) in [0, 1] as a grid with thin gaps."""
    rows = -(-len(images) // columns)
    _, channels, height, width = images.shape
    canvas = torch.ones(channels, rows * (height + 1) - 1, columns * (width + 1) - 1)
    for index, image in enumerate(images.clamp(0, 1).cpu()):
        top, left = index // columns * (height + 1), index % columns * (width + 1)
        canvas[:, top : top + height, left : left + width] = image
    canvas = canvas.movedim(0, -1).squeeze(-1).numpy()
    axis.imshow(canvas, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    axis.set_title(title)
    axis.set_axis_off()


def samples(
    drawn: Tensor,
    real: Tensor | None = None,
    *,
    grey_levels: int | None = None,
    columns: int = 8,
) -> Figure:
    """Samples, beside real data if given: images as grids, two-dimensional vectors as points.

    ``grey_levels`` is L where pixels are the lower edges k / L of bins; ``columns`` is the
    number of images beside one another.
    """
    panels = {"samples": drawn} if real is None else {"data": real, "samples": drawn}
    figure = Figure(figsize=(4.5 * len(panels), 4.8), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.12)
    axes = figure.subplots(1, len(panels), squeeze=False, sharex=True, sharey=True)[0]
    # The brightest pixel is (L - 1) / L.
    scale = 1.0 if grey_levels is None else grey_levels / (grey_levels - 1)
    for axis, (title, values) in zip(axes, panels.items(), strict=True):
        if values.ndim == 4:
            image_grid(axis, values * scale, title, columns=columns)
        else:
            points(axis, values, title)
    return figure


def points(axis: Axes, values: Tensor, title: str) -> None:
    """Two-dimensional points, shape (n, 2)."""
    x, y = values.cpu().numpy().T
    # Few points would be lost at the size that suits thousands.
    size = max(1.5, min(15, 2000 / max(1, len(values))))
    axis.scatter(x, y, s=size, alpha=0.5, color="#3b0f70", linewidths=0)
    # Columns of very different units would be squeezed into a line.
    width, height = values.amax(0) - values.amin(0)
    comparable = 0.2 < width / height < 5
    axis.set(title=title, aspect="equal" if comparable else "auto")


def clouds(drawn: Tensor, titles: Sequence[str]) -> Figure:
    """Two-dimensional samples (rows, n, 2), a panel for each row under its title."""
    across = min(4, len(drawn))
    down = -(-len(drawn) // across)
    figure = Figure(figsize=(3 * across, 3.2 * down), layout="constrained")
    axes = figure.subplots(down, across, squeeze=False, sharex=True, sharey=True).flat
    for axis, values, title in zip(axes, drawn, titles, strict=False):
        points(axis, values, title)
    for axis in list(axes)[len(drawn) :]:
        axis.set_axis_off()
    return figure


def marginals(drawn: Tensor, real: Tensor, names: Sequence[str] | None = None) -> Figure:
    """Histograms of the first 16 columns of two tables (rows, features), on the same bins.

    The bins cover all real values but the two outermost thousandths.
    """
    shown = min(16, real.shape[1])
    bins = min(40, max(10, round(2 * math.sqrt(len(real)))))
    across = min(4, shown)
    down = -(-shown // across)
    figure = Figure(figsize=(2.6 * across, 2.1 * down + 0.3), layout="constrained")
    axes = list(figure.subplots(down, across, squeeze=False).flat)
    real, drawn = real.cpu().double(), drawn.cpu().double()
    for column, axis in enumerate(axes[:shown]):
        low, high = real[:, column].quantile(torch.tensor([0.001, 0.999], dtype=torch.float64))
        edges = torch.linspace(low, high if high > low else low + 1, bins + 1, dtype=torch.float64)
        for name, values in {"data": real, "samples": drawn}.items():
            counts = torch.histogram(values[:, column].contiguous(), edges).hist
            density = counts / (len(values) * (edges[1] - edges[0]))
            axis.stairs(
                density.numpy(), edges.numpy(), fill=name == "data", label=name, alpha=FILL[name]
            )
        axis.set_title(f"feature {column}" if names is None else names[column], fontsize="medium")
        axis.set_yticks([])
        axis.xaxis.set_major_locator(MaxNLocator(4))
    for axis in axes[shown:]:
        axis.set_axis_off()
    axes[0].legend(frameon=False, fontsize="small")
    return figure


def history(rows: Sequence[Mapping[str, float]]) -> Figure:
    """Loss per epoch, training and validation, and the most telling validation metric."""
    metrics = [name for name in ("val/kl", "val/bits_per_dim") if any(name in row for row in rows)]
    labels = {"val/kl": "KL to the truth, nats", "val/bits_per_dim": "bits per dimension"}
    figure = Figure(figsize=(4.5 * (1 + len(metrics)), 3.4), layout="constrained")
    axes = figure.subplots(1, 1 + len(metrics), squeeze=False)[0]
    marker = "o" if len(rows) == 1 else None  # a line needs two epochs
    for name in ("train/nll", "val/nll"):
        points = [(row["epoch"] + 1, row[name]) for row in rows if name in row]
        axes[0].plot(*zip(*points, strict=True), label=name.split("/")[0], marker=marker)
    axes[0].set(xlabel="epoch", ylabel="negative log-likelihood, nats")
    axes[0].legend(frameon=False)
    for axis, name in zip(axes[1:], metrics, strict=True):
        points = [(row["epoch"] + 1, row[name]) for row in rows if name in row]
        axis.plot(*zip(*points, strict=True), color="C1", marker=marker)
        axis.set(xlabel="epoch", ylabel=f"{labels[name]} (validation)")
        if name == "val/kl" and min(value for _, value in points) > 0:
            axis.set_yscale("log")
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
    return figure
