"""A fixed change of units."""

import math

import torch
from torch import Tensor

from flows.checks import check_at_least
from flows.transforms.base import Transform, any_rows, check_features, mean_and_deviation

__all__ = ["Standardize"]


class Standardize(Transform):
    r"""Per-feature :math:`y = (x - m) / d` with the mean and deviation of the data: fixed units.

    As the first layer of a flow it lets densities and samples stay in the units of the data,
    wherever the flow is used. m and d are those of what the first training-mode ``forward``
    sees, and no parameters; before that the layer is the identity. A feature that is constant
    there is only centred.

    Outputs have the dtype of the layer, so it may stand between float64 data and a float32
    flow: the mean is taken off in float64, and columns such as 1,000,000 plus small numbers
    lose nothing. Samples of a float32 flow are rounded to float32; those of ``flow.double()``
    are not.

    Args:
        features: Size of axis 1: features of vectors, channels of images.

    Shape:
        inputs (batch, features, ...) to outputs of the same shape, logabsdet (batch,) in nats.

    Raises:
        ValueError: If ``features`` is below 1 or not that of the inputs, or the first batch is
            not finite.

    Example:
        >>> import torch
        >>> from flows import Standardize
        >>> outputs, logabsdet = Standardize(1)(torch.tensor([[1000.0], [1004.0]]))
        >>> outputs.tolist()
        [[-1.0], [1.0]]
        >>> logabsdet  # -log 2
        tensor([-0.6931, -0.6931])
    """

    def __init__(self, features: int) -> None:
        super().__init__()
        check_at_least(1, features=features)
        self.features = features
        # The mean is the sum of two float32 numbers, which hold it also in a float32 flow.
        self.register_buffer("mean", torch.zeros(features))
        self.register_buffer("mean_rest", torch.zeros(features))
        self.register_buffer("deviation", torch.ones(features))
        self.register_buffer("initialized", torch.tensor(False))

    def forward(self, inputs: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        check_features(inputs, self.features)
        if self.training and not self.initialized:
            self._initialize(inputs)
        mean, rest, deviation = self._per_feature(inputs)
        centred = inputs - mean - rest
        return centred.to(deviation.dtype) / deviation, -self._log_volume(inputs)

    def inverse(self, inputs: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        check_features(inputs, self.features)
        mean, rest, deviation = self._per_feature(inputs)
        return (inputs * deviation + rest) + mean, self._log_volume(inputs)

    def _per_feature(self, inputs: Tensor) -> tuple[Tensor, ...]:
        shape = (-1,) + (1,) * (inputs.ndim - 2)
        return tuple(b.view(shape) for b in (self.mean, self.mean_rest, self.deviation))

    def _log_volume(self, inputs: Tensor) -> Tensor:
        """Sum of log d over all entries of a sample, shape (batch,)."""
        positions = math.prod(inputs.shape[2:])
        return (positions * self.deviation.log().sum()).repeat(inputs.shape[0])

    @torch.no_grad()
    def _initialize(self, inputs: Tensor) -> None:
        if not any_rows(inputs):
            return
        mean, deviation = mean_and_deviation(inputs)
        self.mean.copy_(mean.float())
        self.mean_rest.copy_(mean - self.mean)
        self.deviation.copy_(deviation)
        self.initialized.fill_(True)

    def extra_repr(self) -> str:
        return f"features={self.features}"
