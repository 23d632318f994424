"""What is particular to couplings: halves, bounds and conditioners."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn

from flows.nets import MLP, ConvNet
from flows.transforms import (
    AdditiveCoupling,
    AffineCoupling,
    Coupling,
    IncompressibleCoupling,
    RotationCoupling,
    SplineCoupling,
    SVDCoupling,
)


class Kind(NamedTuple):
    coupling: type[Coupling]
    parameters: Callable[[int], int]  # moved features -> outputs of the conditioner


COUPLINGS = {
    "additive": Kind(AdditiveCoupling, lambda moved: moved),
    "affine": Kind(AffineCoupling, lambda moved: 2 * moved),
    "incompressible": Kind(IncompressibleCoupling, lambda moved: 2 * moved),
    "rotation": Kind(RotationCoupling, lambda moved: moved + moved * (moved - 1) // 2),
    "svd": Kind(SVDCoupling, lambda moved: 2 * moved + moved * (moved - 1)),
    "spline": Kind(SplineCoupling, lambda moved: (3 * 8 - 1) * moved),
}
each_coupling = pytest.mark.parametrize(
    "coupling", [kind.coupling for kind in COUPLINGS.values()], ids=COUPLINGS
)
each_side = pytest.mark.parametrize("flip", [False, True], ids=["first kept", "second kept"])


class Recorder(nn.Module):
    """A conditioner that remembers what it was made and called with."""

    def __init__(self, in_features: int, out_features: int, value: float = 0.0) -> None:
        super().__init__()
        self.sizes = in_features, out_features
        self.value = value

    def forward(self, inputs: Tensor, context: Tensor | None = None) -> Tensor:
        self.called_with = inputs, context
        return inputs.new_full((len(inputs), self.sizes[1]), self.value)


class Given(nn.Module):
    """A conditioner that answers with what it was given, whatever its inputs."""

    def __init__(self, in_features: int, out_features: int, answer: Tensor) -> None:
        super().__init__()
        self.answer = answer

    def forward(self, inputs: Tensor, context: Tensor | None = None) -> Tensor:
        return self.answer


def randomized(coupling: Coupling) -> Coupling:
    for parameter in coupling.parameters():
        nn.init.normal_(parameter, std=0.3)
    return coupling


@pytest.mark.parametrize("kind", COUPLINGS.values(), ids=COUPLINGS)
@each_side
@pytest.mark.parametrize("features", [2, 4, 5])
def test_keeps_the_smaller_half_and_conditions_on_it(kind, flip, features):
    layer = kind.coupling(features, partial(Recorder, value=0.7), flip=flip)
    x, context = torch.randn(6, features), torch.randn(6, 1)
    outputs, _ = layer(x, context)
    half = features // 2
    kept = slice(features - half, None) if flip else slice(half)
    moved = slice(features - half) if flip else slice(half, None)
    assert torch.equal(outputs[:, kept], x[:, kept])
    assert (outputs[:, moved] != x[:, moved]).all()
    inputs, passed = layer.net.called_with
    assert torch.equal(inputs, x[:, kept]) and passed is context
    assert layer.net.sizes == (half, kind.parameters(features - half))


@each_coupling
@each_side
def test_starts_as_the_identity(coupling, flip):
    x = torch.randn(20, 5)
    outputs, logabsdet = coupling(5, MLP, flip=flip)(x)
    torch.testing.assert_close(outputs, x, atol=1e-5, rtol=0)
    torch.testing.assert_close(logabsdet, torch.zeros(20), atol=1e-5, rtol=0)


@each_coupling
def test_autocast_rounds_what_the_conditioner_says_but_not_what_is_done(coupling):
    layer = randomized(coupling(6, partial(MLP, hidden_features=8)))
    x = torch.randn(20, 6)
    with torch.autocast("cpu", torch.bfloat16):
        outputs, logabsdet = layer(x)
        back, opposite = layer.inverse(outputs)
    assert outputs.dtype == logabsdet.dtype == torch.float32
    torch.testing.assert_close(outputs, layer(x)[0], atol=0.2, rtol=0.2)
    torch.testing.assert_close(back, x, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(opposite, -logabsdet, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("value", [-1e6, -3.0, 0.5, 3.0, 1e6])
def test_affine_scale_is_bounded(value):
    bound = 1.5
    layer = AffineCoupling(4, partial(Recorder, value=value), bound=bound).double()
    x = torch.randn(3, 4, dtype=torch.float64)
    outputs, logabsdet = layer(x)
    log_scale = bound * torch.tensor(value / bound, dtype=torch.float64).tanh()
    assert log_scale.abs() <= bound
    torch.testing.assert_close(logabsdet, 2 * log_scale.expand(3))
    torch.testing.assert_close(outputs[:, 2:], log_scale.exp() * x[:, 2:] + value)


def test_additive_coupling_adds():
    shift = torch.randn(7, 3)
    layer = AdditiveCoupling(5, partial(Given, answer=shift))
    x = torch.randn(7, 5)
    assert torch.equal(layer(x)[0][:, 2:], x[:, 2:] + shift)
    assert torch.equal(layer.inverse(x)[0][:, 2:], x[:, 2:] - shift)


@pytest.mark.parametrize("positions", [(), (2, 3)], ids=["vectors", "images"])
def test_incompressible_log_scales_sum_to_zero_over_all_that_moves(positions):
    shift, raw = torch.randn(2, 4, 3, *positions, dtype=torch.float64)
    net = partial(Given, answer=torch.cat([shift, raw], dim=1))
    layer = IncompressibleCoupling(5, net, bound=0.8)
    x = torch.randn(4, 5, *positions, dtype=torch.float64)
    outputs, logabsdet = layer(x)
    scale = (outputs - layer(torch.zeros_like(x))[0])[:, 2:] / x[:, 2:]
    log_scale = scale.log()
    torch.testing.assert_close(log_scale.flatten(1).sum(1), torch.zeros(4, dtype=torch.float64))
    squeezed = 0.8 * (raw / 0.8).tanh()
    # Differences are those of the bounded log-scales; only their common level has moved.
    level = (squeezed - log_scale).flatten(1)
    torch.testing.assert_close(level, level[:, :1].expand_as(level))
    torch.testing.assert_close(outputs[:, 2:], scale * x[:, 2:] + shift)
    assert not logabsdet.any()
    if positions:
        # A single pixel may change its volume.
        assert log_scale.sum(1).abs().min() > 1e-3


def test_incompressible_coupling_of_one_moved_channel_trades_between_pixels():
    layer = randomized(IncompressibleCoupling(2, partial(ConvNet, hidden_features=3))).double()
    x = torch.randn(4, 2, 3, 3, dtype=torch.float64)
    slope = layer(x + torch.tensor([0.0, 1.0]).view(2, 1, 1))[0] - layer(x)[0]
    assert (slope[:, 1] - 1).abs().amin((1, 2)).max() > 1e-3
    torch.testing.assert_close(slope[:, 1].log().sum((1, 2)), torch.zeros(4, dtype=torch.float64))


def test_incompressible_coupling_of_one_moved_number_only_shifts():
    shift, raw = torch.randn(2, 4, 1)
    layer = IncompressibleCoupling(2, partial(Given, answer=torch.cat([shift, raw], dim=1)))
    x = torch.randn(4, 2)
    torch.testing.assert_close(layer(x)[0][:, 1:], x[:, 1:] + shift)


@each_coupling
def test_bad_arguments_are_refused(coupling):
    for features in (1, 0, -1):
        with pytest.raises(ValueError, match=f"^features must be at least 2, got {features}.$"):
            coupling(features, MLP)


@pytest.mark.parametrize("coupling", [AffineCoupling, IncompressibleCoupling, SVDCoupling])
def test_a_bound_that_is_not_positive_is_refused(coupling):
    with pytest.raises(ValueError, match=r"^bound must be finite and greater than 0, got 0\.0\.$"):
        coupling(2, MLP, bound=0.0)


def test_spline_options_out_of_range_are_refused():
    with pytest.raises(
        ValueError, match=r"^tail_bound must be finite and greater than 0, got -1\.0\.$"
    ):
        SplineCoupling(2, MLP, tail_bound=-1.0)
    with pytest.raises(ValueError, match=r"^bins must be at least 2, got 1\.$"):
        SplineCoupling(2, MLP, bins=1)
