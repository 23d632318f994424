"""Recentering during training: the maps stay, what was learned about the angles starts anew."""

from types import SimpleNamespace

import pytest
import pytorch_lightning as pl
import torch

from flows import ActNorm, Composite, Flow, Rotation, Rotation1x1, SVDLinear, givens
from flows.distributions import Normal
from flows.training import DensityEstimator
from flows.training.averaging import ParameterAverage
from flows.training.recenter import Recenter, recentered_layers


def average_of(trainer: pl.Trainer) -> ParameterAverage | None:
    return next((c for c in trainer.callbacks if isinstance(c, ParameterAverage)), None)


class Watch(pl.Callback):
    """Compares what stands before and after the first batch hook of an epoch.

    Callbacks of the trainer run before those of the model, Recenter among them; the step's
    forward comes after both.
    """

    def __init__(self) -> None:
        self.seen: list[tuple[dict, dict]] = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if batch_idx:
            return

        def note(*_) -> None:
            handle.remove()
            self.seen.append((before, self.snapshot(trainer, pl_module)))

        before = self.snapshot(trainer, pl_module)
        handle = pl_module.flow.register_forward_pre_hook(note)

    def snapshot(self, trainer, pl_module) -> dict:
        (optimizer,) = trainer.optimizers
        average = average_of(trainer)
        return {
            "matrices": [r.matrix().detach().clone() for r in recentered_layers(pl_module)],
            "parameters": {n: p.detach().clone() for n, p in pl_module.named_parameters()},
            "state": {
                name: {k: v.clone() for k, v in optimizer.state[p].items()}
                for name, p in pl_module.named_parameters()
                if p in optimizer.state
            },
            "average": {} if average is None else {n: v.clone() for n, v in average.kept.items()},
        }


def test_only_the_angles_start_anew_and_no_matrix_moves(fit):
    watch = Watch()
    fit(callbacks=(watch,), recenter_every_n_epochs=2, ema_decay=0.9)
    names = {f"flow.transform.transforms.{i}.raw_angles" for i in (1, 3)}
    for epoch, (before, after) in enumerate(watch.seen):
        for old, new in zip(before["matrices"], after["matrices"], strict=True):
            torch.testing.assert_close(new, old, rtol=0, atol=3e-7)
        recentered = names if epoch == 2 else set()
        assert after["state"].keys() == before["state"].keys() - recentered
        for name, value in before["parameters"].items():
            if name in recentered:
                assert (value != 0).all() and (after["parameters"][name] == 0).all()
                assert name in before["state"] and name not in after["state"]
                assert (before["average"][name] != value).all()
                assert torch.equal(after["average"][name], after["parameters"][name])
                continue
            assert torch.equal(after["parameters"][name], value)
            assert torch.equal(after["average"][name], before["average"][name])
            for key, moment in before["state"].get(name, {}).items():
                assert torch.equal(after["state"][name][key], moment)


def test_a_recentered_average_still_turns(fit, tmp_path):
    """The weights saved and validated are orthogonal, near the ones that train."""
    trainer, model = fit(recenter_every_n_epochs=1, ema_decay=0.9)
    for layer in recentered_layers(model):
        gram = layer.matrix() @ layer.matrix().mT
        torch.testing.assert_close(gram, torch.eye(2), rtol=0, atol=1e-6)


def test_recentering_hardly_changes_training(fit):
    """Sums of gradients restart, so the runs differ, but only by what Adam forgets."""
    (_, plain), (_, recentered) = (
        fit("plain", lr=1e-3),
        fit("moved", lr=1e-3, recenter_every_n_epochs=1),
    )
    bases = [layer.base for layer in recentered_layers(plain)]
    for base, a, b in zip(
        bases, recentered_layers(plain), recentered_layers(recentered), strict=True
    ):
        assert not torch.equal(b.base, base)
        torch.testing.assert_close(a.matrix(), b.matrix(), rtol=0, atol=2e-2)


@pytest.mark.filterwarnings("ignore:The dirpath has changed")
@pytest.mark.parametrize("epoch", [0, 1, 2])
@pytest.mark.parametrize("schedule", [givens.crossing(2), givens.cosine_sine(2)], ids=str)
def test_a_resumed_run_recenters_as_the_whole_one(fit, tmp_path, epoch, schedule):
    options = {
        "recenter_every_n_epochs": 2,
        "ema_decay": 0.9,
        "make_flow": lambda: Flow(Composite([Rotation(2, schedule), ActNorm(2)]), Normal(2)),
    }
    fit("whole", **options)
    fit("resumed", checkpoint=tmp_path / f"whole/epoch={epoch}.ckpt", **options)
    whole, resumed = (
        torch.load(tmp_path / f"{name}/epoch=3.ckpt", weights_only=True)["state_dict"]
        for name in ("whole", "resumed")
    )
    for name, value in whole.items():
        assert torch.equal(resumed[name], value), name


def test_a_layer_with_rotations_inside_is_recentered_once():
    layers = [Rotation1x1(3), SVDLinear(3), Rotation(3)]
    assert recentered_layers(Flow(Composite([ActNorm(3), *layers]), Normal(3))) == layers


@pytest.mark.parametrize("layer", [Rotation1x1, SVDLinear])
def test_the_angles_inside_a_layer_start_anew(layer):
    flow = Flow(layer(3), Normal(3))
    model = DensityEstimator(flow)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    matrix = flow.transform.matrix().detach()
    trainer = SimpleNamespace(current_epoch=1, optimizers=[optimizer], callbacks=[])
    Recenter(1).on_train_batch_start(trainer, model, None, 0)
    torch.testing.assert_close(flow.transform.matrix().detach(), matrix, rtol=0, atol=1e-6)
    for name, parameter in model.named_parameters():
        angles = name.endswith("raw_angles")
        assert (parameter == 0).all() == angles and (parameter in optimizer.state) != angles, name


def test_a_flow_without_rotations_is_refused():
    flow = Flow(ActNorm(2), Normal(2))
    with pytest.raises(ValueError, match="without a layer that has recenter.*got 3"):
        DensityEstimator(flow, recenter_every_n_epochs=3)


def test_never_is_none_and_zero_is_refused():
    flow = Flow(Rotation1x1(3), Normal((3, 2, 2)))
    with pytest.raises(ValueError, match="recenter_every_n_epochs must be at least 1, got 0"):
        DensityEstimator(flow, recenter_every_n_epochs=0)
