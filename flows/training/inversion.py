"""How well chains that keep no inputs recover them."""

import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.utilities import rank_zero_warn
from torch import nn

from flows.transforms import Composite

__all__ = ["InversionError", "reversible_chains"]

# Recovered to fewer digits than these, inputs may well have wrong gradients.
TOLERANCE = 1e-3


class InversionError(Callback):
    """Logs ``train/inversion_error``: the largest of an epoch, over all reversible chains.

    Warns once when it is too large for gradients to be trusted.
    """

    def __init__(self) -> None:
        self._chains: list[Composite] = []
        self._warned = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._chains = reversible_chains(pl_module)

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        errors = [chain.inversion_error for chain in self._chains]
        errors = [error.float() for error in errors if error is not None]
        if errors:
            largest = torch.stack(errors).max()
            pl_module.log(
                "train/inversion_error",
                largest,
                on_step=False,
                on_epoch=True,
                reduce_fx="max",
                batch_size=1,
                sync_dist=True,
            )

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        error = trainer.callback_metrics.get("train/inversion_error", torch.zeros(()))
        if not self._warned and not error <= TOLERANCE:
            self._warned = True
            rank_zero_warn(
                f"inputs of layers are recovered with an error of {error:.1e}, over {TOLERANCE}, "
                "and so may gradients be wrong: take memory='checkpoint', or keep_every=8 in a "
                "Composite of your own."
            )


def reversible_chains(model: nn.Module) -> list[Composite]:
    """The chains with ``memory="reversible"``."""
    return [
        module
        for module in model.modules()
        if isinstance(module, Composite) and module.memory == "reversible"
    ]
