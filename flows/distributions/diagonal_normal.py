"""Normal distributions with means and scales that are learned or follow the context."""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from flows.distributions.base import Distribution

__all__ = ["DiagonalNormal", "from_context", "normal_log_density", "raw_scale", "to_scale"]

# Smallest standard deviation, so that no likelihood grows without bound.
MIN_SCALE = 1e-3


def to_scale(raw: Tensor) -> Tensor:
    """A standard deviation from an unconstrained number, greater than ``MIN_SCALE``."""
    return MIN_SCALE + functional.softplus(raw)


def raw_scale(scale: float) -> float:
    """The number that ``to_scale`` maps to ``scale``."""
    return math.log(math.expm1(scale - MIN_SCALE))


def normal_log_density(inputs: Tensor, mean: Tensor, scale: Tensor) -> Tensor:
    """Elementwise log density of normals."""
    squares = ((inputs - mean) / scale).square()
    return -0.5 * (squares + math.log(2 * math.pi)) - scale.log()


def from_context(net: nn.Module, context: Tensor | None) -> Tensor:
    """What a net without inputs makes of each row of the context, (rows, outputs)."""
    if context is None:
        raise ValueError("context must have a row per sample, as this law has a net, got None.")
    return net(context.new_zeros(context.shape[0], 0), context)


class DiagonalNormal(Distribution):
    r"""Independent normals, :math:`N(\mu, \mathrm{diag}\, \sigma^2)`, learned.

    Starts as the standard normal. With a ``net``, :math:`\mu` and :math:`\sigma` are those of
    each row of context: what the net makes of it is added to the learned numbers.

    Args:
        shape: Shape of one sample; an int for vectors.
        net: ``net(0, out_features)`` makes the module that is called as
            ``module(nothing, context)``, nothing being (rows, 0); None for a law that
            ignores the context.

    Shape:
        inputs ``(batch, *shape)`` to log_prob (batch,) in nats

    Raises:
        ValueError: If ``shape`` holds no sizes, inputs have another shape, or there is a ``net``
            but no context.

    Example:
        >>> import torch
        >>> from functools import partial
        >>> from flows.distributions import DiagonalNormal
        >>> from flows.nets import MLP
        >>> law = DiagonalNormal(2, net=partial(MLP, context_features=3))
        >>> law.sample(5, torch.zeros(4, 3)).shape
        torch.Size([4, 5, 2])
    """

    def __init__(
        self,
        shape: int | tuple[int, ...],
        *,
        net: Callable[[int, int], nn.Module] | None = None,
    ) -> None:
        super().__init__(shape)
        self.mean = nn.Parameter(torch.zeros(self.shape))
        self.raw_scale = nn.Parameter(torch.full(self.shape, raw_scale(1.0)))
        self.net = None if net is None else net(0, 2 * self.mean.numel())

    def log_density(self, inputs: Tensor, context: Tensor | None) -> Tensor:
        mean, scale = self.mean_and_scale(context)
        return normal_log_density(inputs, mean, scale).flatten(1).sum(1)

    def draw(self, like: Tensor, context: Tensor | None, temperature: float) -> Tensor:
        mean, scale = self.mean_and_scale(context)
        if self.net is not None:
            mean, scale = mean.unsqueeze(1), scale.unsqueeze(1)
        return mean + temperature * scale * torch.randn_like(like)

    def mean_and_scale(self, context: Tensor | None) -> tuple[Tensor, Tensor]:
        """Mean and deviation, each ``(*shape)``; with a net ``(rows of context, *shape)``."""
        if self.net is None:
            return self.mean, to_scale(self.raw_scale)
        shift, change = from_context(self.net, context).unflatten(1, (2, *self.shape)).unbind(1)
        return self.mean + shift, to_scale(self.raw_scale + change)
