"""The linear layer by its singular values: W and its factors, starts, context."""

from functools import partial

import pytest
import torch
from torch import nn

from flows import givens
from flows.nets import MLP
from flows.transforms import SVDLinear

NET = partial(MLP, hidden_features=8, blocks=1, context_features=2)
OPTIONS = {
    "plain": {},
    "haar": {"init": "haar"},
    "cosine_sine": {"schedule": givens.cosine_sine(4)},
    "bounded": {"bound": 0.7},
    "context": {"net": NET},
    "all": {"net": NET, "init": "haar", "bound": 1.0, "schedule": givens.round_robin(4)},
}
each_option = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)


def learned(**options):
    layer = SVDLinear(4, **options).double()
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.5)
    return layer


def haar(n):
    return torch.linalg.qr(torch.randn(n, n, dtype=torch.float64)).Q


@each_option
@pytest.mark.parametrize("positions", [(), (2, 3)], ids=["vectors", "images"])
def test_is_the_affine_map_of_its_matrix(options, positions):
    layer = learned(**options)
    x, context = torch.randn(5, 4, *positions).double(), torch.randn(5, 2).double()
    zero, _ = layer(torch.zeros_like(x), context)
    outputs, logabsdet = layer(x, context)
    matrix = layer.matrix(context if "net" in options else None).expand(5, 4, 4)
    mapped = (matrix @ x.view(5, 4, -1)).view_as(x)
    torch.testing.assert_close(outputs - zero, mapped)
    per_position = torch.linalg.slogdet(matrix).logabsdet
    torch.testing.assert_close(logabsdet, x[0, 0].numel() * per_position)
    if "net" not in options:
        torch.testing.assert_close(zero.movedim(1, -1), layer.shift.expand_as(zero.movedim(1, -1)))


def test_singular_values_are_the_scales():
    layer = learned(init="haar")
    expected = layer.log_scale.exp().sort(descending=True).values
    torch.testing.assert_close(torch.linalg.svdvals(layer.matrix()), expected)


def test_context_adds_to_scales_and_shifts_and_rotates_inside():
    layer = learned(init="haar", net=NET)
    x, context = torch.randn(3, 4).double(), torch.randn(3, 2).double()
    given = layer.net(x.new_zeros(3, 0), context)
    outputs, _ = layer(x, context)
    for row in range(3):
        s, b, left, right = given[row].split([4, 4, 6, 6])
        u = layer.left.matrix() @ givens.matrix(left, givens.crossing(4), impl="reference")
        v = layer.right.matrix() @ givens.matrix(right, givens.crossing(4), impl="reference")
        expected = u @ ((layer.log_scale + s).exp() * (v.T @ x[row])) + layer.shift + b
        torch.testing.assert_close(outputs[row], expected)


@each_option
def test_starts_at_init(options):
    x = torch.randn(5, 4)
    context = torch.randn(5, 2)
    layer = SVDLinear(4, **options)
    expected = x @ layer.left.matrix().mT if options.get("init") else x
    outputs, logabsdet = layer(x, context)
    torch.testing.assert_close(outputs, expected, atol=1e-5, rtol=1e-5)
    assert not logabsdet.any()
    start = haar(4).float()
    layer = SVDLinear(4, **{**options, "init": start})
    torch.testing.assert_close(layer(x, context)[0], x @ start.mT, atol=1e-5, rtol=1e-5)


def test_learns_a_given_matrix_from_the_identity():
    target = haar(3) @ torch.diag(torch.tensor([0.3, 1.0, 2.5]).double()) @ haar(3)
    target[0] *= torch.linalg.det(target).sign()
    layer = SVDLinear(3).double()
    optimizer = torch.optim.LBFGS(layer.parameters(), max_iter=200, line_search_fn="strong_wolfe")

    def loss():
        optimizer.zero_grad()
        distance = (layer.matrix() - target).square().sum()
        (distance + layer.shift.square().sum()).backward()
        return distance

    optimizer.step(loss)
    torch.testing.assert_close(layer.matrix(), target, atol=1e-3, rtol=0)


@each_option
def test_recenter_keeps_the_map_and_restarts_the_angles(options):
    layer = learned(**options)
    x, context = torch.randn(5, 4).double(), torch.randn(5, 2).double()
    before = layer(x, context)
    layer.recenter()
    torch.testing.assert_close(layer(x, context), before)
    if "cosine_sine" not in str(layer.left.schedule):
        assert not layer.left.raw_angles.any() and not layer.right.raw_angles.any()


@pytest.mark.parametrize("net", [None, NET], ids=["plain", "context"])
def test_bound_bounds_singular_values(net):
    layer = SVDLinear(4, bound=0.7, net=net)
    context = None if net is None else torch.randn(3, 2)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=100.0)
    values = torch.linalg.svdvals(layer.matrix(context)).log()
    assert values.abs().max() < 0.7 + 1e-5


def test_bound_leaves_small_log_scales_alone():
    layer = SVDLinear(4, bound=0.7).double()
    nn.init.constant_(layer.log_scale, 1e-3)
    torch.testing.assert_close(layer.matrix().det().log().item(), 4e-3, atol=1e-8, rtol=0)


def test_autocast_leaves_the_map_in_full_precision():
    layer = learned(net=NET).float()
    x, context = torch.randn(5, 4), torch.randn(5, 2)
    with torch.autocast("cpu", torch.bfloat16):
        outputs, logabsdet = layer(x, context)
        back, _ = layer.inverse(outputs, context)
    assert outputs.dtype == logabsdet.dtype == torch.float32
    torch.testing.assert_close(back, x, atol=1e-4, rtol=1e-4)


BAD = {
    "one feature": (1, {}, "features must be at least 2, got 1"),
    "bound of zero": (4, {"bound": 0.0}, "bound must be finite and greater than 0, got 0.0"),
    "unknown init": (4, {"init": "random"}, "init must be .* got 'random'"),
    "other dimension": (4, {"schedule": givens.crossing(5)}, "must have dimension 4"),
    "degenerate": (
        4,
        {"schedule": givens.cosine_sine(4), "net": NET},
        r"must not be degenerate at .* got cosine_sine\(4\)",
    ),
}


@pytest.mark.parametrize(("features", "options", "message"), BAD.values(), ids=BAD)
def test_bad_arguments_are_refused(features, options, message):
    with pytest.raises(ValueError, match=message):
        SVDLinear(features, **options)


def test_matrix_needs_the_context_that_it_depends_on():
    with pytest.raises(ValueError, match="context must have 2 features, got None"):
        SVDLinear(4, net=NET).matrix()


def test_weights_of_another_schedule_are_refused():
    with pytest.raises(ValueError, match=r"odd_even\(4\), the layer has crossing\(4\)"):
        SVDLinear(4).load_state_dict(SVDLinear(4, schedule=givens.odd_even(4)).state_dict())
