"""Training with chains that recover their inputs."""

import warnings
from functools import partial

import pytest
import torch
from torch import Tensor

from flows import ActNorm, Composite, Flow, Rotation, SplineCoupling
from flows.distributions import Normal
from flows.nets import MLP
from flows.training.inversion import reversible_chains
from flows.transforms.composite import Memory


def make_flow(memory: Memory) -> Flow:
    net = partial(MLP, hidden_features=8, blocks=0)
    layers = [ActNorm(2)]
    for _ in range(2):
        layers += [Rotation(2, init="haar"), SplineCoupling(2, net, bins=4)]
    return Flow(Composite(layers, memory=memory), Normal(2))


def test_a_reversible_flow_learns_what_a_stored_one_does(fit):
    stored, expected = fit("stored", max_epochs=2, make_flow=partial(make_flow, "store"))
    trainer, model = fit("ours", max_epochs=2, make_flow=partial(make_flow, "reversible"))
    assert len(reversible_chains(model)) == 1
    for found, wanted in zip(model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-3)
    assert 0 < trainer.callback_metrics["train/inversion_error"] < 1e-5
    assert "train/inversion_error" not in stored.callback_metrics


class Wrong(Rotation):
    def inverse(self, inputs: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        outputs, logabsdet = super().inverse(inputs, context)
        return 1.01 * outputs, logabsdet


def test_a_large_error_is_told_once(fit):
    def flow() -> Flow:
        return Flow(Composite([Wrong(2)], memory="reversible"), Normal(2))

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer, _ = fit(max_epochs=3, make_flow=flow)
    told = [str(w.message) for w in caught if "are recovered with an error" in str(w.message)]
    assert len(told) == 1 and "keep_every" in told[0]
    error = trainer.callback_metrics["train/inversion_error"]
    assert error.item() == pytest.approx(0.01, rel=0.01)
