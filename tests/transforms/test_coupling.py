"""What is particular to couplings: halves, bounds and conditioners."""

from functools import partial

import pytest
import torch
from torch import Tensor, nn

from flows.nets import MLP
from flows.transforms import AffineCoupling, SplineCoupling

COUPLINGS = {"affine": AffineCoupling, "spline": SplineCoupling}
each_coupling = pytest.mark.parametrize("coupling", COUPLINGS.values(), ids=COUPLINGS)
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


@each_coupling
@each_side
@pytest.mark.parametrize("features", [2, 4, 5])
def test_keeps_the_smaller_half_and_conditions_on_it(coupling, flip, features):
    layer = coupling(features, partial(Recorder, value=0.7), flip=flip)
    x, context = torch.randn(6, features), torch.randn(6, 1)
    outputs, _ = layer(x, context)
    half = features // 2
    kept = slice(features - half, None) if flip else slice(half)
    moved = slice(features - half) if flip else slice(half, None)
    assert torch.equal(outputs[:, kept], x[:, kept])
    assert (outputs[:, moved] != x[:, moved]).all()
    inputs, passed = layer.net.called_with
    assert torch.equal(inputs, x[:, kept]) and passed is context
    per_feature = 2 if coupling is AffineCoupling else 3 * 8 - 1
    assert layer.net.sizes == (half, (features - half) * per_feature)


@each_coupling
@each_side
def test_starts_as_the_identity(coupling, flip):
    x = torch.randn(20, 5)
    outputs, logabsdet = coupling(5, MLP, flip=flip)(x)
    torch.testing.assert_close(outputs, x, atol=1e-5, rtol=0)
    torch.testing.assert_close(logabsdet, torch.zeros(20), atol=1e-5, rtol=0)


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


@each_coupling
def test_bad_arguments_are_refused(coupling):
    with pytest.raises(ValueError, match=r"^features must be at least 2, got 1\.$"):
        coupling(1, MLP)


def test_a_bound_that_is_not_positive_is_refused():
    with pytest.raises(ValueError, match=r"^bound must be greater than 0, got 0\.0\.$"):
        AffineCoupling(2, MLP, bound=0.0)
    with pytest.raises(ValueError, match=r"^tail_bound must be greater than 0, got -1\.0\.$"):
        SplineCoupling(2, MLP, tail_bound=-1.0)
    with pytest.raises(ValueError, match=r"^bins must be at least 2, got 1\.$"):
        SplineCoupling(2, MLP, bins=1)
