"""What training minimizes, and the units it is reported in."""

import math

import torch
from torch import Tensor

__all__ = ["bits_per_dim"]


def bits_per_dim(log_prob: Tensor | float, dims: int, *, bits: float = 8) -> Tensor:
    r"""Bits per dimension of n-bit data: :math:`-\log p(x) / (D \ln 2) + n`.

    ``log_prob`` is the log density, in nats per sample, of the dequantized data scaled to
    [0, 1]; it contains the log-dets of every step from there on (logit, CDF, ...).

    Args:
        log_prob: Any shape, nats.
        dims: D, the number of values of one sample, channels included.
        bits: n, the logarithm to base 2 of the number of levels; 8 for 8-bit images.

    Raises:
        ValueError: If ``dims`` or ``bits`` is not positive, or ``log_prob`` holds a NaN:
            dropping it would flatter the result.

    Example:
        >>> bits_per_dim(0.0, 784)  # the uniform density on [0, 1]
        tensor(8.)
    """
    if dims < 1 or not bits > 0:
        raise ValueError(f"dims and bits must be positive, got {dims} and {bits}.")
    log_prob = torch.as_tensor(log_prob)
    if log_prob.isnan().any():
        raise ValueError(f"log_prob holds {int(log_prob.isnan().sum())} NaN.")
    return bits - log_prob / (dims * math.log(2))
