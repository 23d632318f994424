"""Mixtures of normal distributions."""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from flows.checks import check_at_least
from flows.distributions.base import Distribution
from flows.distributions.diagonal_normal import (
    from_context,
    normal_log_density,
    raw_scale,
    to_scale,
)

__all__ = ["GaussianMixture"]


class GaussianMixture(Distribution):
    r"""Learned mixture :math:`\sum_k w_k\, N(\mu_k, \mathrm{diag}\, \sigma_k^2)`.

    The means start at random and apart, the weights equal, the scales such that every
    dimension has about unit variance. With a ``net``, weights, means and scales are those
    of each row of context: what the net makes of it is added to the learned numbers.

    A temperature multiplies the standard deviation of each component around its own mean.
    Samples carry gradients to means and scales, none to the weights; where these are to learn
    from samples, :meth:`rsample_stratified` draws from every component.

    Args:
        shape: Shape of one sample; an int for vectors.
        components: Number of normals.
        net: ``net(0, out_features)`` makes the module that is called as
            ``module(nothing, context)``, nothing being (rows, 0); None for a law that
            ignores the context.

    Shape:
        inputs ``(batch, *shape)`` to log_prob (batch,) in nats

    Raises:
        ValueError: If ``components`` is below 1, ``shape`` holds no sizes, inputs have another
            shape, or there is a ``net`` but no context.

    Example:
        >>> from flows.distributions import GaussianMixture
        >>> GaussianMixture(2, components=8).sample(5).shape
        torch.Size([5, 2])
    """

    def __init__(
        self,
        shape: int | tuple[int, ...],
        components: int,
        *,
        net: Callable[[int, int], nn.Module] | None = None,
    ) -> None:
        super().__init__(shape)
        check_at_least(1, components=components)
        self.components = components
        # Means and components share the unit variance.
        deviation = math.sqrt(0.5)
        size = math.prod(self.shape)
        means = deviation * _apart(components, size).unflatten(1, self.shape)
        self.means = nn.Parameter(means)
        self.raw_scales = nn.Parameter(torch.full_like(means, raw_scale(deviation)))
        self.logits = nn.Parameter(torch.zeros(components))
        self.net = None if net is None else net(0, components * (2 * size + 1))

    def log_density(self, inputs: Tensor, context: Tensor | None) -> Tensor:
        means, scales, log_weights = self.mixture(context)
        components = normal_log_density(inputs.unsqueeze(1), means, scales).flatten(2).sum(2)
        return (log_weights + components).logsumexp(1)

    def draw(self, like: Tensor, context: Tensor | None, temperature: float) -> Tensor:
        means, scales, log_weights = self.mixture(context)
        rows = like.shape[: -len(self.shape)]
        # The first of independent clocks with rates w_k to ring is clock k with chance w_k.
        times = like.new_empty(*rows, self.components).exponential_()
        if self.net is None:
            chosen = ((log_weights - times.log()).argmax(-1),)
        else:
            row = torch.arange(rows[0], device=like.device).unsqueeze(1)
            chosen = (row, (log_weights.unsqueeze(1) - times.log()).argmax(-1))
        return means[chosen] + temperature * scales[chosen] * torch.randn_like(like)

    def rsample_stratified(
        self, num_samples: int, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        r"""Points of every component, not of components by chance, and the log weights.

        With points :math:`z_{tk} \sim N(\mu_k, \mathrm{diag}\,\sigma_k^2)`, t = 1 to T, the
        mean of any function g is that of :math:`\frac1T \sum_{tk} w_k\, g(z_{tk})`, whose
        gradients reach weights, means and scales alike.

        Args:
            num_samples: T, points of each component.
            context: As in :meth:`sample`.

        Returns:
            Points ``(num_samples, components, *shape)`` and log weights (components,); with
            context ``(rows, num_samples, components, *shape)`` and (rows, components).
        """
        check_at_least(0, num_samples=num_samples)
        means, scales, log_weights = self.mixture(context)
        rows = () if context is None else (context.shape[0],)
        noise = torch.randn_like(
            self.anchor.expand(*rows, num_samples, self.components, *self.shape)
        )
        if self.net is not None:
            means, scales = means.unsqueeze(1), scales.unsqueeze(1)
        return means + scales * noise, log_weights.expand(*rows, self.components)

    def mixture(self, context: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Means and scales ``(components, *shape)`` and log weights (components,).

        With a net each has the rows of the context as its first axis.
        """
        means, raw_scales, logits = self.means, self.raw_scales, self.logits
        if self.net is not None:
            sizes = [self.means.numel(), self.means.numel(), self.components]
            shift, change, tilt = from_context(self.net, context).split(sizes, dim=1)
            means = means + shift.unflatten(1, self.means.shape)
            raw_scales = raw_scales + change.unflatten(1, self.means.shape)
            logits = logits + tilt
        return means, to_scale(raw_scales), logits.log_softmax(-1)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, components={self.components}"


def _apart(points: int, size: int) -> Tensor:
    """Standard normal points: of some draws the one whose closest two are farthest apart."""
    if points == 1:
        return torch.randn(1, size)
    draws = (torch.randn(points, size) for _ in range(20))
    return max(draws, key=lambda draw: nn.functional.pdist(draw).min())
