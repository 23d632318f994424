"""One page that shows a run: numbers, losses, pictures and config, in a file of its own."""

import base64
import html
import io
import json
import shlex
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from flows import plots
from flows.training.files import write_atomically

__all__ = ["write_report"]

# Pictures of the run that the page holds at most; the folder has them all.
FRAMES = 24

STYLE = """
:root { color-scheme: light; --ink: #1d1b22; --soft: #6b6675; --line: #e4e1ea; --accent: #6a2c91; }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2.5rem 1.25rem 4rem; max-width: 62rem; background: #fff;
  color: var(--ink); font: 16px/1.5 system-ui, sans-serif; }
h1 { margin: 0; font-size: 1.9rem; } h2 { margin: 2.5rem 0 .75rem; font-size: 1.2rem; }
.state { color: var(--soft); margin: .25rem 0 1.5rem; }
.numbers { display: grid; gap: .75rem;
  grid-template-columns: repeat(auto-fit, minmax(8.5rem, 1fr)); }
.number { border: 1px solid var(--line); border-radius: .5rem; padding: .75rem; }
.number b { display: block; font-size: 1.35rem; font-weight: 600; overflow-wrap: anywhere; }
.number small { color: var(--soft); font-weight: 400; font-size: .75rem; white-space: nowrap; }
.number span { color: var(--soft); font-size: .85rem; }
.number.first { border-color: var(--accent); }
img { max-width: 100%; height: auto; display: block; margin: 0 auto; }
img[hidden] { display: none; }
.film label { display: flex; gap: 1rem; align-items: center; margin: .25rem 0 1rem; }
.film input { flex: 1; accent-color: var(--accent); } .film output { min-width: 8rem; }
details { border-top: 1px solid var(--line); padding: .6rem 0; }
summary { cursor: pointer; font-weight: 600; }
pre { background: #f7f6f9; border-radius: .5rem; padding: 1rem; overflow-x: auto;
  font-size: .85rem; }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-size: .85rem; }
th, td { text-align: right; padding: .2rem .75rem .2rem 0; white-space: nowrap; }
th { color: var(--soft); font-weight: 600; border-bottom: 1px solid var(--line); }
"""

# Without scripts the last picture stands there, and the slider does nothing.
SCRIPT = """
for (const film of document.querySelectorAll(".film")) {
  const frames = film.querySelectorAll("img"), shown = film.querySelector("output");
  film.querySelector("input").addEventListener("input", event => {
    frames.forEach((frame, k) => frame.hidden = k != event.target.value);
    shown.textContent = frames[event.target.value].alt;
  });
}
"""

# Keys of summary.json: what stands below the number, and how the number is written.
NUMBERS = {
    "test/kl": ("nats, KL to the truth, test", "{:.4f}"),
    "test/bits_per_dim": ("bits per dimension, test", "{:.3f}"),
    "test/nll": ("nats, negative log-likelihood, test", "{:.3f}"),
    "epochs": ("epochs", "{:,}"),
    "parameters": ("parameters", "{:,}"),
    "wall_seconds": ("seconds", "{:,.0f}"),
}


def write_report(
    folder: Path,
    rows: Sequence[Mapping[str, float]],
    summary: Mapping[str, Any] | None = None,
    *,
    failure: str = "",
) -> Path:
    """Write ``folder/report.html``, which needs no other file and no network.

    It holds the pictures and the config that are in the folder.

    Args:
        folder: The run folder.
        rows: Metrics of each epoch, as :class:`~flows.training.Recorder` keeps them.
        summary: What is to stand in summary.json; None while the run goes on.
        failure: Why the run ended without a summary.
    """
    name = f"{folder.parent.name}, {folder.name}"
    parts = [f"<h1>{html.escape(folder.parent.name)}</h1>", _state(folder, rows, summary, failure)]
    parts.append(_numbers(rows, summary or {}))
    parts.append(_film(folder, done=summary is not None and not summary["interrupted"]))
    if rows:
        figure = plots.history(rows)
        curves = io.BytesIO()
        figure.savefig(curves, format="svg", metadata={"Date": None})
        source = f"data:image/svg+xml;base64,{base64.b64encode(curves.getvalue()).decode()}"
        parts.append(f"<h2>Losses</h2><img src='{source}' alt='losses'>")
    parts.append(_details(folder, rows, summary))
    page = (
        "<!doctype html><html lang='en'><head><meta charset='utf-8'>"
        "<meta name='viewport' content='width=device-width, initial-scale=1'>"
        f"<title>{html.escape(name)}</title><style>{STYLE}</style></head>"
        f"<body>{''.join(filter(None, parts))}<script>{SCRIPT}</script></body></html>\n"
    )
    path = folder / "report.html"
    with write_atomically(path) as file:
        file.write(page)
    return path


