"""The standard logistic distribution."""

import torch
from torch import Tensor
from torch.nn import functional

from flows.distributions.base import Distribution

__all__ = ["Logistic"]


class Logistic(Distribution):
    r"""Independent standard logistics, :math:`p(x) = \sigma(x)\, \sigma(-x)`.

    Mean 0 and standard deviation :math:`\pi / \sqrt 3 = 1.81`; tails that fall like
    :math:`e^{-|x|}` forgive outliers more than a normal's.

    Args:
        shape: Shape of one sample; an int for vectors.

    Shape:
        inputs ``(batch, *shape)`` to log_prob (batch,) in nats; a context is ignored

    Raises:
        ValueError: If ``shape`` holds no sizes, or inputs have another shape.

    Reference:
        Dinh et al. (2015), NICE, arXiv 1410.8516, whose base it is

    Example:
        >>> import torch
        >>> from flows.distributions import Logistic
        >>> Logistic(1).log_prob(torch.zeros(1, 1)).exp()
        tensor([0.2500])
    """

    def log_density(self, inputs: Tensor, context: Tensor | None) -> Tensor:
        values = functional.logsigmoid(inputs) + functional.logsigmoid(-inputs)
        return values.flatten(1).sum(1)

    def draw(self, like: Tensor, context: Tensor | None, temperature: float) -> Tensor:
        # The quantile of 0 is infinite.
        margin = torch.finfo(like.dtype).eps / 2
        return temperature * torch.rand_like(like).clamp(margin, 1 - margin).logit()
