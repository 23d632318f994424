"""What all base distributions share."""

from abc import abstractmethod

import torch
from torch import Tensor, nn

from flows.checks import check_at_least

__all__ = ["Distribution"]


class Distribution(nn.Module):
    """The law of noise: ``log_prob`` and ``sample``, checked here and defined by a subclass.

    Args:
        shape: Shape of one sample; an int for vectors.

    Shape:
        inputs ``(batch, *shape)``, context (batch, ...) to log_prob (batch,) in nats

    Raises:
        ValueError: If shapes or rows do not fit, or the number of samples or the temperature is
            negative.

    Example:
        >>> import math, torch
        >>> from flows.distributions import Distribution
        >>> class Laplace(Distribution):
        ...     def log_density(self, inputs, context):
        ...         return -(inputs.abs() + math.log(2)).flatten(1).sum(1)
        ...     def draw(self, like, context, temperature):
        ...         there, back = (torch.empty_like(like).exponential_() for _ in range(2))
        ...         return temperature * (there - back)
        >>> Laplace(3).log_prob(torch.zeros(1, 3)).exp()  # (1/2)^3
        tensor([0.1250])
        >>> Laplace(3).sample(5).shape
        torch.Size([5, 3])
    """

    def __init__(self, shape: int | tuple[int, ...]) -> None:
        super().__init__()
        self.shape = (shape,) if isinstance(shape, int) else tuple(shape)
        if not self.shape or min(self.shape) < 1:
            raise ValueError(f"shape must hold sizes of at least 1, got {self.shape}.")
        # Where the samples are made and in which dtype: it follows .to() and .double().
        self.register_buffer("anchor", torch.zeros(()), persistent=False)

    @abstractmethod
    def log_density(self, inputs: Tensor, context: Tensor | None) -> Tensor:
        """Log density in nats of inputs of the right shape, (batch,)."""

    @abstractmethod
    def draw(self, like: Tensor, context: Tensor | None, temperature: float) -> Tensor:
        """Samples of the shape, dtype and device of ``like``, whose values mean nothing."""

    def log_prob(self, inputs: Tensor, context: Tensor | None = None) -> Tensor:
        """Log density in nats, ``(batch, *shape)`` -> (batch,)."""
        if tuple(inputs.shape[1:]) != self.shape:
            raise ValueError(
                f"inputs must be (batch, {', '.join(map(str, self.shape))}), "
                f"got {tuple(inputs.shape)}."
            )
        if context is not None and context.shape[0] != inputs.shape[0]:
            raise ValueError(
                f"context must have a row per input, got {context.shape[0]} for {inputs.shape[0]}."
            )
        return self.log_density(inputs, context)

    def sample(
        self, num_samples: int, context: Tensor | None = None, *, temperature: float = 1.0
    ) -> Tensor:
        """Samples ``(num_samples, *shape)``, or ``(rows of context, num_samples, *shape)``.

        ``temperature`` multiplies the deviation of the samples from their centre, and so
        their standard deviation; 0 gives the centre itself.
        """
        check_at_least(0, num_samples=num_samples, temperature=temperature)
        rows = (num_samples,) if context is None else (context.shape[0], num_samples)
        return self.draw(self.anchor.new_empty(*rows, *self.shape), context, temperature)

    def extra_repr(self) -> str:
        return f"shape={self.shape}"
