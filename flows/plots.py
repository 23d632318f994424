"""Pictures of densities, samples and training; needs matplotlib, so import it by name."""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO, Protocol, runtime_checkable

import torch
from matplotlib.axes import Axes
from matplotlib.collections import PolyCollection
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from flows.flow import Flow
from flows.givens import Schedule
from flows.transforms.base import Transform

__all__ = [
    "cells",
    "clouds",
    "densities",
    "density",
    "history",
    "image_grid",
    "image_rows",
    "marginals",
    "planes",
    "points",
    "rounds",
    "samples",
    "save",
]

COLORS = "magma"
DARK = "#3b0f70"
# Rows that a histogram looks at.
MOST = 1_000_000
FILL = {"data": 0.5, "samples": 1.0}


@runtime_checkable
class Density(Protocol):
    """A two-dimensional law that training data come from."""

    extent: tuple[float, float, float, float]

    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor: ...

    def log_prob(self, x: Tensor) -> Tensor: ...


def save(figure: Figure, path: str | Path | BinaryIO) -> None:
    """Write a figure as PNG.

    Args:
        figure: What to write.
        path: A file, replaced if it is there, or a binary stream that is open for writing.

    Example:
        >>> import io
        >>> from matplotlib.figure import Figure
        >>> from flows import plots
        >>> stream = io.BytesIO()
        >>> plots.save(Figure(), stream)
        >>> stream.getvalue()[1:4]
        b'PNG'
    """
    figure.savefig(path, format="png", dpi=110)


@torch.no_grad()
def density(flow: Flow, truth: Density, *, num_samples: int = 5000, pixels: int = 200) -> Figure:
    """Data and samples above, true and learned density below, on the same scales.

    Args:
        flow: A flow of two features.
        truth: The law of its data, such as those of :mod:`datasets.densities`: ``sample``,
            ``log_prob`` and ``extent``, (xmin, xmax, ymin, ymax) of every panel.
        num_samples: Points of each panel above.
        pixels: Points along each side of the panels below.

    Example:
        >>> from datasets.densities import DENSITIES
        >>> from flows import Flow, Rotation, plots
        >>> from flows.distributions import Normal
        >>> flow = Flow(Rotation(2), Normal(2))
        >>> figure = plots.density(flow, DENSITIES["two_moons"], num_samples=100, pixels=20)
        >>> [axis.get_title() for axis in figure.axes[:4]]
        ['data', 'samples', 'true density', 'learned density']
    """
    left, right, bottom, top = truth.extent
    grid = _grid(truth.extent, pixels)
    reference = next(flow.parameters())
    true = truth.log_prob(grid).exp()
    learned = flow.log_prob(grid.to(reference)).exp()
    panel = 3.6 * (top - bottom) / (right - left)
    figure = Figure(figsize=(8.2, 2 * panel + 0.9), layout="constrained")
    axes = figure.subplots(2, 2, sharex=True, sharey=True)
    clouds = {"data": truth.sample(num_samples), "samples": flow.sample(num_samples)}
    for axis, (title, values) in zip(axes[0], clouds.items(), strict=True):
        points(axis, values, title)
    for axis, (title, values) in zip(
        axes[1], {"true density": true, "learned density": learned}.items(), strict=True
    ):
        image = _heat(axis, values, title, truth.extent, most=float(true.max()))
    figure.colorbar(image, ax=axes[1], label="density")
    for axis in axes.flat:
        axis.set(xlim=(left, right), ylim=(bottom, top), aspect="equal")
    return figure


