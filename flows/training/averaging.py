"""Exponential moving average of the parameters, which evaluation and checkpoints use."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from torch import Tensor
from torch.optim.swa_utils import get_ema_multi_avg_fn

__all__ = ["ParameterAverage"]


class ParameterAverage(Callback):
    r"""Averages the parameters over the steps, :math:`a \leftarrow d a + (1 - d) p`.

    Step t = 0, 1, ... uses :math:`d_t = \min(d, (1 + t) / (10 + t))`, so that short runs
    forget their start as well. Validation, the weights in checkpoints and the model after
    training are the average; training itself goes on with the parameters.

    Buffers are never averaged: bases of rotations would lose their orthogonality,
    permutations their meaning. Lightning's own ``WeightAveraging`` is not used, because
    testing a checkpoint after the fit that wrote it loads the parameters instead of the
    average (2.6.6), and because they are lost at the end of the fit, before the last save.

    Args:
        decay: d, in [0, 1).

    Attributes:
        kept: By name, what the module does not hold at the moment: the average during
            training, the parameters during validation and after the fit.
        updates: Steps averaged so far, t.

    Example:
        >>> from flows.recipes import RotationSplineFlow
        >>> from flows.training import DensityEstimator
        >>> flow = RotationSplineFlow(features=2, layers=1)
        >>> (average,) = DensityEstimator(flow, ema_decay=0.999).configure_callbacks()
        >>> type(average).__name__, average.decay
        ('ParameterAverage', 0.999)
    """

    def __init__(self, decay: float) -> None:
        self.decay = decay
        self.kept: dict[str, Tensor] = {}
        self.updates = 0
        self._holds_average = False
        self._step = 0
        self._resumed: dict[str, Tensor] | None = None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.kept = {name: p.detach().clone() for name, p in pl_module.named_parameters()}
        if self._resumed is not None:
            # The checkpoint's weights, the average, are what the module has loaded.
            with torch.no_grad():
                for name, parameter in pl_module.named_parameters():
                    parameter.copy_(self._resumed[name])
            self._resumed = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._step = trainer.global_step

    @torch.no_grad()
    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        # A batch may only accumulate gradients.
        if trainer.global_step == self._step:
            return
        self._step = trainer.global_step
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        update = get_ema_multi_avg_fn(decay)
        update(list(self.kept.values()), list(pl_module.parameters()), None)
        self.updates += 1

    def restart(self, pl_module: LightningModule, names: set[str]) -> None:
        """Begin the average of some parameters anew, at their present values."""
        for name, parameter in pl_module.named_parameters():
            if name in names:
                self.kept[name].copy_(parameter.detach())

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == "fit":
            self._swap(pl_module)

    on_validation_epoch_end = on_validation_epoch_start

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._swap(pl_module)

    @contextmanager
    def lent(self, pl_module: LightningModule) -> Iterator[None]:
        """The average in place of the parameters, between two steps of training."""
        self._swap(pl_module)
        try:
            yield
        finally:
            self._swap(pl_module)

    @torch.no_grad()
    def _swap(self, pl_module: LightningModule) -> None:
        for name, parameter in pl_module.named_parameters():
            here = parameter.clone()
            parameter.copy_(self.kept[name])
            self.kept[name] = here
        self._holds_average = not self._holds_average

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        here = {name: p.detach() for name, p in pl_module.named_parameters()}
        average, live = (here, self.kept) if self._holds_average else (self.kept, here)
        # A layer used twice stands in the state_dict under both names.
        first_name = {id(p): name for name, p in pl_module.named_parameters()}
        checkpoint["state_dict"] = checkpoint["state_dict"] | {
            name: average[first_name[id(p)]]
            for name, p in pl_module.named_parameters(remove_duplicate=False)
        }
        checkpoint["parameter_average"] = {"live": live, "updates": self.updates}

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        if "parameter_average" in checkpoint:
            self._resumed = checkpoint["parameter_average"]["live"]
            self.updates = checkpoint["parameter_average"]["updates"]
