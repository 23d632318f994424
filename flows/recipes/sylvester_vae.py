"""Variational autoencoder whose posterior is a flow of rotations."""

import math
from functools import partial

import torch
from torch import Tensor, nn

from flows.checks import check_at_least
from flows.distributions import Normal
from flows.distributions.diagonal_normal import raw_scale, to_scale
from flows.distributions.discretized_logistic import (
    discretized_logistic_log_prob,
    discretized_logistic_sample,
    logistic_parameters,
)
from flows.nets import MLP, ConvDecoder, ConvEncoder
from flows.recipes.mixing import Mixing
from flows.transforms import Composite, Sylvester
from flows.transforms.base import check_unit_interval, sum_features

__all__ = ["SylvesterVAE"]


class SylvesterVAE(nn.Module):
    r"""Image model :math:`p(x) = \int p(x | z)\, p(z)\, dz` with few latent variables.

    The posterior q(z | x) starts as a normal law whose mean and scale the encoder gives and
    runs through Sylvester layers, whose rotations, triangular matrices and shifts the encoder
    gives as well. The decoder says a mixture of discretized logistics for every pixel.

    ``log_prob`` is a lower bound, in nats, of the log density of uniformly dequantized data
    scaled to [0, 1], so :func:`flows.bits_per_dim` applies to it: in training mode the evidence
    lower bound of one draw from the posterior, in eval mode the importance-weighted bound of
    ``draws`` of them,

    .. math:: \log \frac1K \sum_{k=1}^{K} \frac{p(x | z_k)\, p(z_k)}{q(z_k | x)} + D \log L

    Args:
        shape: Shape (channels, height, width) of one image, height and width multiples of 4.
        grey_levels: Number L of grey levels of the pixels, which are k / L.
        latent_features: Size of z, at least 2.
        layers: Sylvester layers of the posterior; 0 leaves it normal.
        hidden_features: Channels of encoder and decoder.
        posterior_features: Size of what the encoder tells the Sylvester layers.
        components: Logistics per pixel.
        dropout: Dropout in encoder and decoder.
        draws: K, draws from the posterior in eval mode.
        mixing: What makes the orthonormal columns of the Sylvester layers, as in
            :class:`~flows.transforms.Sylvester`: ``"angles"``, ``"householder"`` or
            ``"permutation"``; not ``"lu"``.

    Shape:
        inputs (batch, channels, height, width), pixels k / L, to log_prob (batch,) in nats

    Raises:
        ValueError: If sizes do not fit, ``mixing`` is none of those named, or there is a context.
        InputOutsideDomain: For inputs outside [0, 1].

    Example:
        >>> from flows.recipes import SylvesterVAE
        >>> vae = SylvesterVAE((1, 8, 8), grey_levels=17, latent_features=4)
        >>> vae.sample(5).shape
        torch.Size([5, 1, 8, 8])

    Reference:
        van den Berg et al. (2018), arXiv 1803.05649; Burda et al. (2016), arXiv 1509.00519, for
        the bound. There the pixels are binary.
    """

    def __init__(
        self,
        shape: tuple[int, int, int],
        *,
        grey_levels: int = 256,
        latent_features: int = 16,
        layers: int = 4,
        hidden_features: int = 32,
        posterior_features: int = 64,
        components: int = 4,
        dropout: float = 0.0,
        draws: int = 16,
        mixing: Mixing = "angles",
    ) -> None:
        super().__init__()
        check_at_least(0, layers=layers)
        check_at_least(
            1, posterior_features=posterior_features, components=components, draws=draws
        )
        check_at_least(2, grey_levels=grey_levels, latent_features=latent_features)
        self.shape = tuple(shape)
        self.grey_levels = grey_levels
        self.latent_features = latent_features
        self.posterior_features = posterior_features
        self.draws = draws
        nets = {"hidden_features": hidden_features, "dropout": dropout}
        self.encoder = ConvEncoder(shape, 2 * latent_features + posterior_features, **nets)
        channels, height, width = self.shape
        parameters = logistic_parameters(components) * channels
        self.decoder = ConvDecoder(latent_features, (parameters, height, width), **nets)
        net = partial(
            MLP,
            hidden_features=posterior_features,
            blocks=0,
            context_features=posterior_features,
        )
        self.posterior = Composite(
            Sylvester(latent_features, net=net, mixing=mixing) for _ in range(layers)
        )
        self.prior = Normal(latent_features)

    def forward(self, inputs: Tensor, context: Tensor | None = None) -> Tensor:
        return self.log_prob(inputs, context)

    def log_prob(self, inputs: Tensor, context: Tensor | None = None) -> Tensor:
        """Lower bound of the log density of each image in nats, shape (batch,)."""
        if context is not None:
            raise ValueError("a SylvesterVAE takes no context, got one.")
        if tuple(inputs.shape[1:]) != self.shape:
            raise ValueError(f"inputs must be images {self.shape}, got {tuple(inputs.shape[1:])}.")
        check_unit_interval(inputs)
        # Nets may run in half precision under autocast; densities must not.
        encoded = self.encoder(inputs - 0.5).to(inputs.dtype)
        draws = 1 if self.training else self.draws
        bounds = torch.stack([self._draw_bound(inputs, encoded) for _ in range(draws)])
        dequantized = math.prod(self.shape) * math.log(self.grey_levels)
        return bounds.logsumexp(0) - math.log(draws) + dequantized

    def sample(
        self, num_samples: int, context: Tensor | None = None, *, temperature: float = 1.0
    ) -> Tensor:
        """Images (num_samples, channels, height, width), pixels k / L.

        ``temperature`` multiplies the spread of the latent variables and of the pixels.
        """
        if context is not None:
            raise ValueError("a SylvesterVAE takes no context, got one.")
        check_at_least(0, num_samples=num_samples, temperature=temperature)
        latent = self.prior.sample(num_samples, temperature=temperature)
        return discretized_logistic_sample(
            self.decode(latent), self.grey_levels, temperature=temperature
        )

    def _draw_bound(self, inputs: Tensor, encoded: Tensor) -> Tensor:
        """log p(x | z) + log p(z) - log q(z | x) for one z per image from q, shape (batch,)."""
        sizes = [self.latent_features, self.latent_features, self.posterior_features]
        mean, raw, context = encoded.split(sizes, dim=1)
        scale = to_scale(raw + raw_scale(1.0))  # 1 where the encoder says 0
        noise = torch.randn_like(mean)
        log_posterior = self.prior.log_prob(noise) - scale.log().sum(1)
        latent, logabsdet = self.posterior(mean + scale * noise, context)
        log_posterior = log_posterior - logabsdet
        pixels = discretized_logistic_log_prob(inputs, self.decode(latent), self.grey_levels)
        return sum_features(pixels) + self.prior.log_prob(latent) - log_posterior

    def decode(self, latent: Tensor) -> Tensor:
        """The pixels' law given latents: parameters ``(batch, parameters per pixel, *shape)``."""
        return self.decoder(latent).to(latent.dtype).unflatten(1, (-1, self.shape[0]))