def _state(
    folder: Path, rows: Sequence[Mapping], summary: Mapping[str, Any] | None, failure: str
) -> str:
    if failure:
        state = f"failed after epoch {len(rows)}: {failure.removesuffix('.')}"
    elif summary is None:
        now = time.strftime("%Y-%m-%d %H:%M")
        state = f"still running after epoch {len(rows)}, {now}; open this page again for more"
    elif summary["interrupted"]:
        state = f"interrupted by {summary['stopped_by']}; it can be resumed"
    else:
        state = f"ended by {summary['stopped_by']}"
    return f"<p class='state'>Run of {html.escape(folder.name)}: {html.escape(state)}.</p>"


def _numbers(rows: Sequence[Mapping[str, float]], summary: Mapping[str, Any]) -> str:
    tiles = []
    for key, (label, form) in NUMBERS.items():
        if key in summary:
            error = summary.get(f"{key}_error")
            plus = "" if error is None else f" <small>± {error:.4f}</small>"
            tiles.append((form.format(summary[key]) + plus, label))
    if not tiles and rows:
        tiles = [(f"{v:.4f}", k) for k, v in rows[-1].items() if k.startswith(("train/", "val/"))]
    first = " first"
    found = ""
    for value, label in tiles:
        found += f"<div class='number{first}'><b>{value}</b><span>{label}</span></div>"
        first = ""
    return f"<div class='numbers'>{found}</div>"


def _film(folder: Path, *, done: bool) -> str:
    """Pictures along the run, the last of them shown, and a slider."""
    paths = sorted(folder.glob("pictures/epoch-*.png"))
    if len(paths) > FRAMES:
        paths = [paths[k * (len(paths) - 1) // (FRAMES - 1)] for k in range(FRAMES)]
    frames = {f"epoch {int(path.stem.removeprefix('epoch-'))}": path for path in paths}
    for name in ("density", "samples", "marginals") if done else ():
        if (folder / f"{name}.png").exists():
            frames["best checkpoint"] = folder / f"{name}.png"
    if not frames:
        return ""
    last = len(frames) - 1
    images = "".join(
        f"<img src='{_png(path.read_bytes())}' alt='{name}'{'' if k == last else ' hidden'}>"
        for k, (name, path) in enumerate(frames.items())
    )
    slider = (
        f"<label><input type='range' min='0' max='{last}' value='{last}' aria-label='picture'>"
        f"<output>{list(frames)[-1]}</output></label>"
    )
    slider = slider if last else ""
    return f"<h2>What it learned</h2><div class='film'>{slider}{images}</div>"


def _details(
    folder: Path, rows: Sequence[Mapping[str, float]], summary: Mapping[str, Any] | None
) -> str:
    best = folder / ("best.ckpt" if (folder / "best.ckpt").exists() else "last.ckpt")
    checkpoint, run = shlex.quote(str(best)), shlex.quote(str(folder))
    commands = (
        f"python train.py test --ckpt_path {checkpoint}\n"
        f"python train.py sample --ckpt_path {checkpoint} --num_samples 64\n"
        f"python train.py --ckpt_path {run}    # go on, if it was interrupted\n\n"
        f"flow = flows.load({str(folder)!r})   # in Python"
    )
    texts = {"Config": (folder / "config.yaml").read_text()}
    if summary is not None:
        texts["Summary"] = json.dumps(summary, indent=2)
    sections = [f"<h2>Go on</h2><pre>{html.escape(commands)}</pre><h2>All of it</h2>"]
    sections.append(f"<details><summary>Every epoch</summary>{_table(rows)}</details>")
    for title, text in texts.items():
        sections.append(
            f"<details><summary>{title}</summary><pre>{html.escape(text)}</pre></details>"
        )
    return "".join(sections)


def _table(rows: Sequence[Mapping[str, float]]) -> str:
    names = list(dict.fromkeys(name for row in rows for name in row))
    head = "".join(f"<th>{html.escape(name)}</th>" for name in names)
    lines = (
        "".join(f"<td>{row[name]:.6g}</td>" if name in row else "<td></td>" for name in names)
        for row in rows
    )
    body = "".join(f"<tr>{line}</tr>" for line in lines)
    return f"<div class='wide'><table><tr>{head}</tr>{body}</table></div>"


def _png(content: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(content).decode()}"
