"""A run folder: what stands in it and how a run ends."""

import json
import platform
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning import LightningDataModule, Trainer

from flows import plots
from flows.training.callbacks import Recorder
from flows.training.files import write_atomically
from flows.training.module import DensityEstimator
from flows.training.stopping import Patience

__all__ = ["finish", "new_folder"]


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

    Returns:
        The summary. A folder without summary.json is a run that did not finish.
    """
    recorder = next(c for c in trainer.callbacks if isinstance(c, Recorder))
    checkpoint = folder / "best.ckpt"
    if not checkpoint.exists():
        # Nothing was validated: the weights as they are.
        checkpoint = folder / "last.ckpt"
        trainer.save_checkpoint(checkpoint)
    seconds, stopped_by = recorder.seconds, _stopped_by(trainer)
    results = trainer.test(
        model, datamodule=data, ckpt_path=str(checkpoint), weights_only=True, verbose=False
    )[0]
    if recorder.rows:
        plots.save(plots.history(recorder.rows), folder / "history.png")
    flow = model.flow.eval()
    torch.manual_seed(0)
    if data.density is not None:
        plots.save(plots.density(flow, data.density), folder / "density.png")
    elif len(data.shape) == 3:
        real = data.splits["test"][0][:64]
        with torch.no_grad():
            drawn = flow.sample(len(real))
        figure = plots.samples(drawn, real, grey_levels=data.grey_levels)
        plots.save(figure, folder / "samples.png")
    summary = {
        "experiment": experiment,
        **results,
        "epochs": trainer.current_epoch,
        "steps": trainer.global_step,
        "stopped_by": stopped_by,
        "parameters": sum(parameter.numel() for parameter in flow.parameters()),
        "wall_seconds": round(seconds, 1),
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
    if trainer.current_epoch >= (trainer.max_epochs or 0) > 0:
        return "max_epochs"
    return "max_steps" if trainer.global_step >= trainer.max_steps >= 0 else "max_time"
