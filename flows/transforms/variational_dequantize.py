"""From grey levels to real numbers by noise that a flow has learned."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from flows.checks import check_at_least
from flows.transforms.base import Transform, check_features, sum_features
from flows.transforms.coupling import AffineCoupling
from flows.transforms.dequantize import add_noise, lower_edges
from flows.transforms.multiscale import Squeeze

__all__ = ["VariationalDequantize"]


class VariationalDequantize(Transform):
    r"""Grey levels to reals by learned noise: :math:`y = x + u / L`, :math:`u \sim q(u | x)`.

    Inputs are the L grey levels as lower edges of bins, k / L with k = 0 ... L-1, as in
    :class:`Dequantize`. The noise is :math:`u = \Phi(z)`: normal noise through affine couplings
    whose conditioners also see x gives z, and the normal CDF maps it onto (0, 1). With
    logabsdet :math:`-\log q(u | x)` the mean of log_prob over the noise bounds the
    log-probability of the bin, scaled as in :class:`Dequantize`, from below, the more tightly
    the closer q comes to the density within the bin. It starts as uniform noise, exactly.
    ``inverse`` goes back to the lower edge of the bin; its logabsdet is zero.

    Args:
        features: Size of axis 1: features of vectors, channels of images; at least 2 unless
            ``squeeze``.
        net: ``net(in_features, out_features)`` makes a conditioner, a module called as
            ``conditioner(inputs, context)`` that keeps any axes behind axis 1. Its inputs are
            the kept half of the noise and x, one behind the other on axis 1.
        grey_levels: L, at least 2; 256 for 8-bit images.
        layers: Number of couplings, at least 2: of successive ones each moves the half that the
            other keeps.
        squeeze: For images, whose height and width must be even: the couplings see 2 x 2
            patches as channels. Needed for a single channel, which has no halves.

    Shape:
        inputs (batch, features, ...) to outputs of the same shape, logabsdet (batch,) in nats.

    Raises:
        ValueError: If a size is too small, or ``grey_levels`` too many for the inputs' dtype.
        InputOutsideDomain: In ``forward``, for inputs outside [0, 1].

    Reference:
        Ho et al. (2019), Flow++, arXiv 1902.00275

    Example:
        >>> import torch
        >>> from flows import VariationalDequantize
        >>> from flows.nets import MLP
        >>> layer = VariationalDequantize(2, MLP, grey_levels=4)
        >>> x = torch.tensor([[0.25, 0.75]])
        >>> noisy, logabsdet = layer(x)
        >>> torch.equal(layer.inverse(noisy)[0], x), abs(logabsdet.item()) < 1e-5  # uniform yet
        (True, True)
    """

    def __init__(
        self,
        features: int,
        net: Callable[[int, int], nn.Module],
        grey_levels: int = 256,
        *,
        layers: int = 4,
        squeeze: bool = False,
    ) -> None:
        super().__init__()
        check_at_least(1 if squeeze else 2, features=features)
        check_at_least(2, grey_levels=grey_levels, layers=layers)
        self.features = features
        self.grey_levels = grey_levels
        self.squeeze = Squeeze() if squeeze else None
        mixed = 4 * features if squeeze else features

        def beside_levels(kept: int, parameters: int) -> _BesideLevels:
            return _BesideLevels(net(kept + mixed, parameters))

        self.couplings = nn.ModuleList(
            AffineCoupling(mixed, beside_levels, flip=layer % 2 == 1) for layer in range(layers)
        )

    def forward(self, inputs: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        check_features(inputs, self.features)
        noise = torch.randn_like(inputs)
        z, logabsdet = self._transform_noise(noise, inputs, context)
        # -log q: that of normal noise, the couplings' volume, and the slope of the CDF.
        logabsdet = logabsdet + 0.5 * sum_features(noise.square() - z.square())
        return add_noise(inputs, torch.special.ndtr(z), self.grey_levels), logabsdet

    def inverse(self, inputs: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        check_features(inputs, self.features)
        return lower_edges(inputs, self.grey_levels), inputs.new_zeros(inputs.shape[0])

    def _transform_noise(
        self, noise: Tensor, levels: Tensor, context: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Noise through all couplings, and the log-det of the whole."""
        if self.squeeze is not None:
            noise, levels = self.squeeze(noise)[0], self.squeeze(levels)[0]
        logabsdet = noise.new_zeros(noise.shape[0])
        for coupling in self.couplings:
            # A coupling hands its context to its conditioner as it is.
            noise, change = coupling(noise, (levels, context))
            logabsdet = logabsdet + change
        if self.squeeze is not None:
            noise = self.squeeze.inverse(noise)[0]
        return noise, logabsdet

    def extra_repr(self) -> str:
        return f"features={self.features}, grey_levels={self.grey_levels}"


class _BesideLevels(nn.Module):
    """A conditioner that sees the grey levels beside its inputs; they come with the context."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, kept: Tensor, context: tuple[Tensor, Tensor | None]) -> Tensor:
        levels, context = context
        return self.net(torch.cat([kept, levels], dim=1), context)
