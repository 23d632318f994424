"""The first number that is not finite ends a run, and the message says where it arose."""

from functools import partial

import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from flows import AffineCoupling, Composite, Dequantize, Flow, Rotation
from flows.distributions import Normal
from flows.nets import MLP
from flows.training.guard import culprit, guarded_log_prob, non_finite_gradient
from flows.transforms.base import Transform


class Spoil(Transform):
    """Identity but for one number of the row whose first entry is the largest."""

    def __init__(self, where: str, chance: float = 1.0) -> None:
        super().__init__()
        self.where = where
        self.chance = chance

    def forward(self, inputs: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        outputs, logabsdet = inputs.clone(), inputs.new_zeros(len(inputs))
        if torch.rand(()) < self.chance:
            {"outputs": outputs[:, 1], "logabsdet": logabsdet}[self.where][
                inputs[:, 0].argmax()
            ] = torch.inf
        return outputs, logabsdet


def flow_of(*transforms: Transform) -> Flow:
    return Flow(Composite(transforms), Normal(2))


def coupling() -> AffineCoupling:
    return AffineCoupling(2, partial(MLP, hidden_features=4, blocks=0))


@pytest.fixture
def x() -> Tensor:
    return torch.randn(6, 2)


@pytest.mark.parametrize("where", ["outputs", "logabsdet"])
def test_the_first_spoiling_transform_is_named(x, where):
    inner = Composite([coupling(), Spoil(where), Spoil("outputs")])
    flow = flow_of(Rotation(2), inner, Rotation(2))
    with pytest.raises(FloatingPointError) as error:
        guarded_log_prob(flow, (x,), "training diverged")
    place = f"the {where} of transform.transforms.1.transforms.1 (Spoil) are not finite"
    assert str(error.value).startswith("training diverged: nll is ") and place in str(error.value)


def test_a_conditioner_is_named_within_its_layer(x):
    flow = flow_of(Rotation(2), coupling())
    with torch.no_grad():
        flow.transform.transforms[1].net.last.bias.fill_(3e38)
        flow.transform.transforms[1].net.last.weight.fill_(3e38)
    assert culprit(flow, (x,)).startswith(
        "the outputs of transform.transforms.1 (AffineCoupling), in its net.last (Linear),"
    )


def test_parameters_that_are_spoiled_already_are_named(x):
    flow = flow_of(Rotation(2), coupling())
    with torch.no_grad():
        flow.transform.transforms[1].net.first.weight[2, 0] = torch.nan
    with pytest.raises(FloatingPointError, match="transform.transforms.1.net.first.weight is not"):
        guarded_log_prob(flow, (x,), "x")


@pytest.mark.parametrize("name", ["inputs", "context"])
def test_data_are_named_by_row_and_feature(x, name):
    batch = {"inputs": x, "context": torch.zeros(6, 3)}
    batch[name][4, 1] = torch.nan
    flow = flow_of(Rotation(2), AffineCoupling(2, partial(MLP, context_features=3)))
    with pytest.raises(FloatingPointError, match=f"the data: {name} of row 4, feature 1, is nan"):
        guarded_log_prob(flow, tuple(batch.values()), "x")


def test_pixels_are_named_by_their_position():
    images = torch.zeros(2, 1, 2, 2)
    images[1, 0, 1, 0] = -torch.inf
    flow = Flow(Composite([Spoil("outputs")]), Normal((1, 2, 2)))
    assert culprit(flow, (images,)) == "the data: inputs of row 1, feature (0, 1, 0), is -inf"


def test_the_base_distribution_is_named(x):
    class HalfPlane(Normal):
        def log_prob(self, inputs, context=None):
            return super().log_prob(inputs).masked_fill(inputs[:, 0] < 0, -torch.inf)

    x = x.abs()
    x[3, 0] = -1.0
    found = culprit(Flow(Rotation(2), HalfPlane(2)), (x,))
    assert "HalfPlane, the base distribution, gives row 3 -inf" in found


def test_the_second_pass_draws_what_the_first_one_did(x):
    # Half of the passes are finite; the message must be that of the pass that was not.
    flow = flow_of(Dequantize(2), Spoil("outputs", chance=0.5))
    x = x.sigmoid()
    messages = []
    for _ in range(20):
        try:
            guarded_log_prob(flow, (x,), "x")
        except FloatingPointError as error:
            messages.append(str(error))
    assert len(messages) > 4 and all("transforms.1 (Spoil)" in message for message in messages)


def test_no_hook_stays_behind(x):
    flow = flow_of(Spoil("outputs"))
    culprit(flow, (x,))
    assert not any(module._forward_hooks for module in flow.modules())


def test_an_empty_batch_is_finite():
    assert guarded_log_prob(flow_of(Rotation(2)), (torch.zeros(0, 2),), "x").shape == (0,)


class EndlessSlope(Transform):
    """y = x, with an infinite derivative by its parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.zeros(()))

    def forward(self, inputs: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return inputs + self.scale.sqrt(), inputs.new_zeros(len(inputs))


def test_the_first_gradient_that_is_not_finite_is_named(x):
    flow = flow_of(Rotation(2), EndlessSlope())
    flow(x).sum().backward()
    assert non_finite_gradient(flow) == "transform.transforms.1.scale"


def test_large_gradients_are_finite():
    flow = flow_of(coupling())
    for parameter in flow.parameters():
        parameter.grad = torch.full_like(parameter, 1e30)  # their norm overflows
    assert non_finite_gradient(flow) is None


@pytest.mark.parametrize(
    "layer, words",
    [
        (EndlessSlope, ["step 0", "finite, but the gradient of transform.transforms.1.scale"]),
        (partial(Spoil, "outputs"), ["step 0", "transform.transforms.1 (Spoil)"]),
    ],
    ids=["gradient", "loss"],
)
def test_training_stops_before_the_step(fit, layer, words):
    class Insert(pl.Callback):
        def on_train_start(self, trainer, pl_module):
            pl_module.flow.transform.transforms.insert(1, layer())
            self.before = {k: v.clone() for k, v in pl_module.state_dict().items()}
            self.model = pl_module

    insert = Insert()
    with pytest.raises(FloatingPointError) as error:
        fit(callbacks=(insert,))
    for word in words:
        assert word in str(error.value)
    for name, value in insert.model.state_dict().items():
        assert torch.equal(value, insert.before[name]), name


def test_validation_is_guarded(fit, tmp_path):
    class Insert(pl.Callback):
        def on_validation_start(self, trainer, pl_module):
            if trainer.current_epoch == 1:
                pl_module.flow.transform.transforms.insert(1, Spoil("logabsdet"))

    with pytest.raises(FloatingPointError, match=r"val/nll .* epoch 1: nll .* logabsdet .*Spoil"):
        fit(callbacks=(Insert(),))
    assert {path.name for path in (tmp_path / "whole").iterdir()} == {"epoch=0.ckpt"}
