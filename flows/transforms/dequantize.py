"""From grey levels to real numbers."""

import torch
from torch import Tensor

from flows.checks import check_at_least
from flows.transforms.base import Transform, check_unit_interval

__all__ = ["Dequantize", "add_noise", "lower_edges"]


class Dequantize(Transform):
    r"""Grey levels to reals by uniform noise: :math:`y = x + u / L`, :math:`u \sim U[0, 1)`.

    Inputs are the L grey levels as lower edges of bins, k / L with k = 0 ... L-1, so the
    Jacobian is the identity and log_prob refers to data scaled to [0, 1]. The mean of
    log_prob over the noise bounds the log-probability of the bin from below (up to log L
    per pixel). ``inverse`` goes back to the lower edge of the bin.

    Args:
        grey_levels: L, at least 2; 256 for 8-bit images.

    Shape:
        inputs (batch, ...) to outputs of the same shape, logabsdet (batch,), zero.

    Raises:
        ValueError: If ``grey_levels`` is below 2, or too many for the dtype of the inputs.
        InputOutsideDomain: In ``forward``, for inputs outside [0, 1].

    Reference:
        Theis et al. (2016), A note on the evaluation of generative models, arXiv 1511.01844

    Example:
        >>> import torch
        >>> from flows import Dequantize
        >>> layer = Dequantize(grey_levels=4)
        >>> x = torch.tensor([[0.0, 0.25, 0.75]])
        >>> noisy, logabsdet = layer(x)
        >>> torch.equal(layer.inverse(noisy)[0], x), logabsdet.item()
        (True, 0.0)
    """

    volume_preserving = True

    def __init__(self, grey_levels: int = 256) -> None:
        super().__init__()
        check_at_least(2, grey_levels=grey_levels)
        self.grey_levels = grey_levels

    def forward(self, inputs: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        noisy = add_noise(inputs, torch.rand_like(inputs), self.grey_levels)
        return noisy, inputs.new_zeros(inputs.shape[0])

    def inverse(self, inputs: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return lower_edges(inputs, self.grey_levels), inputs.new_zeros(inputs.shape[0])

    def extra_repr(self) -> str:
        return f"grey_levels={self.grey_levels}"


def add_noise(inputs: Tensor, noise: Tensor, grey_levels: int) -> Tensor:
    """inputs + noise / grey_levels, within the bins.

    Args:
        inputs: Lower edges of bins, k / grey_levels.
        noise: In [0, 1], of the shape of inputs.
        grey_levels: Number of bins.

    Raises:
        InputOutsideDomain: If inputs are not in [0, 1].
        ValueError: If their dtype is too coarse for so many bins.
    """
    check_unit_interval(inputs)
    # Near the edges rounding would carry the sum into a neighbouring bin.
    margin = grey_levels * torch.finfo(inputs.dtype).eps
    if margin > 1e-2:
        raise ValueError(f"{grey_levels} grey levels need inputs finer than {inputs.dtype}.")
    return inputs + noise.clamp(margin, 1 - margin) / grey_levels


def lower_edges(inputs: Tensor, grey_levels: int) -> Tensor:
    """The lower edge k / grey_levels of the bin of every input, the nearest bin outside."""
    bins = (inputs * grey_levels).floor()
    # The product rounds: the edges themselves decide.
    bins = bins + ((bins + 1) / grey_levels <= inputs).to(bins)
    bins = (bins - (bins / grey_levels > inputs).to(bins)).clamp(0, grey_levels - 1)
    return bins / grey_levels
