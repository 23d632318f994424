"""The standard normal distribution."""

import math

import torch
from torch import Tensor, nn

__all__ = ["Normal"]


class Normal(nn.Module):
    r"""Independent standard normals, :math:`N(0, I)`.

    Args:
        shape: Shape of one sample; an int for vectors.

    Example:
        >>> Normal(2).log_prob(torch.zeros(3, 2)).shape
        torch.Size([3])
    """

    def __init__(self, shape: int | tuple[int, ...]) -> None:
        super().__init__()
        self.shape = (shape,) if isinstance(shape, int) else tuple(shape)
        # Where the samples are made and in which dtype: it follows .to() and .double().
        self.register_buffer("anchor", torch.zeros(()), persistent=False)

    def log_prob(self, inputs: Tensor, context: Tensor | None = None) -> Tensor:
        """Log density in nats, (batch, *shape) -> (batch,)."""
        if tuple(inputs.shape[1:]) != self.shape:
            raise ValueError(
                f"inputs must be (batch, {', '.join(map(str, self.shape))}), "
                f"got {tuple(inputs.shape)}."
            )
        squares = inputs.square().flatten(1).sum(1)
        return -0.5 * (squares + math.prod(self.shape) * math.log(2 * math.pi))

    def sample(
        self, num_samples: int, context: Tensor | None = None, *, temperature: float = 1.0
    ) -> Tensor:
        """Samples (num_samples, *shape), or (rows of context, num_samples, *shape).

        ``temperature`` multiplies the standard deviation.
        """
        rows = (num_samples,) if context is None else (len(context), num_samples)
        return temperature * torch.randn(
            *rows, *self.shape, dtype=self.anchor.dtype, device=self.anchor.device
        )
