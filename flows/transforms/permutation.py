"""A fixed random order of the features."""

import torch
from torch import Tensor

from flows.checks import check_at_least
from flows.transforms.base import Transform, check_features

__all__ = ["Permutation"]


class Permutation(Transform):
    r"""Axis 1 in another order, :math:`y_d = x_{\pi(d)}`.

    :math:`\pi` is drawn once at random and kept in the state.

    Args:
        features: Size of axis 1: features of vectors, channels of images.

    Shape:
        inputs (batch, features, ...) to outputs of the same shape, logabsdet (batch,), zero.

    Raises:
        ValueError: If ``features`` is below 1 or not that of the inputs.

    Example:
        >>> import torch
        >>> from flows import Permutation
        >>> layer = Permutation(4)
        >>> outputs, logabsdet = layer(torch.tensor([[1.0, 2.0, 3.0, 4.0]]))
        >>> outputs.sort().values, layer.inverse(outputs)[0]
        (tensor([[1., 2., 3., 4.]]), tensor([[1., 2., 3., 4.]]))
    """

    volume_preserving = True

    def __init__(self, features: int) -> None:
        super().__init__()
        check_at_least(1, features=features)
        self.register_buffer("order", torch.randperm(features))

    def forward(self, inputs: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        check_features(inputs, len(self.order))
        return inputs.index_select(1, self.order), inputs.new_zeros(inputs.shape[0])

    def inverse(self, inputs: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        check_features(inputs, len(self.order))
        return inputs.index_select(1, self.order.argsort()), inputs.new_zeros(inputs.shape[0])

    def extra_repr(self) -> str:
        return f"features={len(self.order)}"
