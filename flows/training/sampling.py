"""Samples from a trained flow, as a picture or as numbers."""

import csv
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn

from flows import plots
from flows.checkpoint import find_checkpoint, read_checkpoint
from flows.checks import check_at_least
from flows.flow import load
from flows.nets import StandardizedContext
from flows.transforms import Standardize

__all__ = ["precise", "read_context", "write_samples"]

# Panels in a picture of points.
PANELS = 16
# Samples drawn at once.
CHUNK = 1000


def write_samples(
    path: str | Path,
    num_samples: int | None = None,
    *,
    labels: Sequence[int] | None = None,
    context: Tensor | None = None,
    temperature: float = 1.0,
    seed: int = 0,
    output: str | Path | None = None,
) -> Path:
    """Draw samples from a run or checkpoint and write them to ``output``.

    Args:
        path: Run folder or checkpoint.
        num_samples: Number of samples, for every label or row of context if there are any;
            64 or, given those, 8 if None.
        labels: Classes to draw from, for a flow that was trained with labels.
        context: Rows to draw given, (rows, context features), for a flow with a context.
        temperature: Multiplies the standard deviation of the noise.
        seed: Seed of the noise.
        output: File ending in .png (images and 2-D points), .npy or .csv; by default a PNG,
            or NPY where there is no picture, beside the checkpoint.

    Shape:
        NPY: (num_samples, ...), with labels or context (rows, num_samples, ...). CSV: a line
        per sample, all samples of the first row first, below the names of a table's columns.
        PNG: a line of images, or a panel of points, for each row.

    Returns:
        The file written.

    Raises:
        ValueError: If the flow draws given something else than it gets, among others.
    """
    path = Path(path).expanduser()
    if num_samples is None:
        num_samples = 64 if labels is None and context is None else 8
    check_at_least(1, num_samples=num_samples)
    if not 0 <= temperature < math.inf:
        raise ValueError(f"temperature must be finite and at least 0, got {temperature}.")
    if output is not None:
        output = Path(output).expanduser()
        if not output.absolute().parent.is_dir():
            raise ValueError(f"output must be in a folder that exists, got {output}.")
        if output.suffix.lower() not in (".png", ".npy", ".csv"):
            raise ValueError(f"output must end in .png, .npy or .csv, got {output.name}.")
    flow = precise(load(path))
    given = _given(flow, labels, context)
    torch.manual_seed(seed)
    samples = _draw(flow, num_samples, given, temperature)
    shape = samples.shape[1 if given is None else 2 :]
    drawable = len(shape) == 3 or shape == (2,)
    if output is None:
        folder = path if path.is_dir() else path.parent
        rows = "" if labels is None else f"-labels-{'-'.join(map(str, labels))}"
        rows = rows if context is None else f"-context-{len(context)}"
        name = f"samples-{num_samples}{rows}-temperature-{temperature:g}-seed-{seed}"
        output = folder / f"{name}{'.png' if drawable else '.npy'}"
    flat = samples if given is None else samples.flatten(0, 1)
    match output.suffix.lower():
        case ".npy":
            with open(output, "wb") as file:  # np.save would change the name x.NPY
                np.save(file, samples.numpy())
        case ".csv":
            fmt = "%.9g" if samples.dtype == torch.float32 else "%.17g"
            with open(output, "w", encoding="utf-8", newline="") as file:
                columns = read_checkpoint(find_checkpoint(path)).get("columns")
                if isinstance(columns, list | tuple):
                    csv.writer(file, lineterminator="\n").writerow(columns)
                np.savetxt(file, flat.flatten(1).numpy(), delimiter=",", fmt=fmt)
        case ".png" if drawable:
            plots.save(_picture(flow, samples, labels, given), output)
        case _:
            kinds = ".png, .npy or .csv" if drawable else ".npy or .csv"
            raise ValueError(f"output must end in {kinds}, got {output.name}.")
    return output


