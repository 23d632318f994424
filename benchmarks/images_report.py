"""Table and figure of ``benchmarks.images``."""

from pathlib import Path

from benchmarks.report import _console, _table

__all__ = ["draw", "show"]

NAMES = {"digits": "Digits, 8x8, 17 grey levels", "fashion_mnist": "Fashion-MNIST, 28x28"}
# Okabe and Ito's colours, as in plot.py.
COLOURS = {"ours": "#D55E00", "normflows": "#0072B2", "nflows": "#009E73"}


def show(rows: list[dict]) -> None:
    """For each data set a table, a line for each model."""
    console = _console()
    heads = ["", "test bits/dim", "val", "steps", "ms a step", "parameters", "|x - inverse|"]
    for data in dict.fromkeys(row["data"] for row in rows):
        minutes = next(row["minutes"] for row in rows if row["data"] == data)
        table = _table(console, f"{NAMES[data]}, {minutes:g} minutes of training", heads)
        for row in rows:
            if row["data"] != data or "error" in row:
                continue
            table.add_row(
                row["model"],
                f"{row['test_bits_per_dim']:.3f} ± {row['test_error']:.3f}",
                f"{row['val_bits_per_dim']:.3f}",
                f"{row['steps']:,}",
                f"{1e3 * row['wall_seconds'] / max(1, row['steps']):.0f}",
                f"{row['parameters']:,}",
                f"{row['inverse_error']:.0e}",
            )
        console.print(table)
    for row in rows:
        if "error" in row:
            text = f"left out: {row['model']}, {row['data']}: {row['error']}"
            console.print(text, style="dim", highlight=False, markup=False, soft_wrap=True)


def draw(content: dict, path: Path) -> None:
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
                color=COLOURS[row["model"]],
                linewidth=3 if bold else 1.5,
                label=f"{row['model']}, test {row['test_bits_per_dim']:.2f}",
            )
        # The first validations of some models are so high that the rest would be one line.
        low = min((min(v for _, v in row["curve"]) for row in found), default=0.0)
        high = max((sorted(v for _, v in row["curve"])[-2:][0] for row in found), default=1.0)
        axes.set_ylim(low - 0.05 * (high - low), high + 0.05 * (high - low))
        axes.set_title(NAMES[data], loc="left")
        axes.set_xlabel("minutes of training")
        axes.grid(axis="y", color="0.9")
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False)
    panels[0][0].set_ylabel("validation bits/dim, lower is better")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    plt.close(figure)
