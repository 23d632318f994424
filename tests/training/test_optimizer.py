"""Runs whose conditioners are trained by an optimizer of matrices."""

from functools import partial

import pytest
import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader, TensorDataset

from flows.optim import NGPlus, ProxProp
from flows.training import DensityEstimator
from tests.training.conftest import small_flow


@pytest.mark.parametrize("make", [NGPlus, ProxProp])
def test_the_rate_of_the_model_is_that_of_the_rest(fit, make):
    trainer, model = fit(lr=0.02, optimizer=partial(make, lr=0.1))
    matrices, rest = trainer.optimizers[0].param_groups
    assert (matrices["initial_lr"], rest["initial_lr"]) == (0.1, 0.02)
    trainer, model = fit("own", lr=0.02, optimizer=partial(make, lr=0.1, adamw_lr=0.03))
    assert trainer.optimizers[0].param_groups[1]["initial_lr"] == 0.03


def test_no_hook_is_left_after_a_run(fit, tmp_path):
    _, model = fit(optimizer=ProxProp)
    assert not any(part._forward_hooks for part in model.modules())
    torch.save(model.flow, tmp_path / "flow.pt")


def test_accumulated_batches_give_one_statistic(fit):
    trainer, _ = fit(accumulate=3, max_epochs=1, optimizer=NGPlus)
    (optimizer,) = trainer.optimizers
    assert optimizer.param_groups[0]["steps"] == 1 and len(optimizer.curvature()) > 0


@pytest.mark.filterwarnings("ignore:The dirpath has changed")
def test_a_resumed_run_ends_as_if_it_had_not_stopped(fit, tmp_path):
    options = {"optimizer": partial(NGPlus, lr=0.05, refresh_every=8)}
    _, whole = fit(**options)
    _, resumed = fit("resumed", checkpoint=tmp_path / "whole" / "epoch=1.ckpt", **options)
    for one, other in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.filterwarnings("ignore:You defined a `validation_step`")
def test_an_objective_needs_a_data_module():
    model = DensityEstimator(small_flow(), objective="elbo")
    trainer = pl.Trainer(
        max_epochs=1, logger=False, enable_checkpointing=False, enable_progress_bar=False
    )
    with pytest.raises(ValueError, match="needs a data module with a density, got none"):
        trainer.fit(model, DataLoader(TensorDataset(torch.randn(4, 2))))
