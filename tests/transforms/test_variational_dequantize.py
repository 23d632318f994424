"""Learned noise for dequantization: its density, the bound, where it starts."""

import math
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from flows.nets import MLP, ConvNet
from flows.transforms import Dequantize, InputOutsideDomain, VariationalDequantize

NET = partial(MLP, hidden_features=8)
CONV_NET = partial(ConvNet, hidden_features=8)
LAYERS = {
    "vectors": (lambda: VariationalDequantize(3, NET, 4), (3,)),
    "images": (lambda: VariationalDequantize(2, CONV_NET, 4), (2, 1, 3)),
    "squeezed images": (lambda: VariationalDequantize(1, CONV_NET, 4, squeeze=True), (1, 2, 4)),
}
each_layer = pytest.mark.parametrize(("make", "shape"), LAYERS.values(), ids=LAYERS)


def randomized(layer: nn.Module, std: float = 0.3) -> nn.Module:
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=std)
    return layer.eval()


def levels(rows: int, shape: tuple[int, ...]) -> Tensor:
    return torch.randint(0, 4, (rows, *shape)) / 4


@each_layer
def test_starts_as_uniform_noise_exactly(make, shape):
    x = levels(20_000 // math.prod(shape), shape)
    y, logabsdet = make()(x)
    assert not logabsdet.any()
    u, _ = (4 * (y - x)).flatten().sort()
    even = torch.linspace(0, 1, len(u))
    assert (u - even).abs().max() < 1.95 / math.sqrt(len(u))  # Kolmogorov-Smirnov, p = 0.001


@each_layer
def test_inverse_gives_back_the_level(make, shape):
    layer, x = randomized(make(), std=1.0), levels(500, shape)
    y, logabsdet = layer(x)
    back, nothing = layer.inverse(y)
    assert torch.equal(back, x)
    assert logabsdet.any() and torch.equal(nothing, torch.zeros(500))
    assert y.min() >= 0 and y.max() <= 1


@each_layer
def test_density_of_the_noise_gives_every_box_its_volume(make, shape):
    # The mean over samples of q of 1 / q, where the noise is in a box, is the box's volume.
    layer = randomized(make().double(), std=0.2)
    x = levels(1, shape).double().expand(60_000, *shape)
    with torch.no_grad():
        y, logabsdet = layer(x)
    noise, weights = (4 * (y - x)).flatten(1), logabsdet.exp()
    assert weights.std() > 0.2
    for first, second in [(1.0, 1.0), (0.5, 1.0), (1.0, 0.3), (0.7, 0.6), (0.2, 0.5)]:
        inside = (noise[:, 0] < first) & (noise[:, -1] < second)
        shares = weights * inside
        error = shares.std() / math.sqrt(len(x))
        assert error < 0.02
        assert abs(shares.mean() - first * second) < 5 * error


def test_every_pixel_gets_noise_that_depends_on_every_level_near_it():
    layer = randomized(VariationalDequantize(1, CONV_NET, 4, squeeze=True), std=0.2)
    x = levels(1, (1, 4, 4)).requires_grad_()
    y, _ = layer(x)
    (gradient,) = torch.autograd.grad((y - x)[0, 0, 1, 2], x)
    assert (gradient[0, 0, :, :] != 0).all()


class Power:
    """The density of independent y with distribution function y^a on [0, 1]."""

    exponent = 6.0

    def log_prob(self, y: Tensor) -> Tensor:
        return (math.log(self.exponent) + (self.exponent - 1) * y.log()).sum(1)

    def log_prob_of_bins(self, x: Tensor, count: int) -> Tensor:
        """Of data scaled to [0, 1]: the mean density over each bin."""
        return (count * ((x + 1 / count) ** self.exponent - x**self.exponent)).log().sum(1)


def test_bound_stays_below_the_truth_and_learning_tightens_it():
    density, layer = Power(), VariationalDequantize(2, NET, 2)
    x = torch.cartesian_prod(torch.tensor([0.0, 0.5]), torch.tensor([0.0, 0.5])).repeat(500, 1)
    exact = density.log_prob_of_bins(x, 2)

    def gap() -> Tensor:
        y, logabsdet = layer(x)
        return exact - density.log_prob(y) - logabsdet

    y, _ = Dequantize(2)(x)
    uniform = (exact - density.log_prob(y)).mean()
    assert abs(gap().mean() - uniform) < 0.5 and uniform > 2.5
    optimizer = torch.optim.Adam(layer.parameters(), lr=1e-2)
    for _ in range(150):
        optimizer.zero_grad()
        gap().mean().backward()
        optimizer.step()
    with torch.no_grad():
        learned = gap()
    assert learned.mean() < 0.02 * uniform
    error = learned.std() / math.sqrt(len(x))
    assert learned.mean() > -5 * error
    # Importance weights tell the probability of the bins without bias.
    weights = (-learned).exp()
    assert abs(weights.mean() - 1) < 5 * weights.std() / math.sqrt(len(x))


def test_every_call_draws_new_noise_also_in_eval_mode():
    layer, x = VariationalDequantize(2, NET, 4).eval(), levels(3, (2,))
    assert not torch.equal(layer(x)[0], layer(x)[0])


def test_extreme_noise_stays_in_the_bin():
    layer = VariationalDequantize(2, NET, 4)
    for value in (-1e3, 1e3):
        for coupling in layer.couplings:
            nn.init.constant_(coupling.net.net.last.bias, value)
        x = levels(50, (2,)).requires_grad_()
        y, logabsdet = layer(x)
        assert torch.equal(layer.inverse(y)[0], x)
        (y.sum() + logabsdet.sum()).backward()
        assert logabsdet.isfinite().all() and x.grad.isfinite().all()


@pytest.mark.parametrize("value", [-0.1, 2.0, math.nan])
def test_values_outside_the_unit_interval_are_refused(value):
    with pytest.raises(InputOutsideDomain, match=r"^inputs must lie in \[0, 1\], got "):
        VariationalDequantize(2, NET)(torch.tensor([[0.5, value]]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"features": 1}, r"^features must be at least 2, got 1\.$"),
        ({"features": 0, "squeeze": True}, r"^features must be at least 1, got 0\.$"),
        ({"features": 2, "grey_levels": 1}, r"^grey_levels must be at least 2, got 1\.$"),
        ({"features": 2, "layers": 1}, r"^layers must be at least 2, got 1\.$"),
    ],
    ids=str,
)
def test_bad_arguments_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        VariationalDequantize(net=NET, **options)


@pytest.mark.parametrize("shape", [(1, 3, 4), (1, 4, 3), (1,)])
def test_what_cannot_be_squeezed_is_refused(shape):
    layer = VariationalDequantize(1, CONV_NET, 4, squeeze=True)
    with pytest.raises(ValueError, match=r"^inputs must be images .* even height and width, got"):
        layer(levels(2, shape))
