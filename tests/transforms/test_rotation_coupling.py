"""Rotation and SVD couplings: values by the definition, limits, schedules."""

from functools import partial

import pytest
import torch
from torch import nn

from flows import givens
from flows.nets import MLP, ConvNet
from flows.transforms import AdditiveCoupling, AffineCoupling, RotationCoupling, SVDCoupling

SCHEDULES = {"default": lambda n: None, "round_robin": givens.round_robin}
each_schedule = pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
each_coupling = pytest.mark.parametrize("coupling", [RotationCoupling, SVDCoupling])
each_side = pytest.mark.parametrize("flip", [False, True], ids=["first kept", "second kept"])

NETS = {
    (): partial(MLP, hidden_features=8, blocks=1),
    (2, 3): partial(ConvNet, hidden_features=4),
}
each_net = pytest.mark.parametrize(("positions", "net"), NETS.items(), ids=["vectors", "images"])


def learned(coupling, *args, **kwargs):
    layer = coupling(*args, **kwargs).double()
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.5)
    return layer


def split(layer, x):
    """What is kept, what moves, and all the parameters of each moved vector, row by row."""
    kept, moved = x.split(layer.sizes, dim=1)[:: -1 if layer.flip else 1]
    parameters = layer.net(kept)
    return [t.movedim(1, -1).flatten(0, -2) for t in (kept, moved, parameters)]


def moved_outputs(layer, outputs):
    moved = outputs.split(layer.sizes, dim=1)[0 if layer.flip else 1]
    return moved.movedim(1, -1).flatten(0, -2)


@each_net
@each_schedule
@each_side
def test_rotation_coupling_turns_each_vector_by_its_own_angles(positions, net, schedule, flip):
    layer = learned(RotationCoupling, 7, net, schedule=schedule(4), flip=flip)
    x = torch.randn(3, 7, *positions, dtype=torch.float64)
    _, moved, parameters = split(layer, x)
    chosen = schedule(4) or givens.crossing(4)
    expected = [
        givens.matrix(p[4:], chosen, impl="reference") @ v + p[:4]
        for v, p in zip(moved, parameters, strict=True)
    ]
    torch.testing.assert_close(moved_outputs(layer, layer(x)[0]), torch.stack(expected))


@each_net
@each_schedule
@each_side
def test_svd_coupling_maps_each_vector_by_its_own_decomposition(positions, net, schedule, flip):
    layer = learned(SVDCoupling, 7, net, schedule=schedule(4), flip=flip, bound=1.5)
    x = torch.randn(3, 7, *positions, dtype=torch.float64)
    _, moved, parameters = split(layer, x)
    chosen = schedule(4) or givens.crossing(4)
    expected, matrices = [], []
    for v, p in zip(moved, parameters, strict=True):
        shift, raw, left, right = p.split([4, 4, 6, 6])
        left = givens.matrix(left, chosen, impl="reference")
        right = givens.matrix(right, chosen, impl="reference")
        matrices.append(left @ torch.diag((1.5 * (raw / 1.5).tanh()).exp()) @ right.T)
        expected.append(matrices[-1] @ v + shift)
    outputs, logabsdet = layer(x)
    torch.testing.assert_close(moved_outputs(layer, outputs), torch.stack(expected))
    total = torch.linalg.slogdet(torch.stack(matrices)).logabsdet.view(3, -1).sum(1)
    torch.testing.assert_close(logabsdet, total)


@each_net
@pytest.mark.parametrize("features", [2, 5])
def test_svd_coupling_without_angles_is_an_affine_coupling(positions, net, features):
    layer = learned(SVDCoupling, features, net, bound=1.2)
    affine = AffineCoupling(features, net, bound=1.2).double()
    moved = features - features // 2
    last, theirs = list(layer.net.parameters())[-2:], list(affine.net.parameters())
    with torch.no_grad():
        for ours in last:
            ours[2 * moved :] = 0
        for ours, their in zip(layer.net.parameters(), theirs, strict=True):
            their.copy_(ours[: len(their)])
    x = torch.randn(4, features, *positions, dtype=torch.float64)
    torch.testing.assert_close(layer(x), affine(x))
    torch.testing.assert_close(layer.inverse(x), affine.inverse(x))


