"""Masked autoregressive conditioner."""

import torch
from torch import Tensor, nn
from torch.nn import functional

from flows.checks import check_at_least
from flows.nets.context import check_context

__all__ = ["MADE"]


class MADE(nn.Module):
    """Residual multilayer perceptron whose outputs for feature d see the features before d only.

    A hidden unit of degree m sees the first m features, and the outputs of feature d see the
    units of degree below d, d = 1, 2, ...: masks on the weights see to it. The context has
    degree 0, so that all outputs see it. Outputs start at zero.

    Args:
        features: Number of features of the inputs.
        parameters_per_feature: Number of outputs for each of them.
        hidden_features: Width, at least ``features``: a unit for every degree.
        blocks: Residual blocks of one hidden layer each.
        context_features: Size of the context, concatenated to the inputs; 0 for none.
        dropout: Dropout in every block.

    Shape:
        inputs (batch, features) to outputs (batch, features, parameters_per_feature)

    Raises:
        ValueError: If sizes do not fit, or the context is not of ``context_features`` columns.

    Reference:
        Germain et al. (2015), MADE, arXiv 1502.03509

    Example:
        >>> import torch
        >>> from flows.nets import MADE
        >>> net = MADE(3, parameters_per_feature=2)
        >>> _ = torch.nn.init.normal_(net.last.weight, std=0.1)
        >>> net(torch.randn(5, 3)).shape
        torch.Size([5, 3, 2])
        >>> torch.equal(*net(torch.randn(2, 3))[:, 0])  # those of the first feature see none
        True
    """

    def __init__(
        self,
        features: int,
        parameters_per_feature: int,
        *,
        hidden_features: int = 64,
        blocks: int = 2,
        context_features: int = 0,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        check_at_least(1, features=features)
        check_at_least(0, blocks=blocks, context_features=context_features)
        if hidden_features < features:
            raise ValueError(
                f"hidden_features must be at least the {features} features, got {hidden_features}."
            )
        self.features = features
        self.context_features = context_features
        seen = torch.arange(1, features + 1)
        seen = torch.cat([seen, seen.new_zeros(context_features)])
        # Units of degree 0 see the context alone: without one they would be constants.
        lowest = 0 if context_features or features == 1 else 1
        hidden = torch.arange(hidden_features) * (features - lowest) // hidden_features + lowest
        # An output of feature d sees as much as a unit of degree d - 1.
        outputs = torch.arange(features).repeat_interleave(parameters_per_feature)
        self.first = MaskedLinear(seen, hidden)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.SiLU(), nn.Dropout(dropout), MaskedLinear(hidden, hidden))
            for _ in range(blocks)
        )
        self.last = MaskedLinear(hidden, outputs)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)

    def forward(self, inputs: Tensor, context: Tensor | None = None) -> Tensor:
        if self.context_features:
            check_context(context, self.context_features)
            inputs = torch.cat([inputs, context], dim=-1)
        hidden = self.first(inputs)
        for block in self.blocks:
            hidden = hidden + block(hidden)
        return self.last(functional.silu(hidden)).unflatten(-1, (self.features, -1))


class MaskedLinear(nn.Linear):
    """Linear layer in which a unit sees the inputs of no higher degree than its own.

    Args:
        in_degrees: Degree of every input, shape (in_features,).
        out_degrees: Degree of every output, shape (out_features,).
    """

    def __init__(self, in_degrees: Tensor, out_degrees: Tensor) -> None:
        super().__init__(len(in_degrees), len(out_degrees))
        # Derived from the degrees, so never saved and never averaged.
        mask = out_degrees[:, None] >= in_degrees
        self.register_buffer("mask", mask, persistent=False)

    def forward(self, inputs: Tensor) -> Tensor:
        return functional.linear(inputs, self.weight * self.mask, self.bias)
