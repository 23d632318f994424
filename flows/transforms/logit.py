"""From the unit interval to the real line."""

import math

import torch
from torch import Tensor
from torch.nn import functional

from flows.transforms.base import Transform, check_unit_interval, sum_features

__all__ = ["Logit"]


class Logit(Transform):
    r"""From [0, 1] to the real line: :math:`y = \mathrm{logit}(a + (1 - 2a) x)`.

    Args:
        alpha: The margin a kept from both ends, in (0, 0.5).

    Shape:
        inputs (batch, ...) in [0, 1] to outputs of the same shape, logabsdet (batch,) in nats.

    Raises:
        ValueError: If ``alpha`` is outside (0, 0.5).
        InputOutsideDomain: In ``forward``, for inputs outside [0, 1].

    Reference:
        Papamakarios et al. (2017), MAF, arXiv 1705.07057

    Example:
        >>> import torch
        >>> from flows import Logit
        >>> outputs, logabsdet = Logit(alpha=0.05)(torch.tensor([[0.5]]))
        >>> outputs.item(), round(logabsdet.item(), 4)  # log(0.9 / (0.5 * 0.5))
        (0.0, 1.2809)
    """

    def __init__(self, alpha: float = 0.05) -> None:
        super().__init__()
        if not 0 < alpha < 0.5:
            raise ValueError(f"alpha must lie in (0, 0.5), got {alpha}.")
        self.alpha = alpha

    def forward(self, inputs: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        check_unit_interval(inputs)
        outputs = torch.logit(self.alpha + (1 - 2 * self.alpha) * inputs)
        return outputs, self._logabsdet(outputs)

    def inverse(self, inputs: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        outputs = (torch.sigmoid(inputs) - self.alpha) / (1 - 2 * self.alpha)
        return outputs, -self._logabsdet(inputs)

    def _logabsdet(self, logits: Tensor) -> Tensor:
        # d logit(p) / dx = (1 - 2a) / (p (1 - p)), and log p(1-p) = -softplus(-y) - softplus(y).
        softplus = functional.softplus(logits) + functional.softplus(-logits)
        return sum_features(softplus + math.log(1 - 2 * self.alpha))

    def extra_repr(self) -> str:
        return f"alpha={self.alpha}"
