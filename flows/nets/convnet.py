"""Convolutional conditioner."""

from torch import Tensor, nn

from flows.checks import check_at_least

__all__ = ["ConvNet"]


class ConvNet(nn.Module):
    """3x3, 1x1 and 3x3 convolutions as in Glow, with outputs that start at zero.

    Args:
        in_features: Channels of the inputs.
        out_features: Channels of the outputs.
        hidden_features: Channels between.
        dropout: Dropout of whole hidden channels.

    Shape:
        inputs (batch, in_features, height, width) to outputs
        (batch, out_features, height, width)

    Reference:
        Kingma and Dhariwal (2018), Glow, arXiv 1807.03039
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        hidden_features: int = 64,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        check_at_least(1, hidden_features=hidden_features)
        self.layers = nn.Sequential(
            nn.Conv2d(in_features, hidden_features, 3, padding=1),
            nn.SiLU(),
            nn.Conv2d(hidden_features, hidden_features, 1),
            nn.SiLU(),
            nn.Dropout2d(dropout),
            nn.Conv2d(hidden_features, out_features, 3, padding=1),
        )
        nn.init.zeros_(self.layers[-1].weight)
        nn.init.zeros_(self.layers[-1].bias)

    def forward(self, inputs: Tensor, context: Tensor | None = None) -> Tensor:
        if context is not None:
            raise ValueError("this conditioner takes no context, got one.")
        return self.layers(inputs)
