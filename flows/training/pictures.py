"""What a flow has learned so far, as pictures: during a run and at its end."""

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from matplotlib.figure import Figure
from pytorch_lightning import LightningDataModule, LightningModule, Trainer
from pytorch_lightning.callbacks import Checkpoint
from pytorch_lightning.loggers import TensorBoardLogger, WandbLogger
from pytorch_lightning.utilities import rank_zero_warn
from torch import Tensor, nn

from flows import plots
from flows.random_state import random_state, seed, set_random_state
from flows.training.averaging import ParameterAverage
from flows.training.callbacks import Recorder
from flows.training.files import write_atomically
from flows.training.report import write_report
from flows.transforms.base import InverseNotAvailable

__all__ = ["Pictures", "draw", "draw_if_possible", "publish"]

# Images in a picture of samples: so many beside one another, for so many classes.
COLUMNS, ROWS = 8, 16
# Part of a run's time that pictures nobody asked for may take.
PART = 0.1


class Pictures(Checkpoint):
    """Draws what the flow has learned, every few epochs or after epochs 1, 2, 4, 8, ....

    Writes ``pictures/epoch-0004.png``, ``history.png`` and ``report.html`` into the run folder,
    and shows the pictures to Weights & Biases and TensorBoard where they are on. All pictures
    of a run are drawn from the same noise, by the averaged parameters if there is an average,
    and none changes what training draws. The last epoch is left to the end of the run, which
    draws the best checkpoint.

    It is one of Lightning's ``Checkpoint`` callbacks because those come last: after Recorder,
    which has the losses by then, and after the checkpoint of the epoch.

    Args:
        recorder: Of the run: it knows the folder and the losses.
        every_n_epochs: Epochs from one picture to the next; 0 for none; None for epochs
            1, 2, 4, 8, ..., as long as pictures take less than a tenth of the run's time.
    """

    def __init__(self, recorder: Recorder, every_n_epochs: int | None = None) -> None:
        self.recorder = recorder
        self.every_n_epochs = every_n_epochs
        self._seconds = 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.recorder.rows and trainer.is_global_zero:
            write_report(self.recorder.folder, self.recorder.rows)  # it no longer is interrupted

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        epoch = trainer.current_epoch + 1
        if self._due(epoch) and epoch != trainer.max_epochs and trainer.is_global_zero:
            start = time.monotonic()
            self._draw(trainer, pl_module, epoch)
            self._seconds += time.monotonic() - start

    def _due(self, epoch: int) -> bool:
        if self.every_n_epochs is None:
            return epoch.bit_count() == 1 and self._seconds <= PART * self.recorder.seconds
        return self.every_n_epochs > 0 and epoch % self.every_n_epochs == 0

    def _draw(self, trainer: Trainer, pl_module: LightningModule, epoch: int) -> None:
        folder = self.recorder.folder
        with _evaluated(trainer, pl_module):
            name, picture = draw_if_possible(pl_module.flow, trainer.datamodule, "val")
        pictures = {"losses": (plots.history(self.recorder.rows), folder / "history.png")}
        if picture is not None:
            (folder / "pictures").mkdir(exist_ok=True)
            pictures[name] = (picture, folder / f"pictures/epoch-{epoch:04d}.png")
        publish(trainer, pictures)
        write_report(folder, self.recorder.rows)


def publish(trainer: Trainer, pictures: dict[str, tuple[Figure, Path]]) -> None:
    """Write pictures, {name: (figure, file)}, and show them to the loggers that can."""
    for name, (figure, path) in pictures.items():
        with write_atomically(path, "wb") as file:
            plots.save(figure, file)
        for logger in trainer.loggers:
            match logger:
                case TensorBoardLogger():
                    logger.experiment.add_figure(name, figure, trainer.global_step)
                case WandbLogger():
                    logger.log_image(name, [str(path)], trainer.global_step)


@contextmanager
def _evaluated(trainer: Trainer, module: LightningModule) -> Iterator[None]:
    """The model as it would be validated; the random numbers of training stay what they were."""
    state, training = random_state(module.device), module.training
    with ExitStack() as undo:
        for callback in trainer.callbacks:
            if isinstance(callback, ParameterAverage):
                undo.enter_context(callback.lent(module))
        undo.callback(module.train, training)
        undo.callback(set_random_state, module.device, state)
        module.eval()
        seed(module.device, 0)
        yield


def draw_if_possible(
    flow: nn.Module, data: LightningDataModule, split: str
) -> tuple[str, Figure | None]:
    """As :func:`draw`; where that fails no picture and a warning."""
    try:
        return draw(flow, data, split=split)
    except (InverseNotAvailable, RuntimeError, ValueError) as error:
        # Hours of training are worth more than a picture.
        rank_zero_warn(f"no picture of what was learned: {str(error) or type(error).__name__}")
        return "", None


@torch.no_grad()
def draw(
    flow: nn.Module, data: LightningDataModule, *, split: str = "test"
) -> tuple[str, Figure | None]:
    """Samples beside data of a split, or what is known of the density; the picture's name first.

    Returns:
        ``"density"``, ``"samples"`` (of images) or ``"marginals"`` (of tables) and the figure;
        None where there is no picture of such data.
    """
    real, *context = data.splits[split]
    if data.density is not None and not context:
        return "density", plots.density(flow, data.density)
    if len(data.shape) == 3:
        if context and data.classes is not None:
            # A row of images for each class.
            classes = min(data.classes, ROWS)
            drawn = flow.sample(COLUMNS, torch.arange(classes, device=_device(flow))).flatten(0, 1)
            real = _by_class(real, context[0], classes)
        else:
            real, drawn = real[: COLUMNS**2], _beside(flow, COLUMNS**2, context)
        return "samples", plots.samples(drawn, real, grey_levels=data.grey_levels, columns=COLUMNS)
    if len(data.shape) == 1:
        return "marginals", plots.marginals(_beside(flow, 5000, context), real[:], data.columns)
    return "", None


def _beside(flow: nn.Module, most: int, context: list[Tensor]) -> Tensor:
    """So many samples; with a context at most so many, each given that of a real row."""
    if not context:
        return flow.sample(most)
    return flow.sample(1, context[0][:most].to(_device(flow))).flatten(0, 1)


def _device(flow: nn.Module) -> torch.device:
    return next((p.device for p in flow.parameters()), torch.device("cpu"))


def _by_class(images: Tensor, labels: Tensor, classes: int) -> Tensor:
    """The first images of each class, row by row; white where a class has too few."""
    rows = []
    for label in range(classes):
        chosen = images[(labels == label).nonzero().flatten()[:COLUMNS]]
        rows.append(nn.functional.pad(chosen, (0,) * 7 + (COLUMNS - len(chosen),), value=1.0))
    return torch.cat(rows)
