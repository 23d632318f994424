"""Space to channels, and levels that finish half of the channels each."""

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from flows.transforms.base import Transform, check_features, preserves_volume

__all__ = ["Multiscale", "Squeeze"]


class Squeeze(Transform):
    r"""Space to channels: every 2 x 2 patch of a channel becomes four channels.

    :math:`y_{4c + 2i + j,\, h,\, w} = x_{c,\, 2h + i,\, 2w + j}` with i and j 0 or 1.

    Shape:
        inputs (batch, channels, height, width), height and width even, to outputs
        (batch, 4 * channels, height / 2, width / 2), logabsdet (batch,), zero.

    Raises:
        ValueError: If inputs are no images, height or width is odd, or, for ``inverse``, the
            channels are no multiple of four.

    Reference:
        Dinh et al. (2017), RealNVP, arXiv 1605.08803

    Example:
        >>> import torch
        >>> from flows import Squeeze
        >>> outputs, logabsdet = Squeeze()(torch.arange(16.0).view(1, 1, 4, 4))
        >>> outputs.shape
        torch.Size([1, 4, 2, 2])
        >>> outputs[0, 0]  # the upper left pixel of every patch
        tensor([[ 0.,  2.],
                [ 8., 10.]])
    """

    volume_preserving = True

    def forward(self, inputs: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        if inputs.ndim != 4 or inputs.shape[2] % 2 or inputs.shape[3] % 2:
            raise ValueError(
                "inputs must be images (batch, channels, height, width) of even height and "
                f"width, got {tuple(inputs.shape)}."
            )
        batch, channels, height, width = inputs.shape
        patches = inputs.reshape(batch, channels, height // 2, 2, width // 2, 2)
        outputs = patches.permute(0, 1, 3, 5, 2, 4)
        outputs = outputs.reshape(batch, 4 * channels, height // 2, width // 2)
        return outputs, inputs.new_zeros(inputs.shape[0])

    def inverse(self, inputs: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        if inputs.ndim != 4 or inputs.shape[1] % 4:
            raise ValueError(
                "inputs must be images (batch, channels, height, width) with a multiple of "
                f"four channels, got {tuple(inputs.shape)}."
            )
        batch, channels, height, width = inputs.shape
        patches = inputs.reshape(batch, channels // 4, 2, 2, height, width)
        outputs = patches.permute(0, 1, 4, 2, 5, 3)
        outputs = outputs.reshape(batch, channels // 4, 2 * height, 2 * width)
        return outputs, inputs.new_zeros(inputs.shape[0])


class Multiscale(Transform):
    """Levels of squeeze and transform; after each level half of the channels is finished.

    Level k squeezes its input, applies ``transforms[k]``, which must keep the shape, and
    hands the second half of the channels on; the last level finishes everything. The
    outputs are one flat vector, level after level.

    Args:
        shape: Shape (channels, height, width) of one image; ``levels`` halvings of height
            and width must be possible.
        transforms: One per level. ``Multiscale.shapes(shape, levels)`` gives the shape that
            each will see.

    Shape:
        inputs (batch, channels, height, width) to outputs (batch, channels * height * width),
        logabsdet (batch,) in nats.

    Raises:
        ValueError: If height or width cannot be halved so often, or inputs have another shape.

    Reference:
        Dinh et al. (2017), RealNVP, arXiv 1605.08803

    Example:
        >>> import torch
        >>> from flows import Multiscale, Rotation1x1
        >>> shapes = Multiscale.shapes((1, 8, 8), levels=2)
        >>> shapes
        [(4, 4, 4), (8, 2, 2)]
        >>> layer = Multiscale((1, 8, 8), [Rotation1x1(channels) for channels, _, _ in shapes])
        >>> outputs, logabsdet = layer(torch.randn(5, 1, 8, 8))
        >>> outputs.shape
        torch.Size([5, 64])
    """

    def __init__(self, shape: tuple[int, int, int], transforms: Iterable[Transform]) -> None:
        super().__init__()
        self.transforms = nn.ModuleList(transforms)
        self.squeeze = Squeeze()
        self.shape = tuple(shape)
        self.level_shapes = self.shapes(self.shape, len(self.transforms))

    @property
    def volume_preserving(self) -> bool:
        return all(map(preserves_volume, self.transforms))

    @staticmethod
    def shapes(shape: tuple[int, int, int], levels: int) -> list[tuple[int, int, int]]:
        """Shape that the transform of each level sees, after the squeeze."""
        if len(shape) != 3 or min(shape) < 1 or levels < 1:
            raise ValueError(
                "multiscale needs a shape (channels, height, width) and at least one level, "
                f"got {tuple(shape)} and {levels}."
            )
        channels, height, width = shape
        patch = 2**levels
        if height % patch or width % patch:
            most = max(k for k in range(levels) if height % 2**k == width % 2**k == 0)
            fewer = f"take levels={most} or " if most else ""
            padded = " x ".join(str(-(-size // patch) * patch) for size in (height, width))
            raise ValueError(
                f"levels={levels} needs height and width divisible by {patch}, got "
                f"{height} x {width}: {fewer}pad the images to {padded}."
            )
        return [
            (channels * 2 ** (level + 2), height // 2 ** (level + 1), width // 2 ** (level + 1))
            for level in range(levels)
        ]

    def forward(self, inputs: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        if tuple(inputs.shape[1:]) != self.shape:
            raise ValueError(f"inputs must be images {self.shape}, got {tuple(inputs.shape[1:])}.")
        finished, total = [], inputs.new_zeros(inputs.shape[0])
        for level, transform in enumerate(self.transforms):
            hidden, logabsdet = transform(self.squeeze(inputs)[0], context)
            total = total + logabsdet
            if level + 1 < len(self.transforms):
                done, inputs = hidden.chunk(2, dim=1)
            else:
                done = hidden
            finished.append(done.flatten(1))
        return torch.cat(finished, dim=1), total

    def inverse(self, inputs: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        check_features(inputs, math.prod(self.shape))
        sizes = [math.prod(shape) // 2 for shape in self.level_shapes]
        sizes[-1] *= 2
        total, images = inputs.new_zeros(inputs.shape[0]), None
        levels = zip(self.transforms, self.level_shapes, inputs.split(sizes, 1), strict=True)
        for transform, (_, height, width), done in reversed(list(levels)):
            hidden = done.unflatten(1, (-1, height, width))
            if images is not None:
                hidden = torch.cat([hidden, images], dim=1)
            hidden, logabsdet = transform.inverse(hidden, context)
            total = total + logabsdet
            images = self.squeeze.inverse(hidden)[0]
        return images, total

    def extra_repr(self) -> str:
        return f"shape={self.shape}"
