"""Twists: planes turn by angles that depend on the radii, which turning keeps."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from flows import givens
from flows.checks import check_at_least
from flows.orthogonal_base import NamedAngles
from flows.transforms.base import Transform, check_features

__all__ = ["Twist"]


class Twist(NamedAngles, Transform):
    r"""Volume-preserving map that turns disjoint planes: :math:`\theta_p = f_p(r_1, r_2, \dots)`.

    The features are paired into planes (i, j) of radii :math:`r_p^2 = x_i^2 + x_j^2`. In polar
    coordinates the map adds to every polar angle a function of the radii alone, so radii are
    kept, the inverse turns back by the same angles, and the Jacobian has determinant 1 though
    no feature stays as it is. Of an odd number of features one has no partner: it is kept, and
    the angles may depend on it, sign included.

    The conditioner is fed :math:`\log(1 + r_p^2)`, and asinh of the single feature: as smooth
    as the squares, but of slow growth. Layers of successive matchings pair every feature with
    every other. Zero outputs of the conditioner make the identity.

    Args:
        features: Size n of axis 1, at least 2: features of vectors, channels of images.
        net: ``net(ceil(n / 2), floor(n / 2))`` makes the conditioner, a module called as
            ``conditioner(radii, context)`` that keeps any axes behind axis 1; for images it may
            look at neighbouring radii, as :class:`flows.nets.ConvNet` does.
        matching: Which pairs: a round of ``givens.round_robin(n)``, counted modulo their number.

    Shape:
        inputs (batch, features, ...) to outputs of the same shape, logabsdet (batch,), zero.

    Raises:
        ValueError: If ``features`` is below 2 or not that of the inputs.

    Example:
        >>> import torch
        >>> from flows import Twist
        >>> from flows.nets import MLP
        >>> layer = Twist(2, MLP)
        >>> _ = torch.nn.init.normal_(layer.net.last.weight, std=0.1)
        >>> x = torch.randn(3, 2)
        >>> outputs, logabsdet = layer(x)
        >>> torch.allclose(outputs.norm(dim=1), x.norm(dim=1), atol=1e-5), logabsdet.tolist()
        (True, [0.0, 0.0, 0.0])
    """

    volume_preserving = True

    def __init__(
        self, features: int, net: Callable[[int, int], nn.Module], *, matching: int = 0
    ) -> None:
        super().__init__()
        check_at_least(2, features=features)
        rounds = givens.round_robin(features).rounds
        self.features = features
        self.matching = matching % len(rounds)
        first, second = zip(*rounds[self.matching], strict=True)
        single = sorted(set(range(features)) - {*first, *second})
        order = torch.tensor([*first, *second, *single])
        # Derived from the arguments, so never saved and never averaged.
        self.register_buffer("order", order, persistent=False)
        self.register_buffer("places", order.argsort(), persistent=False)
        self.sizes = (len(first), len(second), len(single))
        self.net = net(len(first) + len(single), len(first))

    def forward(self, inputs: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self._turn(inputs, context, inverse=False)

    def inverse(self, inputs: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self._turn(inputs, context, inverse=True)

    def _turn(
        self, inputs: Tensor, context: Tensor | None, *, inverse: bool
    ) -> tuple[Tensor, Tensor]:
        check_features(inputs, self.features)
        # In half precision a turn would not keep the radii that the inverse reads.
        x = inputs.to(torch.promote_types(inputs.dtype, torch.float32))
        x_i, x_j, single = x.index_select(1, self.order).split(self.sizes, dim=1)
        radii = torch.log1p(x_i * x_i + x_j * x_j)
        seen = torch.cat([radii, single.asinh()], dim=1).to(inputs.dtype)
        angles = self.net(seen, context).to(x.dtype)
        c, s = angles.cos(), (-angles if inverse else angles).sin()
        turned = torch.cat([c * x_i - s * x_j, s * x_i + c * x_j, single], dim=1)
        outputs = turned.index_select(1, self.places).to(inputs.dtype)
        return outputs, inputs.new_zeros(inputs.shape[0])

    @property
    def _identity(self) -> str:
        return f"twist({self.features}) matching={self.matching}"

    def extra_repr(self) -> str:
        return f"features={self.features}, matching={self.matching}"