@torch.no_grad()
def densities(
    laws: Mapping[str, Callable[[Tensor], Tensor]],
    extent: tuple[float, float, float, float],
    *,
    pixels: int = 160,
) -> Figure:
    """Densities in the plane beside one another, on the scale of the first.

    Args:
        laws: Title to ``log_prob``, a function of points.
        extent: (xmin, xmax, ymin, ymax) of every panel.
        pixels: Points along each side.

    Shape:
        each law takes points (n, 2) to log densities (n,), in nats

    Example:
        >>> from flows import plots
        >>> from flows.distributions import Normal
        >>> normal, extent = Normal(2), (-3.0, 3.0, -3.0, 3.0)
        >>> laws = {"normal": normal.log_prob, "again": normal.log_prob}
        >>> len(plots.densities(laws, extent, pixels=20).axes)
        2
    """
    left, right, bottom, top = extent
    grid = _grid(extent, pixels)
    values = {title: log_prob(grid).exp() for title, log_prob in laws.items()}
    most = float(next(iter(values.values())).max())
    panel = 2.6 * (top - bottom) / (right - left)
    figure = Figure(figsize=(2.6 * len(values), panel + 0.5), layout="constrained")
    axes = figure.subplots(1, len(values), squeeze=False, sharex=True, sharey=True)[0]
    for axis, (title, value) in zip(axes, values.items(), strict=True):
        _heat(axis, value, title, extent, most=most)
    return figure


def _grid(extent: tuple[float, float, float, float], pixels: int) -> Tensor:
    """Points (pixels * pixels, 2), row by row, the lowest first."""
    left, right, bottom, top = extent
    xs, ys = torch.linspace(left, right, pixels), torch.linspace(bottom, top, pixels)
    return torch.cartesian_prod(ys, xs).flip(1)


def _heat(axis: Axes, values: Tensor, title: str, extent: tuple, *, most: float) -> AxesImage:
    pixels = math.isqrt(len(values))
    shown = values.view(pixels, pixels).cpu().numpy()
    axis.set_title(title)
    return axis.imshow(shown, origin="lower", extent=extent, cmap=COLORS, vmin=0, vmax=most)


@torch.no_grad()
def cells(
    axis: Axes,
    transform: Transform,
    extent: tuple[float, float, float, float],
    title: str,
    *,
    inverse: bool = False,
    across: int = 16,
) -> None:
    """Where a transform of the plane takes the cells of a chessboard.

    Where it preserves volume, all cells keep the same area.

    Args:
        axis: What to draw into.
        transform: Of vectors with two features.
        extent: (xmin, xmax, ymin, ymax) of the board before.
        title: Of the panel.
        inverse: Show the inverse instead.
        across: Cells along each side.

    Example:
        >>> from matplotlib.figure import Figure
        >>> from flows import Rotation, plots
        >>> axis = Figure().subplots()
        >>> board = (-1.0, 1.0, -1.0, 1.0)
        >>> plots.cells(axis, Rotation(2, init="haar"), board, "turned", across=8)
        >>> len(axis.collections[0].get_paths())
        64
    """
    left, right, bottom, top = extent
    # Sides of the unit square, one after the other, fine enough to bend.
    side, zero = torch.linspace(0, 1, 13)[:-1], torch.zeros(12)
    outline = torch.cat(
        [
            torch.stack([side, zero], 1),
            torch.stack([zero + 1, side], 1),
            torch.stack([1 - side, zero + 1], 1),
            torch.stack([zero, 1 - side], 1),
        ]
    )
    corners = torch.cartesian_prod(torch.arange(across), torch.arange(across))
    size = torch.tensor([right - left, top - bottom]) / across
    board = torch.tensor([left, bottom]) + size * (corners[:, None] + outline)
    moved, _ = (transform.inverse if inverse else transform)(board.flatten(0, 1))
    moved = moved.unflatten(0, board.shape[:2])
    shades = ["#fde0c5" if i % 2 else DARK for i in corners.sum(1).tolist()]
    axis.add_collection(PolyCollection(moved.numpy(), facecolors=shades, linewidths=0))
    axis.autoscale_view()
    axis.set(title=title, aspect="equal")


