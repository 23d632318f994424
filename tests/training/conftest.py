"""Trainings of a few steps without the command line."""

from collections.abc import Callable
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelCheckpoint

from datasets.toy import TwoMoons
from flows.recipes import RotationSplineFlow
from flows.training import DensityEstimator, EpochSeed


@pytest.fixture
def fit(tmp_path) -> Callable[..., tuple[pl.Trainer, DensityEstimator]]:
    """Trains four epochs of three steps; a checkpoint after each in tmp_path/<name>."""

    def fit(
        name: str = "whole",
        *,
        checkpoint: Path | None = None,
        callbacks: tuple[pl.Callback, ...] = (),
        accumulate: int = 1,
        **options,
    ) -> tuple[pl.Trainer, DensityEstimator]:
        torch.manual_seed(0)
        flow = RotationSplineFlow(2, layers=2, hidden_features=8, blocks=0, bins=4)
        model = DensityEstimator(flow, lr=1e-2, warmup_steps=0, **options)
        every_epoch = ModelCheckpoint(
            tmp_path / name, filename="{epoch}", save_top_k=-1, enable_version_counter=False
        )
        trainer = pl.Trainer(
            default_root_dir=tmp_path,
            max_epochs=4,
            accumulate_grad_batches=accumulate,
            accelerator="cpu",
            logger=False,
            num_sanity_val_steps=1,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[EpochSeed(0), *callbacks, every_epoch],
        )
        data = TwoMoons(batch_size=32, batches_per_epoch=3, val_size=50, test_size=50)
        trainer.fit(model, datamodule=data, ckpt_path=checkpoint, weights_only=True)
        return trainer, model

    return fit
