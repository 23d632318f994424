"""Fully connected conditioner."""

from typing import Literal

import torch
from torch import Tensor, nn

from flows.checks import check_at_least
from flows.nets.context import check_context
from flows.nets.hats import Hats

__all__ = ["MLP"]

_ACTIVATIONS = {"silu": nn.SiLU, "relu": nn.ReLU}


class MLP(nn.Module):
    """Residual multilayer perceptron whose outputs start at zero.

    Zero outputs make a coupling layer start as the identity.

    Args:
        in_features: Size of the inputs; 0 for a function of the context alone.
        out_features: Size of the outputs.
        hidden_features: Width.
        blocks: Residual blocks of one hidden layer each.
        context_features: Size of the context, concatenated to the inputs; 0 for none.
        dropout: Dropout in every block.
        activation: ``"silu"`` or ``"relu"``.
        knots: Knots of the :class:`flows.nets.Hats` that every input becomes first; 0 leaves
            the inputs as they are. The context stays as it is.
        bound: Half-width of the interval that the knots divide.

    Shape:
        inputs (batch, in_features) to outputs (batch, out_features)

    Raises:
        ValueError: If a size is too small, ``activation`` is unknown, there are neither inputs nor
            a context, or the context is not of ``context_features`` columns.

    Example:
        >>> import torch
        >>> from flows.nets import MLP
        >>> net = MLP(2, 3, context_features=1)
        >>> net(torch.randn(1, 2), torch.randn(1, 1)).tolist()
        [[0.0, 0.0, 0.0]]
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        hidden_features: int = 64,
        blocks: int = 2,
        context_features: int = 0,
        dropout: float = 0.0,
        activation: Literal["silu", "relu"] = "silu",
        knots: int = 0,
        bound: float = 4.0,
    ) -> None:
        super().__init__()
        check_at_least(1, hidden_features=hidden_features)
        check_at_least(0, blocks=blocks, context_features=context_features, knots=knots)
        if activation not in _ACTIVATIONS:
            raise ValueError(f"activation must be 'silu' or 'relu', got {activation!r}.")
        if in_features + context_features < 1:
            raise ValueError("a conditioner without inputs needs context_features, got 0.")
        self.context_features = context_features
        self.embed = Hats(in_features, knots=knots, bound=bound) if knots else None
        width = in_features * knots if knots else in_features
        self.first = nn.Linear(width + context_features, hidden_features)
        self.blocks = nn.ModuleList(
            nn.Sequential(
                _ACTIVATIONS[activation](),
                nn.Dropout(dropout),
                nn.Linear(hidden_features, hidden_features),
            )
            for _ in range(blocks)
        )
        self.activation = _ACTIVATIONS[activation]()
        self.last = nn.Linear(hidden_features, out_features)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)

    def forward(self, inputs: Tensor, context: Tensor | None = None) -> Tensor:
        if self.embed is not None:
            inputs = self.embed(inputs)
        if self.context_features:
            check_context(context, self.context_features)
            inputs = torch.cat([inputs, context], dim=-1)
        hidden = self.first(inputs)
        for block in self.blocks:
            hidden = hidden + block(hidden)
        return self.last(self.activation(hidden))
