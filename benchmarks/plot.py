"""Figures drawn from the JSON that the benchmarks write."""

import math
from pathlib import Path

from benchmarks.report import IMAGES

__all__ = [
    "draw",
    "draw_images",
    "draw_memory",
    "draw_optimizers",
    "draw_randomized",
    "draw_toy_densities",
]

# Okabe and Ito's colours, told apart by every kind of eye; ours are the strong ones.
LINES = {
    "crossing, auto": ("ours, crossing", "#D55E00", "o"),
    "cosine_sine, auto": ("ours, cosine-sine", "#0072B2", "s"),
    "our CWY": ("ours, reflections (CWY)", "#009E73", "^"),
    "torch cayley": ("torch cayley", "#777777", "v"),
    "torch matrix_exp": ("torch matrix_exp", "#CC79A7", "D"),
    "torch householder": ("torch householder", "#9A7400", "P"),
    "GeoTorch expm": ("GeoTorch expm", "#7A4A66", "x"),
    "GeoTorch cayley": ("GeoTorch cayley", "#444444", "+"),
    "nflows Householder": ("nflows Householder", "#2A8FC7", "<"),
    "loop over rounds": ("loop over rounds", "#000000", "*"),
}
BOLD = ("crossing, auto", "cosine_sine, auto")
FLOWS = {
    "ours": ("#D55E00", "o"),
    "zuko NSF": ("#0072B2", "s"),
    "nflows NSF": ("#009E73", "^"),
    "normflows NSF": ("#9A7400", "D"),
    "zuko MAF": ("#777777", "v"),
}
LIBRARIES = {"ours": "#D55E00", "normflows": "#0072B2", "nflows": "#009E73"}
MEMORY = {
    "store": ("#777777", "o"),
    "checkpoint": ("#0072B2", "s"),
    "reversible": ("#D55E00", "^"),
}
RANDOMIZED = {
    "per sample": ("a part of each row", "#D55E00", "^"),
    "shared": ("the same part of all rows", "#0072B2", "s"),
    "smaller batch": ("all of fewer rows", "#777777", "o"),
}
OPTIMIZERS = {
    "AdamW": "#000000",
    "Adam": "#777777",
    "Muon": "#009E73",
    "NG+": "#D55E00",
    "SENG": "#0072B2",
    "ProxProp": "#CC79A7",
}
SCORES = {
    "two_moons": "two moons, KL in nats",
    "checkerboard": "checkerboard, KL in nats",
    "breast_cancer": "breast cancer, nats above the best",
    "digits": "digits, bits per dimension",
}


def draw(content: dict, path: Path) -> None:
    """One line per method: a step's time over that with a plain dense weight, against n."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    rows = [row for row in content["rows"] if "step_ratio" in row]
    figure, axes = plt.subplots(figsize=(8, 5.4), dpi=150, layout="constrained")
    ends = []
    for method, (label, colour, marker) in LINES.items():
        points = sorted((row["n"], row["step_ratio"]) for row in rows if row["method"] == method)
        if not points:
            continue
        bold = method in BOLD
        axes.plot(
            *zip(*points, strict=True),
            color=colour,
            marker=marker,
            linewidth=3.2 if bold else 1.3,
            markersize=7 if bold else 4.5,
            zorder=3 if bold else 2,
        )
        ends.append([*points[-1], label, colour, bold])
    axes.axhline(1, color="black", linewidth=1, linestyle=":")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    sizes = sorted({row["n"] for row in rows})
    shown = [n for n in sizes if n not in (64, 192, 768)] if len(sizes) > 6 else sizes
    axes.set_xticks(shown, map(str, shown))
    axes.minorticks_off()
    axes.tick_params(labelsize=11)
    axes.yaxis.set_major_formatter(lambda y, _: f"{y:g}")
    axes.set_xlabel("size n of the matrix", fontsize=12)
    axes.set_ylabel("time of a training step,\ntimes a plain dense weight's", fontsize=12)
    axes.grid(axis="y", color="0.9")
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title(
        f"Orthogonal weights, forward and backward, batch {content['batch']}\n"
        f"{content['device']}, float32, torch {content['versions']['torch']}",
        fontsize=12,
        loc="left",
    )
    _label_ends(axes, ends, right=sizes[-1])
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    plt.close(figure)


def draw_toy_densities(content: dict, chosen: dict[tuple[str, str], dict], path: Path) -> None:
    """One line per density, one mark per model: its divergence from the truth, log scale.

    Args:
        content: The JSON.
        chosen: The run to show, by density and model.
        path: File of the figure.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    densities = list(dict.fromkeys(density for density, _ in chosen))
    seconds = content["rows"][0]["seconds"]
    height = 1.6 + 0.42 * len(densities)
    figure, axes = plt.subplots(figsize=(8, height), dpi=150, layout="constrained")
    for model, (colour, marker) in FLOWS.items():
        points = [(chosen.get((density, model)), k) for k, density in enumerate(densities)]
        points = [(row["kl"], k) for row, k in points if row]
        if not points:
            continue
        axes.plot(
            *zip(*points, strict=True),
            linestyle="",
            color=colour,
            marker=marker,
            markersize=10 if model == "ours" else 6.5,
            zorder=3 if model == "ours" else 2,
            label=model,
        )
    axes.set_xscale("log")
    axes.set_yticks(range(len(densities)), [name.replace("_", " ") for name in densities])
    axes.invert_yaxis()
    axes.tick_params(labelsize=11)
    axes.xaxis.set_major_formatter(lambda x, _: f"{x:g}")
    axes.set_xlabel("KL to the truth, nats (log scale; left is better)", fontsize=12)
    axes.grid(axis="y", color="0.88")
    axes.grid(axis="x", color="0.93")
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    seeds = len({row["seed"] for row in content["rows"]})
    median = f", median of {seeds} seeds" * (seeds > 1)
    axes.set_title(
        f"Densities in the plane after {seconds:g} s of training{median}\n{content['device']}",
        fontsize=12,
        loc="left",
    )
    figure.legend(loc="outside lower center", ncols=len(FLOWS), frameon=False, fontsize=11)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    plt.close(figure)


