"""Numbers as a context, in fixed units."""

from torch import Tensor, nn

from flows.nets.context import check_context
from flows.transforms.standardize import Standardize

__all__ = ["StandardizedContext"]


class StandardizedContext(nn.Module):
    """Context columns less their mean, over their deviation: an ``embedding_net`` of a flow.

    Mean and deviation are those of the first context seen in training mode, as in
    :class:`flows.transforms.Standardize`; users hand over contexts in their own units.

    Args:
        features: Columns of the context, at least 1.

    Shape:
        (batch, features) to (batch, features)

    Raises:
        ValueError: If ``features`` is below 1, or the context has another number of columns.

    Example:
        >>> import torch
        >>> from flows.nets import StandardizedContext
        >>> StandardizedContext(1)(torch.tensor([[1000.0], [1004.0]]))
        tensor([[-1.],
                [ 1.]])
    """

    def __init__(self, features: int) -> None:
        super().__init__()
        self.features = features
        self.standardize = Standardize(features)

    def forward(self, context: Tensor) -> Tensor:
        check_context(context, self.features)
        return self.standardize(context)[0]
