"""What is particular to twists: planes, radii, and what the angles may depend on."""

from functools import partial
from itertools import combinations

import pytest
import torch
from torch import Tensor, nn

from flows.nets import MLP, ConvNet
from flows.transforms import Composite, Twist

NET = partial(MLP, hidden_features=8)
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
each_size = pytest.mark.parametrize("features", [2, 3, 4, 5, 8])


def randomized(
    layer: nn.Module, dtype: torch.dtype = torch.float64, std: float = 0.5
) -> nn.Module:
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=std)
    return layer.to(dtype).eval()


class Recorder(nn.Module):
    """A conditioner of constant angles that remembers what it was made and called with."""

    def __init__(self, in_features: int, out_features: int, value: float = 0.3) -> None:
        super().__init__()
        self.sizes, self.value = (in_features, out_features), value

    def forward(self, inputs: Tensor, context: Tensor | None = None) -> Tensor:
        self.called_with = inputs, context
        return self.value * torch.arange(1, 1 + self.sizes[1]).to(inputs).expand(len(inputs), -1)


def pairs(layer: Twist) -> list[tuple[int, int]]:
    """The planes, found by looking at what a small turn mixes."""
    mixed = Twist(layer.features, partial(Recorder, value=0.01), matching=layer.matching)
    matrix = mixed(torch.eye(layer.features))[0] != 0
    return [(i, j) for i, j in combinations(range(layer.features), 2) if matrix[i, j]]


@each_size
def test_is_a_product_with_unit_complex_numbers(features):
    layer = Twist(features, Recorder, matching=1)
    x, context = torch.randn(6, features, dtype=torch.float64), torch.randn(6, 1)
    y, _ = layer(x, context)
    planes = pairs(layer)
    assert len(planes) == features // 2 and len({*sum(planes, ())}) == 2 * len(planes)
    fed, passed = layer.net.called_with
    single = [k for k in range(features) if k not in sum(planes, ())]
    assert layer.net.sizes == (len(planes) + len(single), len(planes)) and passed is context
    used = []
    for i, j in planes:
        before, after = torch.complex(x[:, i], x[:, j]), torch.complex(y[:, i], y[:, j])
        angle = (after / before).angle()
        number = round(angle[0].item() / 0.3)
        torch.testing.assert_close(angle, torch.full_like(angle, 0.3 * number))
        torch.testing.assert_close(fed[:, number - 1], torch.log1p(before.abs() ** 2))
        used.append(number)
    assert sorted(used) == list(range(1, 1 + len(planes)))
    if single:
        torch.testing.assert_close(fed[:, -1], x[:, single[0]].asinh())
        assert torch.equal(y[:, single[0]], x[:, single[0]])


@each_size
def test_successive_matchings_pair_every_feature_with_every_other_once(features):
    rounds = features - 1 if features % 2 == 0 else features
    met = [pair for k in range(rounds) for pair in pairs(Twist(features, NET, matching=k))]
    assert sorted(met) == list(combinations(range(features), 2))
    assert pairs(Twist(features, NET, matching=rounds + 1)) == pairs(
        Twist(features, NET, matching=1 % rounds)
    )


@each_size
def test_radii_are_kept_and_every_angle_depends_on_all_of_them(features):
    layer = randomized(Twist(features, NET))
    x = torch.randn(6, features, dtype=torch.float64)
    y, _ = layer(x)
    planes = pairs(layer)
    for i, j in planes:
        torch.testing.assert_close(x[:, i].hypot(x[:, j]), y[:, i].hypot(y[:, j]))
        assert (x[:, i] != y[:, i]).all()
    for k in range(features):
        changed = x.clone()
        changed[:, k] *= 1.5
        moved = layer(changed)[0] != y
        assert all(moved[:, [i, j]].all() for i, j in planes)


def test_the_sign_of_a_single_feature_matters():
    layer = randomized(Twist(3, NET))
    (i, j), x = pairs(layer)[0], torch.randn(6, 3, dtype=torch.float64)
    single = 3 - i - j
    flipped = x.clone()
    flipped[:, single] *= -1
    assert (layer(x)[0] != layer(flipped)[0]).all()


@each_size
def test_starts_as_the_identity(features):
    x = torch.randn(20, features)
    for direction in (Twist(features, MLP), Twist(features, MLP).inverse):
        assert torch.equal(direction(x)[0], x)


def test_conditioner_of_images_sees_neighbouring_radii():
    layer = randomized(Twist(4, partial(ConvNet, hidden_features=4)))
    x = torch.randn(1, 4, 5, 5, dtype=torch.float64, requires_grad=True)
    y, _ = layer(x)
    (gradient,) = torch.autograd.grad(y[0, :, 2, 2].sum(), x)
    assert (gradient[0, :, 1:4, 1:4] != 0).all()
    torch.testing.assert_close(layer.inverse(y)[0], x)


@each_dtype
@pytest.mark.parametrize("scale", [0.0, 1e-6, 1e3, 1e6])
def test_inverse_holds_for_tiny_and_large_inputs(dtype, scale):
    # Rounding of the radii turns the angles by as much, times the slope of the conditioner.
    layer = randomized(Twist(5, NET), dtype, std=0.3)
    x = (scale * torch.randn(500, 5, dtype=dtype)).requires_grad_()
    y, _ = layer(x)
    tolerance = 100 * torch.finfo(dtype).eps * max(scale, 1e-30)
    torch.testing.assert_close(layer.inverse(y)[0], x, atol=tolerance, rtol=0)
    y.sum().backward()
    assert x.grad.isfinite().all()


def test_keeps_volume_to_rounding_also_where_the_conditioner_is_steep():
    layers = Composite([randomized(Twist(5, NET, matching=k), std=0.7) for k in range(3)])
    for x in 3 * torch.randn(10, 5, dtype=torch.float64):
        matrix = torch.autograd.functional.jacobian(lambda x: layers(x[None])[0][0], x)
        assert abs(torch.linalg.slogdet(matrix).logabsdet) < 1e-9
        assert matrix.std() > 0.1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_coarse_inputs_come_back_under_autocast(dtype):
    layer = randomized(Twist(4, NET), torch.float32)
    x = torch.randn(50, 4).to(dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, _ = layer(x)
        back, _ = layer.inverse(y)
    assert y.dtype == back.dtype == dtype
    torch.testing.assert_close(back, x, atol=0.2, rtol=0)
    for i, j in pairs(layer):
        radii = [z[:, i].float().hypot(z[:, j].float()) for z in (x, y)]
        torch.testing.assert_close(*radii, atol=0, rtol=2 * torch.finfo(dtype).eps)


def test_half_precision_flows_may_hold_it():
    layer = randomized(Twist(5, NET), torch.bfloat16)
    x = torch.randn(50, 5).bfloat16()
    y, logabsdet = layer(x)
    assert y.dtype == logabsdet.dtype == torch.bfloat16
    exact = randomized(Twist(5, NET), torch.float32)
    exact.load_state_dict(layer.state_dict())
    torch.testing.assert_close(y.float(), exact(x.float())[0], atol=0.2, rtol=0)


def test_weights_of_another_matching_are_refused():
    weights = Twist(4, NET).state_dict()
    with pytest.raises(ValueError, match="the layer has twist.4. matching=1"):
        Twist(4, NET, matching=1).load_state_dict(weights)


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match=r"^features must be at least 2, got 1\.$"):
        Twist(1, NET)
