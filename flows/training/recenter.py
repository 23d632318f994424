"""Rotations that move their base along, so that their angles stay small."""

from typing import Any

from pytorch_lightning import Callback, LightningModule, Trainer
from torch import nn

from flows.training.averaging import ParameterAverage

__all__ = ["Recenter", "recentered_layers"]


class Recenter(Callback):
    """Every few epochs calls ``recenter()`` on every layer that has it.

    Each layer keeps its map; its ``raw_angles`` start anew, and with them their optimizer
    state and their moving average. That happens before the first step of an epoch: a
    checkpoint then holds the very weights that were validated.

    Args:
        epochs: Epochs between two calls, at least 1.

    Example:
        >>> from flows.recipes import RotationSplineFlow
        >>> from flows.training import DensityEstimator
        >>> flow = RotationSplineFlow(features=2, layers=1)
        >>> (recenter,) = DensityEstimator(flow, recenter_every_n_epochs=5).configure_callbacks()
        >>> type(recenter).__name__, recenter.epochs
        ('Recenter', 5)
    """

    def __init__(self, epochs: int) -> None:
        self.epochs = epochs

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        epoch = trainer.current_epoch
        if batch_idx > 0 or epoch == 0 or epoch % self.epochs:
            return
        layers = recentered_layers(pl_module)
        for layer in layers:
            layer.recenter()
        moved = {id(p) for layer in layers for p in _raw_angles(layer)}
        for optimizer in trainer.optimizers:
            for parameter in [p for p in optimizer.state if id(p) in moved]:
                # Without state an optimizer starts a parameter as in its first step.
                del optimizer.state[parameter]
        names = {name for name, p in pl_module.named_parameters() if id(p) in moved}
        for callback in trainer.callbacks:
            if isinstance(callback, ParameterAverage):
                callback.restart(pl_module, names)


def recentered_layers(model: nn.Module) -> list[nn.Module]:
    """The outermost modules with ``recenter()``, which see to their parts themselves."""
    found = [module for module in model.modules() if hasattr(module, "recenter")]
    parts = {id(part) for module in found for part in module.modules() if part is not module}
    return [module for module in found if id(module) not in parts]


def _raw_angles(layer: nn.Module) -> list[nn.Parameter]:
    named = layer.named_parameters()
    return [p for name, p in named if name.rpartition(".")[2] == "raw_angles"]