@torch.no_grad()
def _draw(flow: nn.Module, n: int, given: Tensor | None, temperature: float) -> Tensor:
    """As ``flow.sample``, some at a time and with a progress bar where there are many."""
    size = CHUNK if given is None else max(1, CHUNK // len(given))
    sizes = [min(size, n - start) for start in range(0, n, size)]
    bar = track(
        sizes,
        description="sampling",
        console=Console(stderr=True),
        transient=True,
        disable=len(sizes) == 1,
    )
    parts = [flow.sample(size, given, temperature=temperature) for size in bar]
    return torch.cat(parts, dim=0 if given is None else 1)


def precise(flow: nn.Module) -> nn.Module:
    """In float64 if float32 cannot hold the digits of its samples, as of times in seconds."""
    eps = torch.finfo(torch.float32).eps
    for layer in flow.modules():
        if (
            isinstance(layer, Standardize)
            and (layer.mean.abs() * eps > 1e-4 * layer.deviation).any()
        ):
            return flow.double()
    return flow


def read_context(path: str | Path) -> Tensor:
    """Rows of context, float64 (rows, columns), from .npy, or .csv with or without a header.

    Raises:
        ValueError: If there is no table of finite numbers in it.
    """
    path = Path(path).expanduser()
    try:
        match path.suffix.lower():
            case ".npy":
                # On disk, where a header that claims too much costs no memory.
                table = np.load(path, allow_pickle=False, mmap_mode="r")
            case ".csv":
                table = _read_csv(path)
            case _:
                raise ValueError("the name must end in .npy or .csv")
        context = torch.from_numpy(np.array(table, dtype=np.float64))
    except OSError:
        raise
    except Exception as error:  # a damaged header is Python code to numpy's reader
        reason = " ".join(str(error).split())
        raise ValueError(f"{path} is no table of numbers: {reason}.") from None
    if context.ndim != 2 or not len(context) or not context.isfinite().all():
        raise ValueError(
            f"{path} must hold finite numbers in rows and columns, got shape "
            f"{tuple(context.shape)}{'' if context.isfinite().all() else ' with NaN or inf'}."
        )
    return context


def _read_csv(path: Path) -> list[list[float]]:
    # A spreadsheet's byte-order mark would make a name of the first number.
    with open(path, encoding="utf-8-sig") as file:
        lines = [(n, line.strip().split(",")) for n, line in enumerate(file, 1) if line.strip()]
    if lines and not any(map(_is_number, lines[0][1])):
        lines = lines[1:]  # names of the columns
    if not lines:
        raise ValueError("it has no row")
    columns = len(lines[0][1])
    for number, cells in lines:
        if len(cells) != columns or not all(map(_is_number, cells)):
            line = ",".join(cells)[:80]
            raise ValueError(f"expected {columns} numbers in line {number}, got {line!r}")
    return [[float(cell) for cell in cells] for _, cells in lines]


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _given(flow: nn.Module, labels: Sequence[int] | None, context: Tensor | None) -> Tensor | None:
    """What to draw given, once it is what this flow needs."""
    classes = getattr(getattr(flow, "embedding_net", None), "classes", None)
    got = [n for n, v in {"labels": labels, "context": context}.items() if v is not None]
    needs = "labels" if classes is not None else "context" if _needs_context(flow) else None
    if got != ([] if needs is None else [needs]):
        how = {
            "labels": f"draws given labels, 0 to {(classes or 0) - 1}: name them with --labels",
            "context": "draws given a context: name a file of its rows with --context",
            None: "draws without labels or context",
        }
        raise ValueError(f"this flow {how[needs]}; got {' and '.join(got) or 'neither'}.")
    if needs is None:
        return None
    if needs == "context":
        # Units are taken off in float64; other layers know their own dtype alone.
        in_units = isinstance(getattr(flow, "embedding_net", None), StandardizedContext)
        return context if in_units else context.to(next(flow.parameters()).dtype)
    wrong = [label for label in labels if not 0 <= label < classes]
    if wrong or not labels:
        raise ValueError(f"labels must be 0 to {classes - 1}, got {wrong or 'none'}.")
    return torch.tensor(labels)


def _needs_context(flow: nn.Module) -> bool:
    """Conditioners with a context insist on it."""
    try:
        with torch.no_grad():
            flow.sample(1)
    except ValueError:
        return True
    return False


def _picture(
    flow: nn.Module, samples: Tensor, labels: Sequence[int] | None, given: Tensor | None
) -> Figure:
    levels = {m.grey_levels for m in flow.modules() if hasattr(m, "grey_levels")}
    grey_levels = levels.pop() if levels else None
    if given is None:
        return plots.samples(samples, grey_levels=grey_levels)
    if samples.ndim > 3:
        images = samples.flatten(0, 1)
        return plots.samples(images, grey_levels=grey_levels, columns=samples.shape[1])
    if len(samples) > PANELS:
        raise ValueError(
            f"a picture has {PANELS} panels, got {len(samples)} rows: write .npy or .csv."
        )
    titles = labels if labels is not None else given.tolist()
    return plots.clouds(samples, [f"given {title}" for title in titles])
