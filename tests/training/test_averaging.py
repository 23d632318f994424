"""Averages of the parameters: what evaluation, checkpoints and a resumed run get to see."""

import pytest
import pytorch_lightning as pl
import torch
from torch import nn

from flows import Composite, Flow, Rotation
from flows.distributions import Normal
from flows.training import DensityEstimator
from flows.training.averaging import ParameterAverage

DECAY = 0.8


class Watch(pl.Callback):
    """Notes the parameters after every step, and the ones that validation sees."""

    def __init__(self) -> None:
        self.steps: list[dict[str, torch.Tensor]] = []
        self.validated: list[dict[str, torch.Tensor]] = []

    def on_train_start(self, trainer, pl_module):
        self.steps.append(copied(pl_module))

    def on_train_batch_end(self, trainer, pl_module, *_):
        self.steps.append(copied(pl_module))

    def on_validation_batch_start(self, trainer, pl_module, *_):
        self.validated.append(copied(pl_module))


def copied(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in module.named_parameters()}


def by_definition(steps: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    average = {name: value.double() for name, value in steps[0].items()}
    for t, parameters in enumerate(steps[1:]):
        d = min(DECAY, (1 + t) / (10 + t))
        average = {name: d * average[name] + (1 - d) * parameters[name] for name in average}
    return average


def assert_equal(found: dict, expected: dict) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


def assert_close(found: dict, expected: dict) -> None:
    for name, value in expected.items():
        torch.testing.assert_close(found[name].double(), value, rtol=1e-5, atol=1e-6)


def saved(path) -> dict:
    return torch.load(path, weights_only=True)


def test_validation_checkpoints_and_the_end_use_the_average(fit, tmp_path):
    watch = Watch()
    trainer, model = fit(callbacks=(watch,), ema_decay=DECAY)
    # The check before training sees the start, and each epoch the average so far.
    for validated, steps in zip(watch.validated, (1, 4, 7, 10, 13), strict=True):
        assert_close(validated, by_definition(watch.steps[:steps]))
    for epoch in range(4):
        checkpoint = saved(tmp_path / f"whole/epoch={epoch}.ckpt")
        weights = {name: checkpoint["state_dict"][name] for name in watch.steps[0]}
        assert_equal(weights, watch.validated[1 + epoch])
        assert_equal(checkpoint["parameter_average"]["live"], watch.steps[3 * (epoch + 1)])
    assert_equal(copied(model), watch.validated[-1])
    assert (copied(model)["flow.transform.transforms.1.raw_angles"] != 0).all()


def test_training_does_not_notice_the_average(fit):
    watch = Watch()
    _, plain = fit("plain")
    fit("averaged", callbacks=(watch,), ema_decay=DECAY)
    assert_equal(watch.steps[-1], copied(plain))


@pytest.mark.filterwarnings("ignore:The dirpath has changed")
@pytest.mark.parametrize("epoch", [0, 2])
def test_a_resumed_average_is_the_same_bit_for_bit(fit, tmp_path, epoch):
    fit("whole", ema_decay=DECAY)
    fit("resumed", ema_decay=DECAY, checkpoint=tmp_path / f"whole/epoch={epoch}.ckpt")
    whole, resumed = (saved(tmp_path / f"{name}/epoch=3.ckpt") for name in ("whole", "resumed"))
    assert_equal(resumed["state_dict"], whole["state_dict"])
    assert_equal(resumed["parameter_average"]["live"], whole["parameter_average"]["live"])
    assert resumed["parameter_average"]["updates"] == 12
    moments, expected = (c["optimizer_states"][0]["state"] for c in (resumed, whole))
    for found, moment in zip(moments.values(), expected.values(), strict=True):
        assert_equal(found, moment)


def test_testing_a_checkpoint_after_the_fit_tests_the_average(fit, tmp_path):
    trainer, model = fit(ema_decay=DECAY)
    average = copied(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    path = tmp_path / "whole/epoch=3.ckpt"
    trainer.test(model, trainer.datamodule, ckpt_path=path, weights_only=True, verbose=False)
    assert_equal(copied(model), average)


def test_a_checkpoint_saved_after_the_fit_still_holds_both(fit, tmp_path):
    trainer, model = fit(ema_decay=DECAY)
    trainer.save_checkpoint(tmp_path / "late.ckpt")
    late, last = saved(tmp_path / "late.ckpt"), saved(tmp_path / "whole/epoch=3.ckpt")
    assert_equal(late["state_dict"], last["state_dict"])
    assert_equal(late["parameter_average"]["live"], last["parameter_average"]["live"])


def test_buffers_are_never_averaged(fit, tmp_path):
    class Move(pl.Callback):
        """Changes a base at every step, as no average could follow."""

        def on_train_batch_start(self, trainer, pl_module, *_):
            base = pl_module.flow.transform.transforms[1].base
            base.copy_(torch.linalg.qr(torch.randn(2, 2))[0])
            self.base = base.clone()

    move = Move()
    _, model = fit(callbacks=(move,), ema_decay=DECAY)
    name = "flow.transform.transforms.1.base"
    assert torch.equal(saved(tmp_path / "whole/epoch=3.ckpt")["state_dict"][name], move.base)
    assert torch.equal(model.state_dict()[name], move.base)


def test_accumulated_batches_count_as_one_step(fit, tmp_path):
    fit(ema_decay=DECAY, accumulate=2)
    updates = saved(tmp_path / "whole/epoch=3.ckpt")["parameter_average"]["updates"]
    assert updates == 4 * 2  # three batches: a step of two and one of what is left


def test_a_layer_used_twice_is_saved_as_its_average_under_both_names():
    rotation = Rotation(2)
    model = DensityEstimator(Flow(Composite([rotation, rotation]), Normal(2)))
    callback = ParameterAverage(DECAY)
    callback.on_fit_start(None, model)
    with torch.no_grad():
        rotation.raw_angles.fill_(1.0)
    checkpoint = {"state_dict": model.state_dict()}
    callback.on_save_checkpoint(None, model, checkpoint)
    angles = [v for name, v in checkpoint["state_dict"].items() if name.endswith("raw_angles")]
    assert [float(value) for value in angles] == [0.0, 0.0]


@pytest.mark.parametrize("decay", [-0.1, 1.0, float("nan")])
def test_a_decay_outside_its_range_is_refused(decay):
    with pytest.raises(ValueError, match=r"ema_decay must lie in \[0, 1\), got"):
        DensityEstimator(Flow(Rotation(2), Normal(2)), ema_decay=decay)
