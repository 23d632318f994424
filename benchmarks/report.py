"""Tables on the screen."""

import statistics

from rich import box
from rich.console import Console
from rich.table import Table

from flows.givens import IMPLS

__all__ = [
    "IMAGES",
    "show",
    "show_images",
    "show_memory",
    "show_optimizer_cost",
    "show_optimizers",
    "show_mixing",
    "show_paper",
    "show_randomized",
    "show_samples",
    "show_splines",
    "show_steps",
    "show_stress",
    "show_toy_densities",
]

OURS = ("crossing", "cosine_sine", "odd_even", "our CWY")
RATIOS = {
    "step": "Training step over one with a plain dense weight",
    "forward": "Matrix, forward, over one dense product",
    "forward_backward": "Matrix, forward and backward, over three dense products",
}
MODES = ("forward", "forward_backward")
SPLINE_MODES = {
    "forward": "Splines, forward",
    "forward_backward": "Splines, forward and backward",
    "inverse": "Splines, inverse",
}
IMAGES = {"digits": "Digits, 8x8, 17 grey levels", "fashion_mnist": "Fashion-MNIST, 28x28"}
EMPTY = "·"


def show(rows: list[dict], device: str) -> None:
    """Three tables of ratios, one of memory and errors, then why cells are empty."""
    console = _console()
    sizes = sorted({row["n"] for row in rows})
    names = list(dict.fromkeys(row["method"] for row in rows))
    cells = {(row["method"], row["n"]): row for row in rows}
    for mode, title in RATIOS.items():
        table = _table(console, f"{title}, {device}; lower is better", ["n =", *map(str, sizes)])
        for name in names:
            cols = [_ratio(cells.get((name, n), {}), mode) for n in sizes]
            if any(col != EMPTY for col in cols) and not (mode != "step" and "plain" in name):
                table.add_row(name, *cols, style="bold" if name.startswith(OURS) else "")
        unit = "step_ms" if mode == "step" else "product_ms"
        floor = [_number(cells.get((names[0], n), {}).get(unit)) for n in sizes]
        table.add_row(f"the unit, ms{' (x 3)' if mode == 'forward_backward' else ''}", *floor)
        ahead = [_ahead([row for row in rows if row["n"] == n], f"{mode}_ratio") for n in sizes]
        table.add_row("fastest other / our auto", *ahead)
        console.print(table)
    heads = ["at the largest n measured", "n", "peak MiB", "|UU'-I|", "in float64", "gradient"]
    table = _table(
        console, "Memory of a step, largest error of the matrix and its gradient", heads
    )
    for name in names:
        found = [row for row in rows if row["method"] == name and "step_ms" in row]
        if found:
            row = max(found, key=lambda row: row["n"])
            keys = ("orthogonality_float32", "orthogonality_float64", "gradient_error")
            numbers = [_exponent(row.get(key)) for key in keys]
            table.add_row(name, str(row["n"]), _number(row.get("step_peak_mib")), *numbers)
    console.print(table)
    _left_out(console, rows, "n")


def show_samples(rows: list[dict], device: str) -> None:
    """Rotations with angles per sample: a section for each schedule, a line for each method."""
    console = _console()
    heads = ["", "forward ms", "/ copy", "/ loop", "f + b ms", "/ copy", "/ loop", "saved MiB"]
    table = _table(console, f"One set of angles per sample, {device}", heads)
    before = None
    for row in rows:
        group = f"{row['schedule']}, {row['samples']} samples"
        if group != before:
            table.add_section()
            table.add_row(group, style="italic")
        before = group
        keys = [f"{m}_{k}" for m in MODES for k in ("ms", "over_copy", "over_loop")]
        cols = [_number(row.get(key)) for key in (*keys, "saved_mib")]
        if all(col == EMPTY for col in cols):
            continue
        ours = row["method"] in IMPLS
        table.add_row(f"  {row['method']}", *cols, style="bold" if ours else "")
    console.print(table)
    _left_out(console, rows, "schedule")


