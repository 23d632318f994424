"""The uniform distribution on a box."""

import math

import torch
from torch import Tensor

from flows.distributions.base import Distribution

__all__ = ["Uniform"]


class Uniform(Distribution):
    """Uniform on the closed box [low, high] in every dimension; log_prob is -inf outside.

    The gradient of log_prob is zero everywhere. A temperature shrinks or widens the box
    around its centre: samples at temperatures above 1 may lie outside.

    Args:
        shape: Shape of one sample; an int for vectors.
        low: Lower end of every side.
        high: Upper end of every side, greater than ``low``.

    Shape:
        inputs ``(batch, *shape)`` to log_prob (batch,) in nats; a context is ignored

    Raises:
        ValueError: If ``low`` is not below ``high``, or inputs have another shape.

    Example:
        >>> import torch
        >>> from flows.distributions import Uniform
        >>> law = Uniform(2, low=-1.0, high=1.0)  # on a square of area 4
        >>> law.log_prob(torch.tensor([[0.5, 0.5], [0.5, 2.0]])).exp()
        tensor([0.2500, 0.0000])
    """

    def __init__(
        self, shape: int | tuple[int, ...], *, low: float = 0.0, high: float = 1.0
    ) -> None:
        super().__init__(shape)
        if not -math.inf < low < high < math.inf:
            raise ValueError(f"low must be below high, both finite, got {low} and {high}.")
        self.low = low
        self.high = high

    def log_density(self, inputs: Tensor, context: Tensor | None) -> Tensor:
        inside = (inputs >= self.low) & (inputs <= self.high)
        # The product keeps the result in the graph, with a gradient of zero.
        level = 0.0 * inputs - math.log(self.high - self.low)
        return torch.where(inside, level, -math.inf).flatten(1).sum(1)

    def draw(self, like: Tensor, context: Tensor | None, temperature: float) -> Tensor:
        centre = 0.5 * (self.low + self.high)
        ends = [(1 - temperature) * centre + temperature * end for end in (self.low, self.high)]
        # Unlike a product and a sum, lerp never rounds to a point beyond the ends.
        return torch.lerp(*map(like.new_tensor, ends), torch.rand_like(like))

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, low={self.low}, high={self.high}"
