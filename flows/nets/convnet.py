"""Convolutional conditioner."""

from torch import Tensor, nn

from flows.checks import check_at_least
from flows.nets.context import check_context

__all__ = ["ConvNet"]


class ConvNet(nn.Module):
    """Three convolutions, 3x3, 1x1 and 3x3 as in Glow, with outputs that start at zero.

    Args:
        in_features: Channels of the inputs.
        out_features: Channels of the outputs.
        hidden_features: Channels between.
        context_features: Size of the context, a vector per image, which is mapped to a bias
            of the first hidden channels; 0 for none.
        dropout: Dropout of whole hidden channels.
        kernel_sizes: Width of the three kernels, odd. Where there are many outputs, as of
            splines, a last kernel of 1 takes a fraction of the time and of the parameters.

    Shape:
        inputs (batch, in_features, height, width), context (batch, context_features) to
        outputs (batch, out_features, height, width)

    Raises:
        ValueError: If a size is too small, ``kernel_sizes`` are not three odd numbers, or the
            context is not of ``context_features`` columns.

    Reference:
        Kingma and Dhariwal (2018), Glow, arXiv 1807.03039

    Example:
        >>> import torch
        >>> from flows.nets import ConvNet
        >>> outputs = ConvNet(3, 6)(torch.randn(2, 3, 8, 8))
        >>> outputs.shape, outputs.any().item()  # zeros, as yet
        (torch.Size([2, 6, 8, 8]), False)
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        hidden_features: int = 64,
        context_features: int = 0,
        dropout: float = 0.0,
        kernel_sizes: tuple[int, int, int] = (3, 1, 3),
    ) -> None:
        super().__init__()
        check_at_least(1, in_features=in_features, hidden_features=hidden_features)
        check_at_least(0, context_features=context_features)
        if len(kernel_sizes) != 3 or any(size < 1 or size % 2 == 0 for size in kernel_sizes):
            raise ValueError(f"kernel_sizes must be three odd numbers, got {kernel_sizes}.")
        self.context_features = context_features
        first, second, last = kernel_sizes
        self.first = _convolution(in_features, hidden_features, first)
        if context_features:
            self.condition = nn.Linear(context_features, hidden_features, bias=False)
        self.layers = nn.Sequential(
            nn.SiLU(),
            _convolution(hidden_features, hidden_features, second),
            nn.SiLU(),
            nn.Dropout2d(dropout),
            _convolution(hidden_features, out_features, last),
        )
        nn.init.zeros_(self.layers[-1].weight)
        nn.init.zeros_(self.layers[-1].bias)

    def forward(self, inputs: Tensor, context: Tensor | None = None) -> Tensor:
        hidden = self.first(inputs)
        if self.context_features:
            check_context(context, self.context_features)
            hidden = hidden + self.condition(context)[:, :, None, None]
        return self.layers(hidden)


def _convolution(in_features: int, out_features: int, size: int) -> nn.Conv2d:
    """A convolution that keeps height and width."""
    return nn.Conv2d(in_features, out_features, size, padding=size // 2)