def show_splines(rows: list[dict], device: str) -> None:
    """For each way of timing a table: a line for each case, a column for each method.

    The first method is ours, over whose times the others stand.
    """
    console = _console()
    ours, *names = dict.fromkeys(row["method"] for row in rows)
    cases: dict[tuple, dict[str, dict]] = {}
    for row in rows:
        case = row["kind"], tuple(row["shape"]), row["bins"]
        cases.setdefault(case, {})[row["method"]] = row
    for mode, title in SPLINE_MODES.items():
        heads = ["inputs", "bins", f"{ours}, ms", *names]
        table = _table(console, f"{title}, {device}: times over ours", heads)
        before = None
        for (kind, shape, bins), found in cases.items():
            if kind != before:
                table.add_section()
                table.add_row(kind, style="italic")
            before = kind
            times = [found.get(name, {}).get(f"{mode}_over_ours") for name in names]
            cells = [_number(found[ours].get(f"{mode}_ms")), *map(_number, times)]
            table.add_row("  " + " x ".join(map(str, shape)), str(bins), *cells)
        console.print(table)
    _left_out(console, rows, "shape")


def show_memory(rows: list[dict], device: str) -> None:
    """A line for each depth and way to keep inputs."""
    console = _console()
    heads = ["", "MiB", "per step", "/ store", "ms", "/ store"]
    heads += ["gradient error", "inversion error"]
    table = _table(
        console,
        f"A training step of Glow: peak, growth per step and level, time; {device}",
        heads,
    )
    before = None
    for row in rows:
        if row["steps"] != before:
            table.add_section()
            table.add_row(f"{row['steps']} steps", style="italic")
        before = row["steps"]
        keys = ("peak_mib", "mib_per_more_step", "growth_over_store", "step_ms", "step_over_store")
        cells = [_number(row.get(key)) for key in keys]
        cells += [_exponent(row.get(key)) for key in ("gradient_error", "inversion_error")]
        style = "bold" if row["memory"] == "reversible" else ""
        table.add_row(f"  {row['memory']}", *cells, style=style)
    console.print(table)


def show_steps(rows: list[dict], device: str) -> None:
    """A line for each architecture, a column for each library."""
    console = _console()
    names = list(dict.fromkeys(row["method"] for row in rows))
    cases = list(dict.fromkeys(row["case"] for row in rows))
    heads = ["", *names, *(f"over {name}" for name in names[1:])]
    table = _table(console, f"Training steps per second, and ours over theirs, {device}", heads)
    for case in cases:
        found = {row["method"]: row for row in rows if row["case"] == case}
        rates = [_number(found[name].get("steps_per_second")) for name in names]
        leads = [_number(found[name].get("ours_over_this")) for name in names[1:]]
        table.add_row(case, *rates, *leads)
    console.print(table)
    _left_out(console, rows, "case")


def show_stress(rows: list[dict]) -> None:
    """A line for each promise, then what went wrong."""
    console = _console(160)
    heads = ["", "result", "asked", "", "seconds"]
    table = _table(console, "Promises, tried at length", heads)
    for row in rows:
        verdict = "kept" if row["ok"] else "BROKEN"
        style = "" if row["ok"] else "bold red"
        cells = (row["what"], row["result"], row["asked"], verdict, _number(row["seconds"]))
        table.add_row(*cells, style=style)
    console.print(table)
    for row in rows:
        for wrong in row.get("wrong", []):
            console.print(f"{row['what']}: {wrong}", highlight=False, markup=False)


def show_toy_densities(rows: list[dict], chosen: dict[tuple[str, str], dict], device: str) -> None:
    """A line for each density, a column for each model; then what went wrong.

    Args:
        rows: All runs.
        chosen: The run to show, by density and model.
        device: Name for the title.
    """
    console = _console(130)
    ours, *others = dict.fromkeys(row["model"] for row in rows)
    seeds = len({row["seed"] for row in rows})
    clock = rows[0]["clock"]
    title = (
        f"KL to the truth in 0.001 nats after {rows[0]['seconds']:g} s of {clock} time, {device}"
    )
    title += f", median of {seeds} seeds" * (seeds > 1)
    table = _table(console, title, ["", ours, *others, "best other / ours"])
    for density in dict.fromkeys(row["density"] for row in rows):
        found = [chosen.get((density, name)) for name in (ours, *others)]
        cells = [_with_error(row["kl"], row["standard_error"]) if row else EMPTY for row in found]
        peers = [row["kl"] for row in found[1:] if row]
        lead = min(peers) / found[0]["kl"] if found[0] and peers else None
        table.add_row(density, *cells, _number(lead))
    console.print(table)
    for row in rows:
        if "error" in row:
            text = f"failed: {row['model']}, {row['density']}, seed {row['seed']}: {row['error']}"
            console.print(text, style="dim", highlight=False, markup=False, soft_wrap=True)


