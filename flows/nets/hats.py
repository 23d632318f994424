"""Numbers as weights of the knots around them."""

import torch
from torch import Tensor, nn

from flows.checks import check_at_least, check_positive

__all__ = ["Hats"]


class Hats(nn.Module):
    r"""Every feature as its hat functions :math:`\max(0,\ 1 - |u - t_k| / \Delta)`.

    The K knots :math:`t_k`, at distance :math:`\Delta`, divide [-B, B] evenly. At most two hats
    are above zero at a time and all of them sum to 1, so that a linear layer on top is a
    piecewise linear function of each feature, as steep between two knots as data ask for: a
    network that sees the bare number learns steps and stripes slowly. Outside [-B, B] the
    hats stay what they are at the ends.

    Args:
        features: Number of features, at least 0.
        knots: Number K of knots, at least 2.
        bound: Half-width B of the interval.

    Shape:
        (batch, features) to (batch, features * knots)

    Raises:
        ValueError: If ``features`` or ``knots`` is too small, or ``bound`` is not positive.

    Reference:
        Gorishniy et al. (2022), On Embeddings for Numerical Features in Tabular Deep Learning,
        arXiv 2203.05556, whose piecewise linear encoding has ramps in place of hats.

    Example:
        >>> import torch
        >>> from flows.nets import Hats
        >>> Hats(1, knots=3, bound=1.0)(torch.tensor([[-0.25], [1.0]]))
        tensor([[0.2500, 0.7500, 0.0000],
                [0.0000, 0.0000, 1.0000]])
    """

    def __init__(self, features: int, *, knots: int = 32, bound: float = 4.0) -> None:
        super().__init__()
        check_at_least(0, features=features)
        check_at_least(2, knots=knots)
        check_positive(bound=bound)
        self.features = features
        self.knots = knots
        self.bound = bound
        # Derived from the arguments, so never saved and never averaged.
        self.register_buffer("numbers", torch.arange(float(knots)), persistent=False)

    def forward(self, inputs: Tensor) -> Tensor:
        scale = (self.knots - 1) / (2 * self.bound)
        position = (inputs.clamp(-self.bound, self.bound) + self.bound) * scale
        return (1 - (position.unsqueeze(-1) - self.numbers).abs()).relu().flatten(1)

    def extra_repr(self) -> str:
        return f"features={self.features}, knots={self.knots}, bound={self.bound}"
