"""Callbacks that keep a run repeatable, write down what happened and save it in time."""

import csv
import math
import signal
import threading
import time
from pathlib import Path
from typing import Any, NoReturn

import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.callbacks import Checkpoint, ModelCheckpoint
from pytorch_lightning.utilities.exceptions import SIGTERMException

from flows.random_state import seed as seed_device
from flows.training.files import write_atomically

__all__ = ["BatchSeed", "BestAndLast", "Interrupted", "Recorder"]

# What asks a run to stop, and what the same signal does when it comes again.
AGAIN = {signal.SIGTERM: signal.SIG_DFL, signal.SIGINT: signal.default_int_handler}


class BatchSeed(Callback):
    """Seeds every training batch by its number, so that a resumed run draws what the whole would.

    Processes that train together draw different noise. Validation and test draw the same
    every time, which makes epochs comparable.

    Args:
        seed: Seed of the run.

    Example:
        >>> from types import SimpleNamespace
        >>> import torch
        >>> from flows.training import BatchSeed
        >>> trainer = SimpleNamespace(global_rank=0, current_epoch=3)  # what it asks of them
        >>> model = SimpleNamespace(device=torch.device("cpu"))
        >>> draws = []
        >>> for _ in range(2):
        ...     BatchSeed(seed=0).on_train_batch_start(trainer, model, batch=None, batch_idx=5)
        ...     draws.append(torch.rand(3))
        >>> torch.equal(*draws)
        True
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._seed(trainer, pl_module, trainer.current_epoch, batch_idx + 1)

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._seed(trainer, pl_module, 0, 0)

    on_test_epoch_start = on_validation_epoch_start

    def _seed(self, trainer: Trainer, pl_module: LightningModule, *numbers: int) -> None:
        # A tuple of integers has one hash in all processes and versions of 64 bits.
        seed_device(pl_module.device, hash((self.seed, trainer.global_rank, *numbers)))


class Interrupted(Exception):
    """A run that was asked to stop and has saved what it had.

    Args:
        number: The signal.
    """

    def __init__(self, number: int) -> None:
        self.signal = signal.Signals(number)
        super().__init__(self.signal.name)


def _end(number: int, frame: Any) -> NoReturn:
    raise SIGTERMException


class BestAndLast(ModelCheckpoint):
    """Keeps ``best.ckpt``, by val/nll, and ``last.ckpt``, in a folder that may have been moved.

    The last one is written after every epoch, and within an epoch after so many minutes or when
    SIGTERM or SIGINT (Ctrl-C) comes: the step, or the validation, is ended, saved, and the run
    ends by :class:`Interrupted`. The same signal again ends it at once.

    Args:
        folder: The run folder.
        minutes: Between two checkpoints at most, as far as an epoch's training goes.
    """

    def __init__(self, folder: str | Path, minutes: float = 10.0) -> None:
        super().__init__(
            folder,
            filename="best",
            monitor="val/nll",
            enable_version_counter=False,
            save_on_train_epoch_end=True,
        )
        self.seconds = 60 * minutes
        self._signal = 0
        self._step = 0
        self._saved = time.monotonic()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        # Otherwise Lightning (2.6) takes the end of an epoch for its middle where max_steps is
        # given, and a resumed run counts its epochs wrong.
        trainer.fit_loop._iteration_based_training = lambda: False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self._step, self._saved = trainer.global_step, time.monotonic()
        # Lightning (2.6) forgets where in the epoch the loader was as soon as somebody has asked
        # for the number of steps, as schedules do.
        trainer.fit_loop._load_combined_loader_states()
        # In place of Lightning's handlers, which end a step of several processes anywhere;
        # it puts back those that were there before the fit.
        if threading.current_thread() is threading.main_thread():
            for number in AGAIN:
                if signal.getsignal(number) != signal.SIG_IGN:
                    signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, frame: Any) -> None:
        self._signal = number
        signal.signal(number, AGAIN[number])

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        # A batch may only accumulate gradients, which no checkpoint holds; and an epoch's last
        # one leads to its end. Before a validation none is written: going on from it, Lightning
        # would leave that out.
        validates = (batch_idx + 1) % (trainer.val_check_batch or math.inf) == 0
        if trainer.global_step == self._step or trainer.is_last_batch or validates:
            return
        if 0 <= trainer.max_steps <= trainer.global_step:
            return  # the end of the run
        self._step = trainer.global_step
        number, late = self._agreed(trainer)
        if number or late:
            self._save_last(trainer)
        if number:
            raise Interrupted(number)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_epoch_end(trainer, pl_module)
        # Lightning's save_last leaves out the epochs that are not the best so far.
        self._save_last(trainer)
        number, _ = self._agreed(trainer)
        if number:
            raise Interrupted(number)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        number, _ = self._agreed(trainer)
        if number:
            raise Interrupted(number)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Nothing is left to save. Lightning's handler may wait for other processes.
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, _end)

    def _agreed(self, trainer: Trainer) -> tuple[int, bool]:
        """The signal that any of the processes has got, 0 for none; whether one finds it late."""
        number, late = self._signal, time.monotonic() - self._saved > self.seconds
        if trainer.world_size > 1:
            here = torch.tensor([number, late], device=trainer.strategy.root_device)
            number, late = trainer.strategy.reduce(here, reduce_op="max").tolist()
        return number, bool(late)

    def _save_last(self, trainer: Trainer) -> None:
        self._saved = time.monotonic()
        trainer.save_checkpoint(Path(self.dirpath, "last.ckpt"))

    def load_state_dict(self, state: dict[str, Any]) -> None:
        # Lightning forgets the best score of a folder that has another name than before.
        best = Path(self.dirpath, "best.ckpt")
        if best.exists():
            score = state["best_model_score"]
            here = {"best_model_path": str(best), "kth_best_model_path": str(best)}
            here |= {"dirpath": self.dirpath, "best_k_models": {str(best): score}}
            super().load_state_dict(state | here)


class Recorder(Checkpoint):
    """Keeps the metrics of every epoch and writes them to ``metrics.csv``.

    The rows travel in the checkpoint, so a resumed run continues the table exactly where its
    checkpoint was made. It is one of Lightning's ``Checkpoint`` callbacks because those come
    last, when all metrics are there, in the order they were given: before BestAndLast.

    Args:
        folder: The run folder; that of the first process counts.

    Attributes:
        rows: One dict per epoch: epoch, step, lr and all logged metrics.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> from datasets.toy import TwoMoons
        >>> from pytorch_lightning import Trainer
        >>> from flows.recipes import RotationSplineFlow
        >>> from flows.training import DensityEstimator, Recorder
        >>> model = DensityEstimator(RotationSplineFlow(features=2, layers=1))
        >>> data = TwoMoons(batches_per_epoch=2, val_size=100, test_size=100)
        >>> quiet = dict(enable_progress_bar=False, enable_model_summary=False, logger=False)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     trainer = Trainer(
        ...         max_epochs=1, accelerator="cpu", callbacks=[Recorder(folder)], **quiet
        ...     )
        ...     trainer.fit(model, data)
        ...     print(Path(folder, "metrics.csv").read_text().splitlines()[0])
        epoch,step,lr,val/nll,val/kl,train/nll
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.rows: list[dict[str, float]] = []
        self._earlier = 0.0
        self._start = time.monotonic()
        self._validated = False

    @property
    def seconds(self) -> float:
        """Training time so far, over all sessions of the run."""
        return self._earlier + time.monotonic() - self._start

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self.folder = Path(trainer.strategy.broadcast(str(self.folder)))

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # A resumed run is unfinished until it ends again.
        if trainer.is_global_zero:
            (self.folder / "summary.json").unlink(missing_ok=True)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._validated = True

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        row = {"epoch": trainer.current_epoch, "step": trainer.global_step}
        row["lr"] = trainer.optimizers[0].param_groups[0]["lr"]
        metrics = trainer.callback_metrics.items()
        # Lightning keeps the metrics of the last validation, which may be of an epoch before.
        kinds = ("train/", "val/") if self._validated else ("train/",)
        row |= {name: float(value) for name, value in metrics if name.startswith(kinds)}
        self._validated = False
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
