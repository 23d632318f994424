"""A run folder: what stands in it and how a run ends."""

import json
import platform
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from pytorch_lightning import LightningDataModule, Trainer
from torch import Tensor, nn

from flows import plots
from flows.training.callbacks import Recorder
from flows.training.files import write_atomically
from flows.training.module import DensityEstimator
from flows.training.sampling import precise
from flows.training.stopping import Patience

__all__ = ["finish", "new_folder", "write_summary"]

# Images in a picture of samples: so many beside one another, for so many classes.
COLUMNS, ROWS = 8, 16


def new_folder(root: str | Path, experiment: str) -> Path:
    """A path ``root/experiment/time`` that does not exist yet; nothing is created."""
    while True:
        folder = Path(root) / experiment / time.strftime("%Y-%m-%d_%H-%M-%S")
        if not folder.exists():
            return folder
        time.sleep(0.2)


def finish(
    folder: Path,
    trainer: Trainer,
    model: DensityEstimator,
    data: LightningDataModule,
    *,
    experiment: str,
    seed: int | None,
) -> dict[str, Any]:
    """Test the best checkpoint, draw the pictures and, last of all, write summary.json.

    All processes test together; the first one draws and writes.

    Returns:
        The summary. A folder without summary.json is a run that did not finish.
    """
    recorder = next(c for c in trainer.callbacks if isinstance(c, Recorder))
    checkpoint = folder / "best.ckpt"
    if not trainer.strategy.broadcast(checkpoint.exists()):
        # Nothing was validated: the weights as they are.
        checkpoint = folder / "last.ckpt"
        trainer.save_checkpoint(checkpoint)
    done = {"stopped_by": _stopped_by(trainer), "wall_seconds": recorder.seconds}
    results = trainer.test(
        model, datamodule=data, ckpt_path=str(checkpoint), weights_only=True, verbose=False
    )[0]
    if not trainer.is_global_zero:
        return results
    if recorder.rows:
        plots.save(plots.history(recorder.rows), folder / "history.png")
    flow = precise(model.flow.eval())
    torch.manual_seed(0)
    name, picture = _picture(flow, data)
    if picture is not None:
        plots.save(picture, folder / f"{name}.png")
    return write_summary(
        folder,
        trainer,
        model,
        results | done,
        experiment=experiment,
        seed=seed,
        checkpoint=checkpoint,
    )


def write_summary(
    folder: Path,
    trainer: Trainer,
    model: DensityEstimator,
    results: dict[str, Any],
    *,
    experiment: str,
    seed: int | None,
    checkpoint: Path,
) -> dict[str, Any]:
    """Write what came out, and what of, to ``folder/summary.json``; returns it."""
    recorder = next(c for c in trainer.callbacks if isinstance(c, Recorder))
    summary = {
        "experiment": experiment,
        "interrupted": False,
        **results,
        "epochs": trainer.current_epoch,
        "steps": trainer.global_step,
        "parameters": sum(parameter.numel() for parameter in model.flow.parameters()),
        "wall_seconds": round(results.get("wall_seconds", recorder.seconds), 1),
        "processes": trainer.world_size,
        "seed": seed,
        "checkpoint": str(checkpoint),
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("torch", "pytorch-lightning", "nflows")},
        },
    }
    with write_atomically(folder / "summary.json") as file:
        json.dump(summary, file, indent=2, allow_nan=False)
    return summary


def _stopped_by(trainer: Trainer) -> str:
    """The config key that ended the fit."""
    if any(isinstance(c, Patience) and c.exhausted for c in trainer.callbacks):
        return "early_stopping_patience"
    if trainer.current_epoch >= trainer.max_epochs >= 0:
        return "max_epochs"
    return "max_steps" if trainer.global_step >= trainer.max_steps >= 0 else "max_time"


@torch.no_grad()
def _picture(flow: nn.Module, data: LightningDataModule) -> tuple[str, Figure | None]:
    """Samples beside test data, and what is known of the density; the file's name first."""
    real, *context = data.splits["test"]
    if data.density is not None and not context:
        return "density", plots.density(flow, data.density)
    if len(data.shape) == 3:
        if context and data.classes is not None:
            # A row of images for each class.
            classes = min(data.classes, ROWS)
            drawn = flow.sample(COLUMNS, torch.arange(classes)).flatten(0, 1)
            real = _by_class(real, context[0], classes)
        else:
            real, drawn = real[: COLUMNS**2], _beside(flow, COLUMNS**2, context)
        return "samples", plots.samples(drawn, real, grey_levels=data.grey_levels, columns=COLUMNS)
    if len(data.shape) == 1:
        return "marginals", plots.marginals(_beside(flow, 10_000, context), real[:], data.columns)
    return "", None


def _beside(flow: nn.Module, most: int, context: list[Tensor]) -> Tensor:
    """So many samples; with a context at most so many, each given that of a real row."""
    if not context:
        return flow.sample(most)
    return flow.sample(1, context[0][:most]).flatten(0, 1)


def _by_class(images: Tensor, labels: Tensor, classes: int) -> Tensor:
    """The first images of each class, row by row; white where a class has too few."""
    rows = []
    for label in range(classes):
        chosen = images[(labels == label).nonzero().flatten()[:COLUMNS]]
        rows.append(nn.functional.pad(chosen, (0,) * 7 + (COLUMNS - len(chosen),), value=1.0))
    return torch.cat(rows)
