"""The figure of memory against depth, drawn from the JSON of ``benchmarks.memory``."""

from pathlib import Path

__all__ = ["draw"]

# Okabe and Ito's colours; ours is the strong one.
LINES = {
    "store": ("store", "#777777", "o"),
    "checkpoint": ("checkpoint", "#0072B2", "s"),
    "reversible": ("reversible", "#D55E00", "^"),
}


def draw(content: dict, path: Path) -> None:
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
        for mode, (name, colour, marker) in LINES.items():
            points = [(r["steps"], r[key]) for r in content["rows"] if r["memory"] == mode]
            width = 3 if mode == "reversible" else 1.8
            axes.plot(
                *zip(*points, strict=True),
                color=colour,
                marker=marker,
                linewidth=width,
                label=name,
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