@each_net
def test_rotation_coupling_of_two_features_only_shifts(positions, net):
    layer = learned(RotationCoupling, 2, net)
    additive = AdditiveCoupling(2, net).double()
    additive.load_state_dict(layer.state_dict(), strict=False)
    x = torch.randn(4, 2, *positions, dtype=torch.float64)
    assert torch.equal(layer(x)[0], additive(x)[0])
    assert torch.equal(layer.inverse(x)[0], additive.inverse(x)[0])


class Huge(nn.Module):
    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.out_features = out_features

    def forward(self, inputs, context=None):
        values = torch.linspace(-1e4, 1e4, self.out_features, dtype=inputs.dtype)
        return values.expand(len(inputs), -1)


def test_any_conditioner_leaves_lengths_and_singular_values_in_bounds():
    x = torch.randn(6, 8)
    difference = torch.randn(6, 4)
    for layer, low, high in [
        (RotationCoupling(8, Huge), 1.0, 1.0),
        (SVDCoupling(8, Huge, bound=0.5), torch.tensor(-0.5).exp(), torch.tensor(0.5).exp()),
    ]:
        both = torch.cat([x, torch.cat([x[:, :4], x[:, 4:] + difference], dim=1)])
        first, second = layer(both.double())[0].split(6)
        ratio = (second - first).norm(dim=1) / difference.norm(dim=1)
        assert (ratio > low - 1e-6).all() and (ratio < high + 1e-6).all()


@each_coupling
def test_all_that_the_conditioner_says_gets_a_gradient(coupling):
    layer = learned(coupling, 6, NETS[()])
    layer(torch.randn(5, 6, dtype=torch.float64))[0].pow(3).sum().backward()
    assert (layer.net.last.bias.grad != 0).all()


@each_coupling
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_works(coupling, dtype):
    layer = learned(coupling, 6, NETS[()]).to(dtype)
    x = torch.randn(5, 6, dtype=dtype)
    outputs, logabsdet = layer(x)
    assert outputs.dtype == logabsdet.dtype == dtype
    torch.testing.assert_close(layer.inverse(outputs)[0], x, atol=0.2, rtol=0.1)


@each_coupling
@pytest.mark.parametrize(
    ("features", "schedule", "message"),
    [
        (4, givens.crossing(4), r"schedule must have dimension 2, got crossing\(4\)"),
        (2, givens.crossing(2), r"schedule must have dimension 1, got crossing\(2\)"),
        (8, givens.cosine_sine(4), r"must not be degenerate at .* got cosine_sine\(4\)"),
    ],
    ids=["other dimension", "nothing to rotate", "degenerate"],
)
def test_schedules_that_do_not_fit_are_refused(coupling, features, schedule, message):
    with pytest.raises(ValueError, match=message):
        coupling(features, MLP, schedule=schedule)


@each_coupling
def test_weights_of_another_schedule_are_refused_and_change_nothing(coupling):
    layer, other = coupling(8, MLP), learned(coupling, 8, MLP, schedule=givens.odd_even(4))
    before = [p.clone() for p in layer.parameters()]
    with pytest.raises(ValueError, match=r"odd_even\(4\), the layer has crossing\(4\)"):
        layer.load_state_dict(other.state_dict())
    assert all(map(torch.equal, layer.parameters(), before))


def test_repr_names_the_schedule():
    start = repr(RotationCoupling(4, MLP)).splitlines()[1].strip()
    assert start == "features=4, flip=False, schedule=crossing(2)"
    start = repr(SVDCoupling(2, MLP)).splitlines()[1].strip()
    assert start == "features=2, flip=False, schedule=None, bound=2.0"
