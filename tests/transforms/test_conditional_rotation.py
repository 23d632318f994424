"""Rotations by angles from the context: values by the definition, precision, schedules."""

from functools import partial

import pytest
import torch
from torch import nn

from flows import givens
from flows.nets import MLP
from flows.transforms import ConditionalRotation

NET = partial(MLP, hidden_features=8, blocks=1, context_features=2)
POSITIONS = {"vectors": (), "sequences": (4,), "images": (2, 3)}
each_shape = pytest.mark.parametrize("positions", POSITIONS.values(), ids=POSITIONS)


def learned(*args):
    layer = ConditionalRotation(*args)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.5)
    return layer


@each_shape
@pytest.mark.parametrize("schedule", [None, givens.odd_even(5), givens.crossing(5).frame(2)])
def test_turns_each_sample_by_its_own_angles_alike_everywhere(positions, schedule):
    layer = learned(5, NET, schedule).double()
    x, context = torch.randn(4, 5, *positions).double(), torch.randn(4, 2).double()
    outputs, _ = layer(x, context)
    for row in range(4):
        angles = layer.net(context.new_zeros(1, 0), context[row : row + 1])[0]
        u = givens.matrix(angles, schedule or givens.crossing(5), impl="reference")
        torch.testing.assert_close(outputs[row].view(5, -1), u @ x[row].view(5, -1))


@each_shape
def test_starts_as_the_identity_and_can_leave_it(positions):
    layer = ConditionalRotation(4, NET)
    x, context = torch.randn(6, 4, *positions), torch.randn(6, 2)
    outputs, _ = layer(x, context)
    assert torch.equal(outputs, x)
    outputs.pow(3).sum().backward()
    assert (layer.net.last.bias.grad != 0).all()


@each_shape
def test_autocast_rounds_the_angles_but_not_the_rotation(positions):
    layer = learned(6, NET)
    x, context = torch.randn(5, 6, *positions), torch.randn(5, 2)
    with torch.autocast("cpu", torch.bfloat16):
        outputs, _ = layer(x, context)
        back, _ = layer.inverse(outputs, context)
    assert outputs.dtype == back.dtype == torch.float32
    torch.testing.assert_close(outputs.norm(dim=1), x.norm(dim=1), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(back, x, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(outputs, layer(x, context)[0], atol=0.1, rtol=0.1)


@pytest.mark.parametrize(
    ("features", "schedule", "message"),
    [
        (1, None, "features must be at least 2, got 1"),
        (4, givens.crossing(5), r"schedule must have dimension 4, got crossing\(5\)"),
        (4, givens.cosine_sine(4), r"must not be degenerate at .* got cosine_sine\(4\)"),
        (4, givens.cosine_sine(4).first_rounds(1), "must not be degenerate"),
    ],
    ids=["one feature", "other dimension", "degenerate", "degenerate, restricted"],
)
def test_bad_arguments_are_refused(features, schedule, message):
    with pytest.raises(ValueError, match=message):
        ConditionalRotation(features, NET, schedule)


@pytest.mark.parametrize("strict", [True, False], ids=["strict", "lax"])
def test_weights_of_another_schedule_are_refused_and_change_nothing(strict):
    layer, other = ConditionalRotation(4, NET), learned(4, NET, givens.odd_even(4))
    before = [p.clone() for p in layer.parameters()]
    with pytest.raises(ValueError, match=r"odd_even\(4\), the layer has crossing\(4\)"):
        layer.load_state_dict(other.state_dict(), strict=strict)
    assert all(map(torch.equal, layer.parameters(), before))


def test_repr_names_size_and_schedule():
    layer = ConditionalRotation(4, NET, givens.crossing(4).frame(2))
    start = repr(layer).splitlines()[1].strip()
    assert start == "features=4, schedule=crossing(4).frame(2)"
