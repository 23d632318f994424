"""Convolutional conditioner."""

from torch import Tensor, nn

from flows.checks import check_at_least
from flows.nets.context import check_context

__all__ = ["ConvNet"]


class ConvNet(nn.Module):
    """3x3, 1x1 and 3x3 convolutions as in Glow, with outputs that start at zero.

    Args:
        in_features: Channels of the inputs.
        out_features: Channels of the outputs.
        hidden_features: Channels between.
        context_features: Size of the context, a vector per image, which is mapped to a bias
            of the first hidden channels; 0 for none.
        dropout: Dropout of whole hidden channels.

    Shape:
        inputs (batch, in_features, height, width), context (batch, context_features) to
        outputs (batch, out_features, height, width)

    Reference:
        Kingma and Dhariwal (2018), Glow, arXiv 1807.03039
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        hidden_features: int = 64,
        context_features: int = 0,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        check_at_least(1, in_features=in_features, hidden_features=hidden_features)
        check_at_least(0, context_features=context_features)
        self.context_features = context_features
        self.first = nn.Conv2d(in_features, hidden_features, 3, padding=1)
        if context_features:
            self.condition = nn.Linear(context_features, hidden_features, bias=False)
        self.layers = nn.Sequential(
            nn.SiLU(),
            nn.Conv2d(hidden_features, hidden_features, 1),
            nn.SiLU(),
            nn.Dropout2d(dropout),
            nn.Conv2d(hidden_features, out_features, 3, padding=1),
        )
        nn.init.zeros_(self.layers[-1].weight)
        nn.init.zeros_(self.layers[-1].bias)

    def forward(self, inputs: Tensor, context: Tensor | None = None) -> Tensor:
        hidden = self.first(inputs)
        if self.context_features:
            check_context(context, self.context_features)
            hidden = hidden + self.condition(context)[:, :, None, None]
        return self.layers(hidden)
