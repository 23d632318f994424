"""A run folder: what stands in it and how a run ends."""

import json
import platform
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning import LightningDataModule, Trainer
from rich.console import Console

from flows import plots
from flows.training.callbacks import Recorder
from flows.training.files import write_atomically
from flows.training.module import DensityEstimator
from flows.training.pictures import draw_if_possible, publish
from flows.training.report import write_report
from flows.training.sampling import precise
from flows.training.stopping import Patience

__all__ = ["finish", "new_folder", "write_summary"]


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
    rows = recorder.rows
    results = trainer.test(
        model, datamodule=data, ckpt_path=str(checkpoint), weights_only=True, verbose=False
    )[0]
    recorder.rows = rows  # the checkpoint that was tested holds those of its own epoch
    if not trainer.is_global_zero:
        return results
    with Console(stderr=True).status("drawing"):
        torch.manual_seed(0)
        name, picture = draw_if_possible(precise(model.flow.eval()), data, "test")
        pictures = {name: (picture, folder / f"{name}.png")} if picture is not None else {}
        if recorder.rows:
            pictures["losses"] = (plots.history(recorder.rows), folder / "history.png")
        publish(trainer, pictures)
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
    """Write report.html and then what came out, and what of, to summary.json; returns that."""
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
    write_report(folder, recorder.rows, summary)
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
