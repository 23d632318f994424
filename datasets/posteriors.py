"""Posteriors in the plane that are known exactly, to be learned from their joint density."""

import math
from collections.abc import Sequence
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from datasets.densities import NormalMixture

__all__ = ["POSTERIORS", "MixtureMeans"]


class MixtureMeans(NormalMixture):
    r"""Posterior of the means :math:`m_1, m_2` of two normals, given draws from their mixture.

    .. math::

        y_i \sim \sum_j p_j N(m_j, s^2), \qquad m_j \sim N(0, t^2)

    Which normal is the first is told by the unequal weights alone, so there is a mode for each
    order. Summing over all :math:`2^n` ways to assign n observations to the normals, the
    posterior is a mixture of so many Gaussians, known exactly; ``unnormalized_log_prob`` is the
    joint density, as one would write it without knowing that.

    Args:
        observations: y, few.
        proportions: p, two numbers greater than 0, summing to 1.
        sd: s.
        prior_sd: t.

    Shape:
        means (..., 2) to log_prob (...) in nats

    Attributes:
        log_evidence: :math:`\log p(y)`, nats: the log of the joint density's integral.

    Example:
        >>> import torch
        >>> from datasets.posteriors import MixtureMeans
        >>> law = MixtureMeans((-1.0, 1.0), (0.4, 0.6), sd=0.5, prior_sd=2.0)
        >>> means = law.sample(3).double()
        >>> log_evidence = law.unnormalized_log_prob(means) - law.log_prob(means)
        >>> torch.allclose(log_evidence, torch.tensor(law.log_evidence).double())
        True
    """

    def __init__(
        self,
        observations: Sequence[float],
        proportions: tuple[float, float],
        *,
        sd: float,
        prior_sd: float,
    ) -> None:
        self.observations = np.asarray(observations, dtype=float)
        self.proportions = np.asarray(proportions, dtype=float)
        self.sd = sd
        self.prior_sd = prior_sd
        n = len(self.observations)
        # assigned[a, i, j]: whether assignment a gives observation i to normal j.
        first = (np.arange(2**n)[:, None] >> np.arange(n)) % 2 == 0
        assigned = np.stack((first, ~first), axis=-1).astype(float)
        counts = assigned.sum(1)
        precision = counts / sd**2 + 1 / prior_sd**2
        self.centres = (assigned * self.observations[:, None]).sum(1) / sd**2 / precision
        self.roots = precision[:, :, None] ** -0.5 * np.eye(2)
        # Completing the square leaves to each assignment its share of the evidence.
        squares = precision * self.centres**2 - np.log(precision * prior_sd**2)
        shares = (counts * np.log(self.proportions) + squares / 2).sum(1)
        alone = -(self.observations**2).sum() / (2 * sd**2) - n * math.log(
            sd * math.sqrt(2 * math.pi)
        )
        self.log_evidence = float(np.logaddexp.reduce(shares) + alone)
        self.weights = np.exp(shares - np.logaddexp.reduce(shares))

    @cached_property
    def extent(self) -> tuple[float, float, float, float]:
        """That of the components which weigh anything."""
        heavy = self.weights > 1e-8
        margin = 5 * np.linalg.norm(self.roots[heavy], axis=-1)
        xmin, ymin = (self.centres[heavy] - margin).min(0).tolist()
        xmax, ymax = (self.centres[heavy] + margin).max(0).tolist()
        return xmin, xmax, ymin, ymax

    def unnormalized_log_prob(self, x: Tensor) -> Tensor:
        y, log_p = (
            torch.as_tensor(table, dtype=x.dtype, device=x.device)
            for table in (self.observations, np.log(self.proportions))
        )
        prior = _log_normal(x, self.prior_sd).sum(-1)
        likelihoods = _log_normal(y.unsqueeze(-1) - x.unsqueeze(-2), self.sd) + log_p
        return prior + likelihoods.logsumexp(-1).sum(-1)

    def log_prob(self, x: Tensor) -> Tensor:
        return self.unnormalized_log_prob(x) - self.log_evidence

    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        # The uniform number u falls into the stretch of component k with chance w_k.
        ends = torch.from_numpy(self.weights).cumsum(0)
        u = torch.rand(n, generator=generator, dtype=torch.float64) * ends[-1]
        k = torch.searchsorted(ends, u, right=True).clamp_max(len(ends) - 1)
        noise = torch.randn(n, 2, generator=generator)
        deviations = torch.from_numpy(self.roots).diagonal(dim1=-2, dim2=-1)
        return torch.from_numpy(self.centres).to(noise)[k] + deviations.to(noise)[k] * noise


def _log_normal(x: Tensor, sd: float) -> Tensor:
    """Log density of N(0, sd^2), elementwise."""
    return -0.5 * (x / sd).square() - math.log(sd * math.sqrt(2 * math.pi))


POSTERIORS: dict[str, MixtureMeans] = {
    "two_means": MixtureMeans(
        (-2.6, -2.1, -1.7, 0.1, 0.6, 2.0, 2.4, 2.9), (0.4, 0.6), sd=0.7, prior_sd=2.5
    ),
}