def draw_memory(content: dict, path: Path) -> None:
    """A line for each mode: memory of a training step on the left, its time on the right."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    panels = {
        "peak_mib": "MiB beyond parameters\nand gradients",
        "step_over_store": "time of a step,\ntimes that of store",
    }
    figure, row = plt.subplots(1, 2, figsize=(9, 3.8), dpi=150, layout="constrained")
    depths = sorted({r["steps"] for r in content["rows"]})
    for axes, (key, label) in zip(row, panels.items(), strict=True):
        for mode, (colour, marker) in MEMORY.items():
            points = [(r["steps"], r[key]) for r in content["rows"] if r["memory"] == mode]
            width = 3 if mode == "reversible" else 1.8
            axes.plot(
                *zip(*points, strict=True),
                color=colour,
                marker=marker,
                linewidth=width,
                label=mode,
            )
        axes.set_xlabel("steps per level", fontsize=11)
        axes.set_ylabel(label, fontsize=11)
        axes.set_xticks(depths)
        axes.set_ylim(bottom=0)
        axes.grid(axis="y", color="0.9")
        axes.spines[["top", "right"]].set_visible(False)
    row[0].legend(frameon=False, fontsize=11, loc="upper left")
    figure.suptitle(
        f"A training step of Glow, {content['batch']} images of 28 x 28, "
        f"{content['device']}, torch {content['versions']['torch']}",
        fontsize=11,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    plt.close(figure)


def draw_images(content: dict, path: Path) -> None:
    """A panel for each data set: validation bits/dim against minutes of training."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    rows = [row for row in content["rows"] if "error" not in row]
    sets = list(dict.fromkeys(row["data"] for row in rows))
    figure, panels = plt.subplots(
        1, len(sets), figsize=(4.8 * len(sets), 4), dpi=150, layout="constrained", squeeze=False
    )
    for axes, data in zip(panels[0], sets, strict=True):
        found = [row for row in rows if row["data"] == data and row["curve"]]
        for row in found:
            seconds, values = zip(*row["curve"], strict=True)
            minutes = [value / 60 for value in seconds]
            bold = row["model"] == "ours"
            axes.plot(
                minutes,
                values,
                color=LIBRARIES[row["model"]],
                linewidth=3 if bold else 1.5,
                label=f"{row['model']}, test {row['test_bits_per_dim']:.2f}",
            )
        # The first validations of some models are so high that the rest would be one line.
        low = min((min(v for _, v in row["curve"]) for row in found), default=0.0)
        high = max((sorted(v for _, v in row["curve"])[-2:][0] for row in found), default=1.0)
        margin = 0.05 * (high - low) or 0.05
        axes.set_ylim(low - margin, high + margin)
        axes.set_title(IMAGES[data], loc="left")
        axes.set_xlabel("minutes of training")
        axes.grid(axis="y", color="0.9")
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False)
    panels[0][0].set_ylabel("validation bits/dim, lower is better")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    plt.close(figure)