def image_grid(axis: Axes, images: Tensor, title: str, *, columns: int = 8) -> None:
    """Images as a grid, row by row, with thin white gaps.

    Args:
        axis: What to draw into.
        images: At least one, grey (one channel) or in colour (three), in [0, 1]; what is
            outside is clamped.
        title: Of the panel.
        columns: Images beside one another.

    Shape:
        images (n, channels, height, width)

    Raises:
        ValueError: If there are neither one nor three channels.

    Example:
        >>> import torch
        >>> from matplotlib.figure import Figure
        >>> from flows import plots
        >>> axis = Figure().subplots()
        >>> plots.image_grid(axis, torch.zeros(5, 1, 8, 8), "black", columns=3)
        >>> axis.images[0].get_array().shape  # 2 rows of 3, with a pixel between them
        (17, 26)
    """
    rows = -(-len(images) // columns)
    _, channels, height, width = images.shape
    if channels not in (1, 3):
        raise ValueError(f"images must have 1 or 3 channels to be drawn, got {channels}.")
    canvas = torch.ones(channels, rows * (height + 1) - 1, columns * (width + 1) - 1)
    for index, image in enumerate(images.detach().clamp(0, 1).cpu()):
        top, left = index // columns * (height + 1), index % columns * (width + 1)
        canvas[:, top : top + height, left : left + width] = image
    canvas = canvas.movedim(0, -1).squeeze(-1).numpy()
    axis.imshow(canvas, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    axis.set_title(title)
    axis.set_axis_off()


def image_rows(rows: Mapping[str, Tensor], *, grey_levels: int | None = None) -> Figure:
    """Images, a row for each label, which stands on its left.

    Args:
        rows: Label to images, as many as there are; shorter rows end in white.
        grey_levels: As in :func:`samples`.

    Shape:
        each row (n, channels, height, width)

    Example:
        >>> import torch
        >>> from flows import plots
        >>> rows = {"noise": torch.rand(5, 1, 8, 8), "nothing": torch.zeros(3, 1, 8, 8)}
        >>> len(plots.image_rows(rows).axes)
        2
    """
    columns = max(map(len, rows.values()))
    figure = Figure(figsize=(8, 6.4 / columns * len(rows)), layout="constrained")
    axes = figure.subplots(len(rows), 1, squeeze=False)[:, 0]
    for axis, (label, images) in zip(axes, rows.items(), strict=True):
        image_grid(axis, images * _brightness(grey_levels), "", columns=columns)
        axis.text(-0.01, 0.5, label, transform=axis.transAxes, ha="right", va="center")
    return figure


def _brightness(grey_levels: int | None) -> float:
    # Pixels are lower edges of bins: the brightest is (L - 1) / L.
    return 1.0 if grey_levels is None else grey_levels / (grey_levels - 1)


def samples(
    drawn: Tensor,
    real: Tensor | None = None,
    *,
    grey_levels: int | None = None,
    columns: int = 8,
) -> Figure:
    """Samples, beside real data if given: images as grids, two-dimensional vectors as points.

    Args:
        drawn: Samples, at least one.
        real: Data to show on their left, of the same kind; None for samples alone.
        grey_levels: L where pixels are the lower edges k / L of bins, so that the brightest,
            (L - 1) / L, is shown white; None where 1 is white.
        columns: Images beside one another.

    Shape:
        drawn and real (n, channels, height, width) in [0, 1], or (n, 2)

    Example:
        >>> import torch
        >>> from flows import plots
        >>> figure = plots.samples(torch.randn(100, 2), torch.randn(500, 2))
        >>> [axis.get_title() for axis in figure.axes]
        ['data', 'samples']
    """
    panels = {"samples": drawn} if real is None else {"data": real, "samples": drawn}
    figure = Figure(figsize=(4.5 * len(panels), 4.8), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.12)
    axes = figure.subplots(1, len(panels), squeeze=False, sharex=True, sharey=True)[0]
    scale = _brightness(grey_levels)
    for axis, (title, values) in zip(axes, panels.items(), strict=True):
        if values.ndim == 4:
            image_grid(axis, values * scale, title, columns=columns)
        else:
            points(axis, values, title)
    return figure


def points(axis: Axes, values: Tensor, title: str) -> None:
    """Points in the plane, larger where they are few.

    Both axes have one scale, unless one column is at least five times as wide as the other.

    Args:
        axis: What to draw into.
        values: The points, at least one.
        title: Of the panel.

    Shape:
        values (n, 2)

    Example:
        >>> import torch
        >>> from matplotlib.figure import Figure
        >>> from flows import plots
        >>> axis = Figure().subplots()
        >>> plots.points(axis, torch.randn(100, 2), "normal")
        >>> axis.collections[0].get_offsets().shape
        (100, 2)
    """
    values = values.detach()
    x, y = values.cpu().numpy().T
    # Few points would be lost at the size that suits thousands.
    size = max(1.5, min(15, 2000 / max(1, len(values))))
    axis.scatter(x, y, s=size, alpha=0.5, color=DARK, linewidths=0)
    # Columns of very different units would be squeezed into a line.
    width, height = values.amax(0) - values.amin(0)
    comparable = 0.2 < width / height < 5
    axis.set(title=title, aspect="equal" if comparable else "auto")


def clouds(drawn: Tensor, titles: Sequence[str]) -> Figure:
    """Two-dimensional samples, a panel for each row under its title, four panels abreast.

    Args:
        drawn: Samples, such as those of a flow for each row of a context.
        titles: One for each row.

    Shape:
        drawn (rows, n, 2)

    Example:
        >>> import torch
        >>> from flows import plots
        >>> figure = plots.clouds(torch.randn(3, 50, 2), ["a", "b", "c"])
        >>> [axis.get_title() for axis in figure.axes]
        ['a', 'b', 'c']
    """
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
    """Histograms of the first 16 columns of two tables, as densities on the same bins.

    The bins cover all real values but the two outermost thousandths.

    Args:
        drawn: Samples, at least one row.
        real: Data, at least one row.
        names: Titles of the panels, one for each column; their numbers by default.

    Shape:
        drawn (n, features), real (m, features)

    Example:
        >>> import torch
        >>> from flows import plots
        >>> figure = plots.marginals(torch.randn(100, 2), torch.randn(50, 2), ["mass", "charge"])
        >>> [axis.get_title() for axis in figure.axes]
        ['mass', 'charge']
    """
    shown = min(16, real.shape[1])
    bins = min(40, max(10, round(2 * math.sqrt(len(real)))))
    across = min(4, shown)
    down = -(-shown // across)
    figure = Figure(figsize=(2.6 * across, 2.1 * down + 0.3), layout="constrained")
    axes = list(figure.subplots(down, across, squeeze=False).flat)
    # Quantiles are of 16 million numbers at most, and a million is plenty.
    real, drawn = (values[:MOST].detach().cpu().double() for values in (real, drawn))
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
    """Loss per epoch, training and validation, and the most telling validation metrics.

    Args:
        rows: One for each epoch: ``epoch``, counted from 0, and what there is of ``train/nll``,
            ``val/nll`` and ``val/kl`` in nats and ``val/bits_per_dim`` in bits. The last two
            have panels of their own; other names are left out.

    Example:
        >>> from flows import plots
        >>> rows = [{"epoch": 0, "train/nll": 2.0, "val/nll": 2.1, "val/kl": 0.3},
        ...         {"epoch": 1, "train/nll": 1.8, "val/nll": 1.9, "val/kl": 0.1}]
        >>> [axis.get_ylabel() for axis in plots.history(rows).axes]
        ['negative log-likelihood, nats', 'KL to the truth, nats (validation)']
    """
    metrics = [name for name in ("val/kl", "val/bits_per_dim") if any(name in row for row in rows)]
    labels = {"val/kl": "KL to the truth, nats", "val/bits_per_dim": "bits per dimension"}
    figure = Figure(figsize=(4.5 * (1 + len(metrics)), 3.4), layout="constrained")
    axes = figure.subplots(1, 1 + len(metrics), squeeze=False)[0]
    marker = "o" if len(rows) == 1 else None  # a line needs two epochs
    for color, name in {"C0": "train/nll", "C1": "val/nll"}.items():
        points = [(row["epoch"] + 1, row[name]) for row in rows if name in row]
        if points:  # a run that maximizes a bound has no train/nll
            label = name.split("/")[0]
            axes[0].plot(*zip(*points, strict=True), color, label=label, marker=marker)
    axes[0].set(xlabel="epoch", ylabel="negative log-likelihood, nats")
    if axes[0].lines:
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


def rounds(axis: Axes, schedule: Schedule, title: str | None = None) -> None:
    """The rounds of a schedule: a wire for each axis of the space, first round on the left.

    A plane (i, j) is a bar from wire i to wire j. The planes of one round, on one background,
    turn at once; where their bars would cover each other they stand side by side.

    Args:
        axis: What to draw into.
        schedule: What to show.
        title: Of the panel; the schedule and its numbers of planes and rounds by default.

    Example:
        >>> from matplotlib.figure import Figure
        >>> from flows import givens, plots
        >>> axis = Figure().subplots()
        >>> plots.rounds(axis, givens.crossing(8))
        >>> axis.get_title()
        'crossing(8): 28 planes in 11 rounds'
    """
    x = 0.0
    for number, planes in enumerate(schedule.rounds):
        start, lanes = x, []  # the last wire that the bars of a lane reach
        for i, j in sorted(planes):
            lane = next((k for k, last in enumerate(lanes) if last < i), len(lanes))
            lanes[lane : lane + 1] = [j]
            place = start + 0.5 + 0.5 * lane
            axis.plot([place, place], [i, j], color=DARK, marker="o", markersize=3, linewidth=1.2)
        x = start + 0.5 + 0.5 * len(lanes)
        if number % 2 == 0:
            axis.axvspan(start, x, color="#f1e4ef", linewidth=0)
    axis.hlines(range(schedule.dim), 0, x, color="0.75", linewidth=0.7, zorder=0.5)
    if title is None:
        title = f"{schedule}: {schedule.num_angles} planes in {len(schedule)} rounds"
    axis.set_title(title, fontsize="medium")
    axis.set(xlim=(0, x), xticks=[], yticks=range(schedule.dim))
    axis.invert_yaxis()
    axis.spines[:].set_visible(False)
    axis.tick_params(length=0)


def planes(axis: Axes, schedule: Schedule, title: str | None = None) -> None:
    """The planes (i, j) of a schedule as cells in row i and column j, early rounds dark.

    Cells left white are planes that do not turn; a number says how often one turns if that is
    more than once, and its shade is that of the first time.

    Args:
        axis: What to draw into.
        schedule: What to show.
        title: Of the panel; the schedule and its number of planes by default.

    Example:
        >>> from matplotlib.figure import Figure
        >>> from flows import givens, plots
        >>> axis = Figure().subplots()
        >>> plots.planes(axis, givens.crossing(8).frame(3))
        >>> axis.get_title()
        'crossing(8).frame(3): 18 planes'
    """
    n = schedule.dim
    first, times = torch.full((n, n), math.nan), torch.zeros(n, n, dtype=torch.long)
    for number in reversed(range(len(schedule))):
        for i, j in schedule.rounds[number]:
            first[i, j] = number
            times[i, j] += 1
    no_planes = torch.where(torch.ones(n, n).tril() > 0, 0.0, math.nan)
    axis.imshow(no_planes.numpy(), cmap=ListedColormap(["0.9"]))
    axis.imshow(first.numpy(), cmap=COLORS, vmin=0, vmax=1.2 * len(schedule))
    for i, j in (times > 1).nonzero().tolist():
        axis.text(j, i, str(times[i, j].item()), color="white", ha="center", va="center")
    if title is None:
        title = f"{schedule}: {schedule.num_angles} planes"
    axis.set_title(title, fontsize="medium")
    axis.set(xticks=[], yticks=[])