def show_images(rows: list[dict]) -> None:
    """For each data set a table, a line for each model."""
    console = _console()
    heads = ["", "test bits/dim", "val", "steps", "ms a step", "parameters", "|x - inverse|"]
    for data in dict.fromkeys(row["data"] for row in rows):
        minutes = next(row["minutes"] for row in rows if row["data"] == data)
        table = _table(console, f"{IMAGES[data]}, {minutes:g} minutes of training", heads)
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


def show_optimizers(
    rows: list[dict], chosen: dict[tuple[str, str, str], dict], device: str
) -> None:
    """For each budget a table: a line for each task, a column for each optimizer.

    Median over seeds of the score on the test split, with lowest and highest below.
    """
    console = _console()
    names = list(dict.fromkeys(row["optimizer"] for row in rows))
    for budget in dict.fromkeys(row["budget"] for row in rows):
        table = _table(console, f"After equal {budget}, {device}; lower is better", ["", *names])
        for task in dict.fromkeys(row["task"] for row in rows):
            found = [chosen.get((task, budget, name)) for name in names]
            scores = [row["test"] for row in found if row is not None]
            if not scores:
                continue
            digits = 4 if abs(min(scores)) < 1 else 3
            cells, spans = [], []
            for name, row in zip(names, found, strict=True):
                own = [
                    other["test"]
                    for other in rows
                    if (other["task"], other["budget"], other["optimizer"]) == (task, budget, name)
                    and "test" in other
                ]
                cells.append(EMPTY if row is None else f"{row['test']:.{digits}f}")
                spans.append(
                    "" if row is None else f"{min(own):.{digits}f}..{max(own):.{digits}f}"
                )
            first = next(row for row in found if row is not None)
            spent = f"{first['seconds']:g} s" if budget == "time" else f"{first['steps']:,} steps"
            table.add_row(task, *cells, style="bold")
            table.add_row(f"  {spent}", *spans, style="dim")
        console.print(table)
    for row in rows:
        if "error" in row:
            text = (
                f"left out: {row['optimizer']}, {row['task']}, seed {row['seed']}: {row['error']}"
            )
            console.print(text, style="dim", highlight=False, markup=False, soft_wrap=True)


def show_optimizer_cost(rows: list[dict], device: str) -> None:
    """A line for each optimizer."""
    console = _console()
    title = f"Training step of Glow on digits, {device}"
    table = _table(console, title, ["", "ms", "over AdamW's"])
    for row in rows:
        table.add_row(row["optimizer"], _number(row["step_ms"]), f"{row['over_adamw']:.3f}")
    console.print(table)


def show_mixing(rows: list[dict], device: str) -> None:
    """For each data set a table, a line for each mixing: median and range over the seeds."""
    console = _console()
    for data in dict.fromkeys(row["data"] for row in rows):
        found = [row for row in rows if row["data"] == data]
        digits = data == "digits"
        what = "test bits/dim" if digits else "KL in 0.001 nats"
        seconds, clock = found[0]["seconds"], found[0]["clock"]
        title = f"{data}: {what} after {seconds:g} s of {clock} time, {device}"
        heads = ["", f"median of {len({row['seed'] for row in found})} seeds", "least", "most"]
        table = _table(console, title, [*heads, "steps a second", "parameters"])
        for mixing in dict.fromkeys(row["mixing"] for row in found):
            done = [row for row in found if row["mixing"] == mixing and "loss" in row]
            if not done:
                continue
            losses = [row["loss"] if digits else 1e3 * row["loss"] for row in done]
            numbers = statistics.median_low(losses), min(losses), max(losses)
            # All runs took the same time, by the clock.
            rate = statistics.median(row["steps"] for row in done) / seconds
            cells = [f"{number:.{3 if digits else 2}f}" for number in numbers]
            table.add_row(mixing, *cells, _number(rate), f"{done[0]['parameters']:,}")
        console.print(table)
    for row in rows:
        if "error" in row:
            text = f"failed: {row['mixing']}, {row['data']}, seed {row['seed']}: {row['error']}"
            console.print(text, style="dim", highlight=False, markup=False, soft_wrap=True)


