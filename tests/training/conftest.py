"""Trainings of a few steps without the command line."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelCheckpoint

from datasets.toy import TwoMoons
from flows import ActNorm, Composite, Flow, Rotation, SplineCoupling
from flows.distributions import Normal
from flows.nets import MLP
from flows.training import BatchSeed, DensityEstimator


def small_flow() -> Flow:
    net = partial(MLP, hidden_features=8, blocks=0)
    layers = [ActNorm(2)]
    for _ in range(2):
        layers += [Rotation(2, init="haar"), SplineCoupling(2, net, bins=4)]
    return Flow(Composite(layers), Normal(2))


@pytest.fixture
def fit(tmp_path) -> Callable[..., tuple[pl.Trainer, DensityEstimator]]:
    """Trains epochs of three steps; a checkpoint after each in tmp_path/<name>."""

    def fit(
        name: str = "whole",
        *,
        checkpoint: Path | None = None,
        callbacks: tuple[pl.Callback, ...] = (),
        accumulate: int = 1,
        max_epochs: int = 4,
        lr: float = 1e-2,
        make_flow: Callable[[], Flow] = small_flow,
        **options,
    ) -> tuple[pl.Trainer, DensityEstimator]:
        torch.manual_seed(0)
        model = DensityEstimator(make_flow(), lr=lr, warmup_steps=0, **options)
        every_epoch = ModelCheckpoint(
            tmp_path / name, filename="{epoch}", save_top_k=-1, enable_version_counter=False
        )
        trainer = pl.Trainer(
            default_root_dir=tmp_path,
            max_epochs=max_epochs,
            accumulate_grad_batches=accumulate,
            accelerator="cpu",
            logger=False,
            num_sanity_val_steps=1,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[BatchSeed(0), *callbacks, every_epoch],
        )
        data = TwoMoons(batch_size=32, batches_per_epoch=3, val_size=50, test_size=50)
        trainer.fit(model, datamodule=data, ckpt_path=checkpoint, weights_only=True)
        return trainer, model

    return fit
