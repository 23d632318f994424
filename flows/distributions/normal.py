"""The standard normal distribution."""

import math

import torch
from torch import Tensor

from flows.distributions.base import Distribution

__all__ = ["Normal"]


class Normal(Distribution):
    r"""Independent standard normals, :math:`N(0, I)`.

    Args:
        shape: Shape of one sample; an int for vectors.

    Shape:
        inputs ``(batch, *shape)`` to log_prob (batch,) in nats; a context is ignored

    Raises:
        ValueError: If ``shape`` holds no sizes, or inputs have another shape.

    Example:
        >>> import torch
        >>> from flows.distributions import Normal
        >>> Normal(2).log_prob(torch.zeros(1, 2))  # -log(2 pi)
        tensor([-1.8379])
    """

    def log_density(self, inputs: Tensor, context: Tensor | None) -> Tensor:
        squares = inputs.square().flatten(1).sum(1)
        return -0.5 * (squares + math.prod(self.shape) * math.log(2 * math.pi))

    def draw(self, like: Tensor, context: Tensor | None, temperature: float) -> Tensor:
        return temperature * torch.randn_like(like)
