"""An end to runs that no longer get better."""

from typing import Any

from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning.callbacks import EarlyStopping

__all__ = ["Patience"]


class Patience(EarlyStopping):
    """Ends the run after a number of validations in a row without a better val/nll.

    Args:
        validations: How many, at least 1.

    Example:
        >>> from flows.recipes import RotationSplineFlow
        >>> from flows.training import DensityEstimator
        >>> flow = RotationSplineFlow(features=2, layers=1)
        >>> (patience,) = DensityEstimator(flow, early_stopping_patience=10).configure_callbacks()
        >>> type(patience).__name__, patience.exhausted
        ('Patience', False)
    """

    def __init__(self, validations: int) -> None:
        super().__init__("val/nll", patience=validations)

    @property
    def exhausted(self) -> bool:
        """Whether so many validations have passed, and the run is over."""
        return self.wait_count >= self.patience

    def load_state_dict(self, state: dict[str, Any]) -> None:
        # The patience is the config's: a resumed run may have more.
        super().load_state_dict(state | {"patience": self.patience})

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # A run that had stopped and is resumed would otherwise take one more epoch.
        trainer.should_stop = self.exhausted
