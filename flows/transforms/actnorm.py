"""Activation normalization."""

import math

import torch
from torch import Tensor, nn

from flows.checks import check_at_least
from flows.transforms.base import Transform, any_rows, check_features, mean_and_deviation

__all__ = ["ActNorm"]


class ActNorm(Transform):
    r"""Per-feature affine map :math:`y = e^{s} x + t`, normalized on the first batch.

    The first training-mode ``forward`` sets s and t so that its outputs have mean 0 and
    standard deviation 1 per feature (per channel for images); a feature that is constant
    there keeps its scale. The flag ``initialized`` is a buffer, so a loaded layer does not
    start over. Where several processes train together, the first batch is that of all, and
    all must take part.

    Args:
        features: Size of axis 1: features of vectors, channels of images.

    Shape:
        inputs (batch, features, ...) to outputs of the same shape, logabsdet (batch,) in nats.

    Raises:
        ValueError: If ``features`` is below 1 or not that of the inputs, or the first batch is
            not finite.

    Reference:
        Kingma and Dhariwal (2018), Glow, arXiv 1807.03039

    Example:
        >>> import torch
        >>> from flows import ActNorm
        >>> layer = ActNorm(1)
        >>> outputs, logabsdet = layer(torch.tensor([[1.0], [5.0]]))  # mean 3, deviation 2
        >>> outputs.round(decimals=4).tolist()
        [[-1.0], [1.0]]
        >>> logabsdet.exp().round(decimals=4).tolist()
        [0.5, 0.5]
    """

    def __init__(self, features: int) -> None:
        super().__init__()
        check_at_least(1, features=features)
        self.features = features
        self.log_scale = nn.Parameter(torch.zeros(features))
        self.shift = nn.Parameter(torch.zeros(features))
        self.register_buffer("initialized", torch.tensor(False))

    def forward(self, inputs: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        check_features(inputs, self.features)
        if self.training and not self.initialized:
            self._initialize(inputs)
        log_scale, shift = self._per_feature(inputs)
        return inputs * log_scale.exp() + shift, self._logabsdet(inputs)

    def inverse(self, inputs: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        check_features(inputs, self.features)
        log_scale, shift = self._per_feature(inputs)
        return (inputs - shift) * (-log_scale).exp(), -self._logabsdet(inputs)

    def _per_feature(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        shape = (-1,) + (1,) * (inputs.ndim - 2)
        return self.log_scale.view(shape), self.shift.view(shape)

    def _logabsdet(self, inputs: Tensor) -> Tensor:
        positions = math.prod(inputs.shape[2:])
        return inputs.new_zeros(inputs.shape[0]) + positions * self.log_scale.sum()

    @torch.no_grad()
    def _initialize(self, inputs: Tensor) -> None:
        if not any_rows(inputs):
            return
        mean, deviation = mean_and_deviation(inputs)
        self.log_scale.copy_(-deviation.log())
        self.shift.copy_(-mean / deviation)
        self.initialized.fill_(True)

    def extra_repr(self) -> str:
        return f"features={self.features}"
