"""Laws in the plane that know their ``log_prob`` and entropy: toy data.

Training on a known density can report the Kullback-Leibler divergence to it. The scales are those
of FFJORD's toy data (Grathwohl et al. 2019, arXiv 1810.01367); pinwheel, two_spirals,
twenty_five_gaussians and banana are variants of our own.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import cached_property, partial

import numpy as np
import torch
from torch import Tensor

__all__ = [
    "DENSITIES",
    "Density",
    "GaussianMixture",
    "NoisyCurves",
    "NormalMixture",
    "UniformSquares",
    "Warped",
]


class Density(ABC):
    """A law in the plane.

    Shape:
        x (..., 2) to log_prob (...) in nats

    Attributes:
        extent: (xmin, xmax, ymin, ymax), a box that holds all but less than 1e-3 of the mass.

    Example:
        >>> import math, torch
        >>> from datasets.densities import Density
        >>> class Disc(Density):  # uniform on the disc of radius 1
        ...     extent = (-1.0, 1.0, -1.0, 1.0)
        ...     def sample(self, n, generator=None):
        ...         radius, turn = torch.rand(2, n, generator=generator)
        ...         z = torch.polar(radius.sqrt(), 2 * math.pi * turn)
        ...         return torch.view_as_real(z)
        ...     def log_prob(self, x):
        ...         level = x.new_tensor(-self.entropy())
        ...         return torch.where(x.square().sum(-1) <= 1, level, -math.inf)
        ...     def entropy(self):
        ...         return math.log(math.pi)
        >>> Disc().log_prob(torch.tensor([[0.5, 0.5], [1.0, 1.0]])).exp()
        tensor([0.3183, 0.0000])
    """

    extent: tuple[float, float, float, float]

    @abstractmethod
    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """Independent draws, shape (n, 2), default dtype."""

    @abstractmethod
    def log_prob(self, x: Tensor) -> Tensor:
        """Log density at x (..., 2), in nats, in the dtype of x; shape (...)."""

    def unnormalized_log_prob(self, x: Tensor) -> Tensor:
        """Log density up to a constant, which is all that variational training asks for."""
        return self.log_prob(x)

    @abstractmethod
    def entropy(self) -> float:
        """-E log p in nats."""


class NormalMixture(Density):
    r"""What mixtures of few and of many Gaussians share: :math:`\sum_k w_k N(c_k, R_k R_k^T)`.

    Tables are NumPy arrays in float64: they belong to no device, dtype or autograd mode.

    Shape:
        x (..., 2) to log_prob (...) in nats

    Attributes:
        centres: c, shape (components, 2).
        weights: w, shape (components,), summing to 1.
        roots: R, shape (components, 2, 2), or (2, 2) if all share one.

    Example:
        >>> import numpy as np
        >>> from datasets.densities import GaussianMixture  # a NormalMixture
        >>> far_apart = GaussianMixture([(-9, 0), (9, 0)], np.eye(2))
        >>> one = GaussianMixture([(0, 0)], np.eye(2))
        >>> print(round(far_apart.entropy() - one.entropy(), 3))  # log 2
        0.693
    """

    centres: np.ndarray
    weights: np.ndarray
    roots: np.ndarray

    def log_prob(self, x: Tensor) -> Tensor:
        precision = np.linalg.inv(self.roots @ self.roots.swapaxes(-1, -2))
        log_norm = math.log(2 * math.pi) + np.log(np.abs(np.linalg.det(self.roots)))
        c_0, c_1, p_00, p_01, p_11, log_weights = (
            torch.as_tensor(table, dtype=x.dtype, device=x.device)
            for table in (
                *self.centres.T,
                *(precision[..., i, j] for i, j in ((0, 0), (0, 1), (1, 1))),
                np.log(self.weights) - log_norm,
            )
        )
        size = max(1, 2**18 // len(self.centres))
        parts = []
        # A few points at a time bound the memory and keep the work in cache.
        for points in x.reshape(-1, 2, 1).split(size):
            d_0, d_1 = points[:, 0] - c_0, points[:, 1] - c_1
            square = d_0 * (p_00 * d_0 + 2 * p_01 * d_1) + p_11 * d_1 * d_1
            parts.append((log_weights - square / 2).logsumexp(-1))
        return torch.cat(parts).reshape(x.shape[:-1])

    def entropy(self) -> float:
        return self._entropy

    @cached_property
    def _entropy(self) -> float:
        # The trapezoidal rule converges faster than any power of the step on smooth densities.
        step = np.linalg.svd(self.roots, compute_uv=False).min() / 2
        xmin, xmax, ymin, ymax = self.extent
        x = torch.arange(xmin, xmax, step, dtype=torch.float64)
        y = torch.arange(ymin, ymax, step, dtype=torch.float64)
        log_p = self.log_prob(torch.cartesian_prod(x, y))
        return float(-(log_p.exp() * log_p).sum().item() * step**2)

    @cached_property
    def extent(self) -> tuple[float, float, float, float]:
        """Five standard deviations around the centres."""
        margin = 5 * np.linalg.norm(self.roots, axis=-1)
        xmin, ymin = (self.centres - margin).min(0).tolist()
        xmax, ymax = (self.centres + margin).max(0).tolist()
        return xmin, xmax, ymin, ymax


class GaussianMixture(NormalMixture):
    r"""Gaussians of equal weight, :math:`c_k + R_k\,N(0, I)` for k uniform.

    Args:
        centres: c, shape (components, 2).
        roots: R, square roots of the covariances, shape (components, 2, 2) or one (2, 2) for all.

    Shape:
        x (..., 2) to log_prob (...) in nats

    Example:
        >>> import numpy as np
        >>> from datasets.densities import GaussianMixture
        >>> standard = GaussianMixture([(0, 0)], np.eye(2))
        >>> standard.sample(5).shape
        torch.Size([5, 2])
        >>> print(round(standard.entropy(), 4))  # log(2 pi e)
        2.8379
    """

    def __init__(self, centres: np.ndarray, roots: np.ndarray) -> None:
        self.centres = np.asarray(centres, dtype=float)
        self.weights = np.full(len(self.centres), 1 / len(self.centres))
        self.roots = np.asarray(roots, dtype=float)

    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        k = torch.randint(len(self.centres), (n,), generator=generator)
        noise = torch.randn(n, 2, generator=generator)
        centres = torch.as_tensor(self.centres).to(noise)
        roots = torch.as_tensor(self.roots).to(noise).expand(len(centres), 2, 2)
        return centres[k] + (roots[k] * noise.unsqueeze(-2)).sum(-1)


class NoisyCurves(NormalMixture):
    r"""Points on curves, plus noise: :math:`c_k(u) + \sigma\,N(0, I)` k and u in [0, 1] uniform.

    The density, an integral over u, is taken by Gauss-Legendre quadrature, or by the periodic
    trapezoidal rule on closed curves. Both converge exponentially: with a node or two per sd of
    length the error is far below 1e-6 nats wherever log p exceeds -100.

    Args:
        curves: Analytic maps from u (...) to points (..., 2).
        sd: Standard deviation of the noise.
        nodes: Nodes per curve.
        closed: Whether the curves have period 1 in u.

    Shape:
        x (..., 2) to log_prob (...) in nats

    Example:
        >>> import torch
        >>> from datasets.densities import NoisyCurves
        >>> segment = NoisyCurves([lambda u: torch.stack((10 * u, 0 * u), -1)], sd=0.5, nodes=64)
        >>> middle = segment.log_prob(torch.tensor([5.0, 0.0])).exp()
        >>> middle  # 1 / 10 along the segment, 1 / (0.5 sqrt(2 pi)) across
        tensor(0.0798)
    """

    def __init__(
        self,
        curves: Sequence[Callable[[Tensor], Tensor]],
        sd: float,
        *,
        nodes: int,
        closed: bool = False,
    ) -> None:
        self.curves = curves
        self.sd = sd
        self.nodes = nodes
        self.closed = closed
        self.roots = sd * np.eye(2)

    @cached_property
    def _rule(self) -> tuple[np.ndarray, np.ndarray]:
        """Nodes u and weights of the quadrature on [0, 1]."""
        if self.closed:
            return np.arange(self.nodes) / self.nodes, np.full(self.nodes, 1 / self.nodes)
        u, weights = np.polynomial.legendre.leggauss(self.nodes)
        return (u + 1) / 2, weights / 2

    @cached_property
    def centres(self) -> np.ndarray:
        """The nodes of all curves, shape (components, 2)."""
        u = torch.from_numpy(self._rule[0])
        return np.concatenate([curve(u).numpy() for curve in self.curves])

    @cached_property
    def weights(self) -> np.ndarray:
        """Weights of the nodes, shape (components,), summing to 1."""
        return np.tile(self._rule[1], len(self.curves)) / len(self.curves)

    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        k = torch.randint(len(self.curves), (n,), generator=generator)
        u = torch.rand(n, generator=generator)
        noise = torch.randn(n, 2, generator=generator)
        points = torch.stack([curve(u) for curve in self.curves])[k, torch.arange(n)]
        return points + self.sd * noise


class UniformSquares(Density):
    """Uniform on the 8 dark squares, of side 2, of a checkerboard on [-4, 4]^2.

    Shape:
        x (..., 2) to log_prob (...) in nats, -inf outside

    Example:
        >>> import torch
        >>> from datasets.densities import UniformSquares
        >>> UniformSquares().log_prob(torch.tensor([[1.0, 1.0], [1.0, 3.0]])).exp()
        tensor([0.0312, 0.0000])
    """

    extent = (-4.0, 4.0, -4.0, 4.0)

    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        square = torch.randint(8, (n,), generator=generator)
        column = square // 2
        row = square % 2 * 2 + column % 2
        return 2 * (_point(column, row) + torch.rand(n, 2, generator=generator)) - 4

    def log_prob(self, x: Tensor) -> Tensor:
        x_0, x_1 = x.unbind(-1)
        column, row = (x_0 / 2).floor(), (x_1 / 2).floor()
        # Every line borders a dark square, and rounding may put a sample on it.
        on_a_line = (x_0 == 2 * column) | (x_1 == 2 * row)
        dark = on_a_line | ((column + row) % 2 == 0)
        inside = (x_0.abs() <= 4) & (x_1.abs() <= 4) & dark
        return torch.zeros_like(x_0).masked_fill(~inside, -math.inf) - self.entropy()

    def entropy(self) -> float:
        return math.log(32)


class Warped(Density):
    """The law of ``warp(z)``, z from another density, for a warp that preserves area: det J = 1.

    Args:
        base: The law of z.
        warp: Map of the plane, (..., 2) to (..., 2).
        unwarp: Its inverse.
        extent: See ``Density``.

    Shape:
        x (..., 2) to log_prob (...) in nats

    Example:
        >>> import torch
        >>> from datasets.densities import UniformSquares, Warped
        >>> swap = lambda x: x.flip(-1)
        >>> board = UniformSquares()
        >>> x = board.sample(5)
        >>> law = Warped(board, swap, swap, board.extent)
        >>> torch.equal(law.log_prob(swap(x)), board.log_prob(x))
        True
    """

    def __init__(
        self,
        base: Density,
        warp: Callable[[Tensor], Tensor],
        unwarp: Callable[[Tensor], Tensor],
        extent: tuple[float, float, float, float],
    ) -> None:
        self.base = base
        self.warp = warp
        self.unwarp = unwarp
        self.extent = extent

    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        return self.warp(self.base.sample(n, generator))

    def log_prob(self, x: Tensor) -> Tensor:
        return self.base.log_prob(self.unwarp(x))

    def entropy(self) -> float:
        return self.base.entropy()


def _point(x_0: Tensor, x_1: Tensor) -> Tensor:
    return torch.stack((x_0, x_1), dim=-1)


def _circle(u: Tensor, *, radius: float) -> Tensor:
    angle = 2 * math.pi * u
    return _point(radius * angle.cos(), radius * angle.sin())


def _outer_moon(u: Tensor) -> Tensor:
    angle = math.pi * u
    return _point(2 * angle.cos() - 1, 2 * angle.sin() - 0.2)


def _inner_moon(u: Tensor) -> Tensor:
    angle = math.pi * u
    return _point(1 - 2 * angle.cos(), 0.8 - 2 * angle.sin())


def _swiss_roll(u: Tensor) -> Tensor:
    angle = 1.5 * math.pi * (1 + 2 * u)
    return _point(angle * angle.cos(), angle * angle.sin()) / 5


def _spiral(u: Tensor, *, sign: int) -> Tensor:
    """Angle from pi/2 to 3 pi, the square root making the law nearly uniform in length."""
    angle = math.pi * (0.25 + 8.75 * u).sqrt()
    return sign * _point(-angle * angle.cos(), angle * angle.sin()) / 3


def _twist(x: Tensor, *, rate: float) -> Tensor:
    """Turn x by ``rate |x|^2`` radians."""
    angle = rate * x.square().sum(-1)
    c, s = angle.cos(), angle.sin()
    x_0, x_1 = x.unbind(-1)
    return _point(c * x_0 - s * x_1, s * x_0 + c * x_1)


def _bend(x: Tensor, *, rate: float) -> Tensor:
    """Shift the second coordinate by ``rate (x_0^2 - 1.5^2)``."""
    x_0, x_1 = x.unbind(-1)
    return _point(x_0, x_1 + rate * (x_0.square() - 2.25))


def _directions(n: int) -> np.ndarray:
    """n unit vectors equally spaced, first the x axis, shape (n, 2)."""
    angles = 2 * np.pi * np.arange(n) / n
    return np.stack((np.cos(angles), np.sin(angles)), axis=-1)


def _blades(n: int) -> GaussianMixture:
    """n Gaussians around the origin at radius 2, sd 0.6 along the radius and 0.2 across."""
    radial = _directions(n)
    across = np.stack((-radial[:, 1], radial[:, 0]), axis=-1)
    return GaussianMixture(2 * radial, np.stack((0.6 * radial, 0.2 * across), axis=-1))


DENSITIES: dict[str, Density] = {
    "two_moons": NoisyCurves((_outer_moon, _inner_moon), 0.2, nodes=80),
    "circles": NoisyCurves(
        [partial(_circle, radius=r) for r in (1.5, 3)], 0.24, nodes=128, closed=True
    ),
    "rings": NoisyCurves(
        [partial(_circle, radius=r) for r in (0.75, 1.5, 2.25, 3)], 0.08, nodes=256, closed=True
    ),
    "eight_gaussians": GaussianMixture(8**0.5 * _directions(8), 8**-0.5 * np.eye(2)),
    "twenty_five_gaussians": GaussianMixture(
        1.5 * np.mgrid[-2:3, -2:3].reshape(2, 25).T, 0.2 * np.eye(2)
    ),
    "pinwheel": Warped(
        _blades(5), partial(_twist, rate=-1 / 8), partial(_twist, rate=1 / 8), (-4.5, 4.5) * 2
    ),
    "checkerboard": UniformSquares(),
    "two_spirals": NoisyCurves([partial(_spiral, sign=s) for s in (1, -1)], 0.1, nodes=320),
    "swiss_roll": NoisyCurves((_swiss_roll,), 0.2, nodes=256),
    "banana": Warped(
        GaussianMixture([(0, 0)], np.diag((1.5, 0.4))),
        partial(_bend, rate=1 / 4),
        partial(_bend, rate=-1 / 4),
        (-5.5, 5.5, -2.5, 6.5),
    ),
}