def draw_randomized(content: dict, path: Path) -> None:
    """A panel for each flow: loss against what a step keeps, a line for each way to keep less."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    flows = list(dict.fromkeys(row["flow"] for row in content["rows"]))
    figure, panels = plt.subplots(
        1,
        len(flows),
        figsize=(4.8 * len(flows), 4.2),
        dpi=150,
        layout="constrained",
        squeeze=False,
    )
    for axes, flow in zip(panels[0], flows, strict=True):
        rows = [row for row in content["rows"] if row["flow"] == flow and row.get("losses")]
        exact = next(row for row in rows if row["method"] == "exact")
        for method, (label, colour, marker) in RANDOMIZED.items():
            found = sorted(
                (row for row in rows if row["method"] == method), key=lambda row: row["saved_mib"]
            )
            found.append(exact)
            axes.plot(
                [row["saved_mib"] for row in found],
                [row["loss"] for row in found],
                color=colour,
                marker=marker,
                linewidth=2.4 if method == "per sample" else 1.6,
                label=label,
            )
            for row in found[:-1]:
                low, high = min(row["losses"]), max(row["losses"])
                axes.plot([row["saved_mib"]] * 2, [low, high], color=colour, linewidth=1, zorder=1)
        again = {row["method"]: row for row in content["rows"] if row["flow"] == flow}[
            "checkpoint"
        ]
        star = {"linestyle": "", "marker": "*", "color": "black", "markersize": 14, "zorder": 4}
        axes.plot(exact["saved_mib"], exact["loss"], **star, label="everything")
        # Repeating the layers gives the same gradients, and so the same loss.
        star |= {"markerfacecolor": "white", "clip_on": False}
        label = "checkpoint: layers repeated"
        axes.plot(again["saved_mib"], exact["loss"], **star, label=label)
        axes.set_xlim(left=0)
        axes.set_title(f"{flow.replace('_', ' ')}, {exact['steps']} steps", loc="left")
        axes.set_xlabel("MiB kept for the backward pass", fontsize=11)
        axes.set_ylabel(f"{exact['unit']}, lower is better", fontsize=11)
        axes.grid(axis="y", color="0.9")
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False, fontsize=11)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    plt.close(figure)


def draw_optimizers(content: dict, chosen: dict[tuple[str, str, str], dict], path: Path) -> None:
    """A panel for each task: the validation score of each optimizer against the seconds."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    tasks = [task for task in SCORES if any(key[0] == task for key in chosen)]
    figure, grid = plt.subplots(
        1,
        len(tasks),
        figsize=(4.2 * len(tasks), 4.2),
        dpi=150,
        layout="constrained",
        squeeze=False,
    )
    for axes, task in zip(grid[0], tasks, strict=True):
        curves = {
            name: chosen[task, "time", name]["curve"]
            for name in OPTIMIZERS
            if (task, "time", name) in chosen
        }
        lowest = min(loss for curve in curves.values() for _, loss in curve)
        below = lowest - 0.1 if task == "breast_cancer" else 0.0
        for name, curve in curves.items():
            seconds, losses = zip(*curve, strict=True)
            bold = name in ("NG+", "AdamW")
            axes.plot(
                seconds,
                [loss - below for loss in losses],
                color=OPTIMIZERS[name],
                linewidth=2.6 if bold else 1.5,
                label=name,
                zorder=3 if bold else 2,
            )
        if task != "digits":
            axes.set_yscale("log")
        else:
            axes.set_ylim(lowest - 0.01, lowest + 0.35)
        axes.set_title(SCORES[task], fontsize=12, loc="left")
        axes.set_xlabel("seconds", fontsize=11)
        axes.grid(axis="y", color="0.9")
        axes.spines[["top", "right"]].set_visible(False)
    grid[0][0].set_ylabel("validation score, lower is better", fontsize=11)
    grid[0][-1].legend(frameon=False, fontsize=11)
    figure.suptitle(
        "Optimizers on our flows after equal time, median of "
        f"{len({row['seed'] for row in content['rows']})} seeds, {content['device']}",
        fontsize=12,
        x=0.01,
        ha="left",
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    plt.close(figure)


def _label_ends(axes, ends: list[list], *, right: int) -> None:
    """Names right of the plot in the order of the ends, apart from one another."""
    low, high = map(math.log, axes.get_ylim())
    gap = (high - low) / 19
    ends.append([right, 1.0, "plain dense weight", "black", False])
    ends.sort(key=lambda end: end[1])
    heights = [math.log(end[1]) for end in ends]
    for _ in range(200):  # neighbours push each other away, half of the overlap each
        for k in range(1, len(heights)):
            overlap = heights[k - 1] + gap - heights[k]
            if overlap > 0:
                heights[k - 1] -= overlap / 2
                heights[k] += overlap / 2
    for (n, ratio, label, colour, bold), height in zip(ends, heights, strict=True):
        axes.annotate(
            label,
            xy=(n, ratio),
            xytext=(right * 1.35, math.exp(height)),
            color=colour,
            fontsize=11,
            fontweight="bold" if bold else "normal",
            va="center",
            annotation_clip=False,
            arrowprops={
                "arrowstyle": "-",
                "color": colour,
                "linewidth": 0.6,
                "alpha": 0.6,
                "relpos": (0, 0.5),
                "shrinkA": 0,
            },
        )
