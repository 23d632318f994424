"""What is particular to masked autoregressive layers: order, bounds, passes."""

import math
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.functional import jacobian

from flows.nets import MADE, MLP
from flows.transforms import MaskedAutoregressiveAffine, MaskedAutoregressiveSpline

LAYERS = {"affine": MaskedAutoregressiveAffine, "spline": MaskedAutoregressiveSpline}
each_layer = pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS)
NET = partial(MADE, hidden_features=8)


def randomized(transform: nn.Module) -> nn.Module:
    for parameter in transform.parameters():
        nn.init.normal_(parameter, std=0.5)
    return transform.double().eval()


class Constant(nn.Module):
    """A conditioner that ignores its inputs, and counts its calls."""

    def __init__(self, features: int, parameters: int, values: tuple[float, ...]) -> None:
        super().__init__()
        self.shape, self.values, self.calls = (features, parameters), values, 0

    def forward(self, inputs: Tensor, context: Tensor | None = None) -> Tensor:
        self.calls += 1
        return inputs.new_tensor(self.values).expand(len(inputs), *self.shape)


@each_layer
@pytest.mark.parametrize("features", [1, 2, 5])
@pytest.mark.parametrize("reverse", [False, True])
def test_starts_as_the_identity(layer, features, reverse):
    x = torch.randn(20, features)
    outputs, logabsdet = layer(features, NET, reverse=reverse)(x)
    torch.testing.assert_close(outputs, x, atol=1e-5, rtol=0)
    torch.testing.assert_close(logabsdet, torch.zeros(20), atol=1e-5, rtol=0)


@each_layer
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("direction", ["forward", "inverse"])
def test_jacobian_is_triangular_in_the_order_of_the_features(layer, reverse, direction):
    transform = randomized(layer(4, NET, reverse=reverse))
    x = torch.randn(1, 4, dtype=torch.float64)
    matrix = jacobian(lambda x: getattr(transform, direction)(x)[0], x)[0, :, 0]
    matrix = matrix.T if reverse else matrix
    assert (matrix.diagonal() > 0).all()
    assert not matrix.triu(1).any() and (matrix.tril(-1) != 0).sum() == 6


def test_affine_values_worked_out_by_hand():
    net = partial(Constant, values=(0.5, 3.0))  # shift and raw log-scale
    x = torch.randn(6, 3, dtype=torch.float64)
    outputs, logabsdet = MaskedAutoregressiveAffine(3, net, bound=1.5)(x)
    log_scale = 1.5 * math.tanh(2.0)
    torch.testing.assert_close(outputs, math.exp(log_scale) * x + 0.5)
    torch.testing.assert_close(logabsdet, torch.full_like(logabsdet, 3 * log_scale))


@each_layer
@pytest.mark.parametrize("features", [1, 4])
def test_forward_asks_the_conditioner_once_and_inverse_once_per_feature(layer, features):
    transform = layer(features, partial(Constant, values=(0.1,)))
    transform(torch.randn(2, features))
    assert transform.net.calls == 1
    transform.inverse(torch.randn(2, features))
    assert transform.net.calls == 1 + features


@each_layer
def test_autocast_rounds_what_the_conditioner_says_but_not_what_is_done(layer):
    transform = randomized(layer(3, NET)).float()
    x = torch.randn(20, 3)
    with torch.autocast("cpu", torch.bfloat16):
        outputs, logabsdet = transform(x)
        parameters = transform.net(x).float()
    assert outputs.dtype == logabsdet.dtype == torch.float32
    expected, log_derivative = transform.map_features(x, parameters, inverse=False)
    torch.testing.assert_close(outputs, expected, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(logabsdet, log_derivative.sum(1), atol=1e-6, rtol=1e-6)


def test_learns_a_dependence_that_one_triangular_map_can_undo():
    transform = MaskedAutoregressiveAffine(2, partial(MADE, hidden_features=16))
    optimizer = torch.optim.Adam(transform.parameters(), lr=1e-2)
    for _ in range(300):
        x = torch.randn(256, 2)
        x[:, 1] += x[:, 0] ** 2
        z, logabsdet = transform(x)
        loss = (0.5 * z.square().sum(1) + math.log(2 * math.pi) - logabsdet).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    entropy = 1 + math.log(2 * math.pi)
    assert abs(loss.item() - entropy) < 0.25


@each_layer
def test_a_conditioner_without_a_row_per_feature_is_refused(layer):
    transform = layer(2, MLP)
    for direction in (transform.forward, transform.inverse):
        with pytest.raises(ValueError, match=r"^net must return shape \(4, 2, \d+\), got \(4, "):
            direction(torch.randn(4, 2))


@each_layer
def test_images_are_refused(layer):
    for direction in (layer(2, NET).forward, layer(2, NET).inverse):
        with pytest.raises(
            ValueError, match=r"^inputs must be vectors \(batch, 2\), got \(4, 2, "
        ):
            direction(torch.randn(4, 2, 3, 3))


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match=r"^features must be at least 1, got 0\.$"):
        MaskedAutoregressiveAffine(0, NET)
    with pytest.raises(ValueError, match=r"^bound must be finite and greater than 0, got 0\.0\.$"):
        MaskedAutoregressiveAffine(2, NET, bound=0.0)
    with pytest.raises(
        ValueError, match=r"^tail_bound must be finite and greater than 0, got -1\.0\.$"
    ):
        MaskedAutoregressiveSpline(2, NET, tail_bound=-1.0)
    with pytest.raises(ValueError, match=r"^bins must be at least 2, got 1\.$"):
        MaskedAutoregressiveSpline(2, NET, bins=1)
