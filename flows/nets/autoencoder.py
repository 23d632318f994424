"""Convolutional encoder and decoder between images and vectors."""

from torch import Tensor, nn

from flows.checks import check_at_least

__all__ = ["ConvDecoder", "ConvEncoder"]

# Height and width are halved twice.
FACTOR = 4


class ConvEncoder(nn.Module):
    """Images to vectors: convolutions that halve height and width twice, then a linear map.

    Args:
        shape: Shape (channels, height, width) of one image, height and width multiples of 4.
        out_features: Size of the vectors.
        hidden_features: Channels of the first convolution; twice as many behind it.
        dropout: Dropout of the features before the linear map.

    Shape:
        inputs (batch, channels, height, width) to outputs (batch, out_features)

    Raises:
        ValueError: If a size is too small, or height or width no multiple of 4.

    Example:
        >>> import torch
        >>> from flows.nets import ConvEncoder
        >>> ConvEncoder((1, 8, 8), out_features=5)(torch.randn(2, 1, 8, 8)).shape
        torch.Size([2, 5])
    """

    def __init__(
        self,
        shape: tuple[int, int, int],
        out_features: int,
        *,
        hidden_features: int = 32,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        check_at_least(1, out_features=out_features, hidden_features=hidden_features)
        channels, height, width = _small(shape)
        wide = 2 * hidden_features
        self.layers = nn.Sequential(
            nn.Conv2d(channels, hidden_features, 3, padding=1),
            nn.SiLU(),
            nn.Conv2d(hidden_features, wide, 3, stride=2, padding=1),
            nn.SiLU(),
            nn.Conv2d(wide, wide, 3, stride=2, padding=1),
            nn.SiLU(),
            nn.Flatten(),
            nn.Dropout(dropout),
            nn.Linear(wide * height * width, out_features),
        )

    def forward(self, inputs: Tensor) -> Tensor:
        return self.layers(inputs)


class ConvDecoder(nn.Module):
    """Vectors to images: the mirror of :class:`ConvEncoder`.

    Args:
        in_features: Size of the vectors.
        shape: Shape (channels, height, width) of one output, height and width multiples of 4.
        hidden_features: Channels before the last convolution; twice as many before those.
        dropout: Dropout of the features behind the linear map.

    Shape:
        inputs (batch, in_features) to outputs (batch, channels, height, width)

    Raises:
        ValueError: If a size is too small, or height or width no multiple of 4.

    Example:
        >>> import torch
        >>> from flows.nets import ConvDecoder
        >>> ConvDecoder(in_features=5, shape=(1, 8, 8))(torch.randn(2, 5)).shape
        torch.Size([2, 1, 8, 8])
    """

    def __init__(
        self,
        in_features: int,
        shape: tuple[int, int, int],
        *,
        hidden_features: int = 32,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        check_at_least(1, in_features=in_features, hidden_features=hidden_features)
        channels, height, width = _small(shape)
        wide = 2 * hidden_features
        self.layers = nn.Sequential(
            nn.Linear(in_features, wide * height * width),
            nn.Dropout(dropout),
            nn.Unflatten(1, (wide, height, width)),
            nn.SiLU(),
            nn.ConvTranspose2d(wide, wide, 4, stride=2, padding=1),
            nn.SiLU(),
            nn.ConvTranspose2d(wide, hidden_features, 4, stride=2, padding=1),
            nn.SiLU(),
            nn.Conv2d(hidden_features, channels, 3, padding=1),
        )

    def forward(self, inputs: Tensor) -> Tensor:
        return self.layers(inputs)


def _small(shape: tuple[int, int, int]) -> tuple[int, int, int]:
    """Channels, and height and width after two halvings."""
    if len(shape) != 3 or min(shape) < 1 or any(side % FACTOR for side in shape[1:]):
        raise ValueError(
            f"shape must be (channels, height, width), height and width multiples of {FACTOR}, "
            f"got {tuple(shape)}."
        )
    channels, height, width = shape
    return channels, height // FACTOR, width // FACTOR
