"""Callbacks that keep a run repeatable and write down what happened."""

import csv
import time
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.callbacks import ModelCheckpoint

from flows.training.files import write_atomically

__all__ = ["BestAndLast", "EpochSeed", "Recorder"]


class EpochSeed(Callback):
    """Seeds every epoch by its number, so that a resumed run draws what the whole one would.

    Validation and test draw the same noise every time, which makes epochs comparable.

    Args:
        seed: Seed of the run.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if batch_idx == 0:
            torch.manual_seed(1_000_003 * (self.seed + 1) + trainer.current_epoch)

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        torch.manual_seed(self.seed)

    on_test_epoch_start = on_validation_epoch_start


class BestAndLast(ModelCheckpoint):
    """Keeps ``best.ckpt``, by val/nll, and ``last.ckpt``, in a folder that may have been moved.

    Args:
        folder: The run folder.
    """

    def __init__(self, folder: str | Path) -> None:
        super().__init__(
            folder,
            filename="best",
            monitor="val/nll",
            enable_version_counter=False,
            save_on_train_epoch_end=True,
        )

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_epoch_end(trainer, pl_module)
        # Lightning's save_last leaves out the epochs that are not the best so far.
        trainer.save_checkpoint(Path(self.dirpath, "last.ckpt"))

    def load_state_dict(self, state: dict[str, Any]) -> None:
        # Lightning forgets the best score of a folder that has another name than before.
        best = Path(self.dirpath, "best.ckpt")
        if best.exists():
            score = state["best_model_score"]
            here = {"best_model_path": str(best), "kth_best_model_path": str(best)}
            here |= {"dirpath": self.dirpath, "best_k_models": {str(best): score}}
            super().load_state_dict(state | here)


class Recorder(Callback):
    """Keeps the metrics of every epoch and writes them to ``metrics.csv``.

    The rows travel in the checkpoint, so a resumed run continues the table exactly where its
    checkpoint was made.

    Args:
        folder: The run folder.

    Attributes:
        rows: One dict per epoch: epoch, step, lr and all logged metrics.
        seconds: Training time so far, over all sessions of the run.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.rows: list[dict[str, float]] = []
        self._earlier = 0.0
        self._start = time.monotonic()

    @property
    def seconds(self) -> float:
        return self._earlier + time.monotonic() - self._start

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # A resumed run is unfinished until it ends again.
        (self.folder / "summary.json").unlink(missing_ok=True)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        row = {"epoch": trainer.current_epoch, "step": trainer.global_step}
        row["lr"] = trainer.optimizers[0].param_groups[0]["lr"]
        metrics = trainer.callback_metrics.items()
        row |= {
            name: float(value) for name, value in metrics if name.startswith(("train/", "val/"))
        }
        self.rows.append(row)
        if trainer.is_global_zero:
            names = list(dict.fromkeys(name for row in self.rows for name in row))
            with write_atomically(self.folder / "metrics.csv") as file:
                writer = csv.DictWriter(file, names)
                writer.writeheader()
                writer.writerows(self.rows)

    def state_dict(self) -> dict[str, Any]:
        return {"rows": self.rows, "seconds": self.seconds}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.rows = list(state["rows"])
        self._earlier = state["seconds"]
        self._start = time.monotonic()
