"""Squeeze and Multiscale: what goes where."""

import pytest
import torch
from torch import Tensor

from flows.transforms import Composite, Multiscale, Rotation1x1, Squeeze, Transform


class Scale(Transform):
    """Multiplies by a number, so that one sees which level a value has passed."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, inputs: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        log = torch.tensor(self.factor).log() * inputs[0].numel()
        return self.factor * inputs, log.expand(len(inputs)).to(inputs)

    def inverse(self, inputs: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        outputs, logabsdet = self.forward(inputs)
        return inputs / self.factor, -logabsdet


def test_squeeze_makes_four_channels_of_every_patch():
    image = torch.arange(16.0).view(1, 1, 4, 4)
    outputs, logabsdet = Squeeze()(image)
    assert outputs[0, :, 0, 0].tolist() == [0, 1, 4, 5]
    assert outputs[0, :, 1, 1].tolist() == [10, 11, 14, 15]
    assert outputs.shape == (1, 4, 2, 2) and torch.equal(logabsdet, torch.zeros(1))


@pytest.mark.parametrize("shape", [(2, 1, 3, 4), (2, 1, 4, 3), (2, 4), (2, 4, 4)], ids=str)
def test_squeeze_refuses_other_shapes(shape):
    with pytest.raises(ValueError, match="of even height and width, got"):
        Squeeze()(torch.zeros(shape))


@pytest.mark.parametrize("shape", [(2, 3, 4, 4), (2, 4)], ids=str)
def test_unsqueeze_refuses_other_shapes(shape):
    with pytest.raises(ValueError, match="a multiple of four channels, got"):
        Squeeze().inverse(torch.zeros(shape))


@pytest.mark.parametrize("shape", [(1, 4, 4), (3, 8, 16), (2, 32, 8)], ids=str)
@pytest.mark.parametrize("levels", [1, 2])
def test_shapes_are_those_that_the_levels_see(shape, levels):
    seen = []

    class Spy(Scale):
        def forward(self, inputs, context=None):
            seen.append(tuple(inputs.shape[1:]))
            return super().forward(inputs, context)

    layer = Multiscale(shape, [Spy(1.0) for _ in range(levels)])
    outputs, _ = layer(torch.randn(2, *shape))
    assert seen == Multiscale.shapes(shape, levels) == layer.level_shapes
    assert outputs.shape == (2, shape[0] * shape[1] * shape[2])


def test_half_of_the_channels_passes_each_level():
    x = torch.ones(2, 1, 8, 8)
    outputs, logabsdet = Multiscale((1, 8, 8), [Scale(2.0), Scale(3.0), Scale(5.0)])(x)
    assert outputs[0].tolist() == 32 * [2] + 16 * [6] + 16 * [30]
    # 64 values pass the first level, 32 the second and 16 the third.
    expected = torch.tensor([2.0, 3.0, 5.0]).log() @ torch.tensor([64.0, 32.0, 16.0])
    torch.testing.assert_close(logabsdet, expected.expand(2))


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 8, 16)], ids=str)
@pytest.mark.parametrize("levels", [1, 2, 3])
def test_inverse_undoes_forward(shape, levels):
    scales = [Composite([Scale(level + 2.0)]) for level in range(levels)]
    layer = Multiscale(shape, scales).double()
    x = torch.randn(3, *shape, dtype=torch.float64)
    z, logabsdet = layer(x)
    back, inverse_logabsdet = layer.inverse(z)
    torch.testing.assert_close(back, x)
    torch.testing.assert_close(inverse_logabsdet, -logabsdet)


def test_context_reaches_every_level():
    class Spy(Scale):
        def forward(self, inputs, context=None):
            contexts.append(context)
            return super().forward(inputs, context)

        def inverse(self, inputs, context=None):
            contexts.append(context)
            return inputs, inputs.new_zeros(len(inputs))

    contexts, context = [], torch.randn(2, 3)
    layer = Multiscale((1, 4, 4), [Spy(1.0), Spy(1.0)])
    layer.inverse(layer(torch.randn(2, 1, 4, 4), context)[0], context)
    assert [given is context for given in contexts] == 4 * [True]


@pytest.mark.parametrize(
    ("shape", "levels", "message"),
    [
        ((1, 6, 8), 2, "=2 needs .* divisible by 4, got 6 x 8: take levels=1 or pad .* to 8 x 8."),
        ((1, 8, 6), 2, "=2 needs .* divisible by 4, got 8 x 6: take levels=1 or pad .* to 8 x 8."),
        ((1, 28, 28), 3, "by 8, got 28 x 28: take levels=2 or pad the images to 32 x 32."),
        ((3, 32, 12), 4, "by 16, got 32 x 12: take levels=2 or pad the images to 32 x 16."),
        ((3, 4, 7), 1, "levels=1 needs .* by 2, got 4 x 7: pad the images to 4 x 8."),
        ((8, 8), 1, "channels, height, width"),
        ((1, 8, 8), 0, "at least one level, got"),
        ((0, 8, 8), 1, "channels, height, width"),
    ],
    ids=str,
)
def test_sizes_that_cannot_be_halved_are_refused(shape, levels, message):
    with pytest.raises(ValueError, match=message):
        Multiscale.shapes(shape, levels)
    with pytest.raises(ValueError, match=message):
        Multiscale(shape, [Scale(1.0) for _ in range(levels)])


def test_other_images_are_refused():
    layer = Multiscale((1, 4, 4), [Rotation1x1(4)])
    with pytest.raises(ValueError, match=r"^inputs must be images \(1, 4, 4\), got \(1, 8, 8\)"):
        layer(torch.zeros(2, 1, 8, 8))
    with pytest.raises(ValueError, match="inputs must have 16 features on axis 1, got"):
        layer.inverse(torch.zeros(2, 15))