def show_paper(rows: list[dict]) -> None:
    """Randomized layers: for each network a line of the paper, of its count and of ours."""
    console = _console()
    keeps = list(dict.fromkeys(row["keep"] for row in rows))
    heads = ["kept", *(f"{keep:g}" for keep in keeps)]
    table = _table(console, "MB of a step on 150 rows, with weights", heads)
    for network in dict.fromkeys(row["network"] for row in rows):
        table.add_section()
        table.add_row(network, style="italic")
        found = {row["keep"]: row for row in rows if row["network"] == network}
        kinds = {"paper": "the paper's", "accounted": "its count", "measured": "our layers keep"}
        for kind, label in kinds.items():
            table.add_row(f"  {label}", *(f"{found[k][f'{kind}_mb']:.2f}" for k in keeps))
    console.print(table)


def show_randomized(rows: list[dict], device: str) -> None:
    """For each flow a table, a line for each way and part to keep."""
    console = _console()
    heads = ["", "part", "batch", "kept MiB", "peak MiB", "step / exact", "loss", "of all seeds"]
    for flow in dict.fromkeys(row["flow"] for row in rows):
        found = [row for row in rows if row["flow"] == flow]
        heads[6] = found[0]["unit"]
        title = f"{flow.replace('_', ' ')}, {found[0]['steps']} steps, {device}"
        table = _table(console, title, heads)
        before = None
        for row in found:
            if row["method"] != before:
                table.add_section()
            before = row["method"]
            losses = row.get("losses", [])
            table.add_row(
                row["method"],
                f"{row['keep']:g}",
                str(row["batch"]),
                *(_number(row[key]) for key in ("saved_mib", "peak_mib", "step_over_exact")),
                f"{row['loss']:.4f}" if losses else "as exact",
                f"{min(losses):.4f} to {max(losses):.4f}" if losses else EMPTY,
            )
        console.print(table)


def _left_out(console: Console, rows: list[dict], where: str) -> None:
    """Why cells are empty: one line for each method and kind of reason."""
    found: dict[tuple[str, str], tuple[str, list[str]]] = {}
    for row in rows:
        for mode, reason in row["skipped"].items():
            kind = row["method"], reason.rstrip("0123456789.s ")[:30]
            places = found.setdefault(kind, (reason, []))[1]
            places.append(f"{mode} {where} = {row[where]}")
    for (name, _), (reason, places) in found.items():
        listed = ", ".join(places[:3]) + (f" and {len(places) - 3} more" * (len(places) > 3))
        text = f"left out: {name}, {listed}: {reason}"
        console.print(text, style="dim", highlight=False, markup=False, soft_wrap=True)


def _console(width: int = 110) -> Console:
    console = Console()
    # Narrower ones are files, or wrap the lines.
    return console if console.width >= width else Console(width=width)


def _table(console: Console, title: str, heads: list[str]) -> Table:
    console.print(title, style="bold underline", highlight=False)
    table = Table(box=box.SIMPLE_HEAD)
    for k, head in enumerate(heads):
        table.add_column(head, justify="left" if k == 0 else "right", no_wrap=True)
    return table


def _ahead(rows: list[dict], key: str) -> str:
    """How many times as long the fastest peer takes as the faster of our schedules by "auto"."""
    ours = [row[key] for row in rows if key in row and row["method"].endswith(", auto")]
    others = [row[key] for row in rows if key in row and not row["method"].startswith(OURS)]
    return _number(min(others) / min(ours)) if ours and others else EMPTY


def _ratio(row: dict, mode: str) -> str:
    if f"{mode}_ratio" in row:
        return _number(row[f"{mode}_ratio"])
    reason = row.get("skipped", {}).get(mode, "")
    return "slow" if "limit" in reason else "no" if reason else EMPTY


def _number(value: float | None) -> str:
    """Three digits."""
    if value is None:
        return EMPTY
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _with_error(value: float, error: float) -> str:
    """Both in thousandths."""
    return f"{1e3 * value:.2f} ± {1e3 * error:.2f}"


def _exponent(value: float | None) -> str:
    return EMPTY if value is None else f"{value:.0e}"
