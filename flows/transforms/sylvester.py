"""Sylvester flows: a small triangular net acts in a learned subspace."""

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from flows import givens, householder
from flows.checks import check_at_least
from flows.orthogonal_base import OrthogonalBase
from flows.transforms.base import Transform, bounded, check_vectors
from flows.transforms.per_sample import count_angles, schedule_from_zero

__all__ = ["Sylvester"]

# Bound of the log-diagonals, in nats, and steps of Newton's method: with this bound nothing but
# rounding is left after 5 (with a bound of 3 after 6, of 8 after 10).
BOUND = 2.0
STEPS = 6


class Sylvester(OrthogonalBase, Transform):
    r"""Residual map in a subspace: :math:`y = x + Q R \tanh(\tilde R\, Q^T x + b)`.

    The columns of Q are orthonormal: the first ``rank`` columns of a fixed random orthogonal
    matrix times what ``mixing`` learns. R and :math:`\tilde R` are upper triangular with
    diagonals r and :math:`\tilde r`. The determinant of the Jacobian is
    :math:`\prod_i (1 + \tanh'_i r_i \tilde r_i)`, and as :math:`0 < \tanh' \le 1` the map is
    invertible wherever :math:`r_i \tilde r_i > -1`. Here :math:`1 + r_i \tilde r_i = e^{s_i}`
    with s within (-2, 2), so every factor lies between :math:`e^{-2}` and :math:`e^2`; also
    :math:`\tilde r_i = e^{a_i}`, as its sign can be moved to r, with a within (-2, 2). Entries
    above the diagonals are parameters over :math:`\sqrt{\mathrm{rank}}`: large triangles would
    otherwise be ill-conditioned. The layer starts as the identity.

    The inverse is numeric but always found. In the subspace the equations are triangular, and
    each is :math:`t + p \tanh t = c` with p > -1, which Newton's method solves to rounding
    from the side where it cannot overshoot. ``forward(inverse(y))`` is y up to 30 units of
    rounding (4e-6 in float32, 7e-15 in float64) of the largest of 1, :math:`|y|` and the
    entries of :math:`|R| |\tilde R| |Q^T x|`; the other way round the error is that times the
    condition of the Jacobian. Gradients through the inverse are exact, second ones included.

    Args:
        features: Size of the vectors, at least 2.
        net: None for parameters of the layer's own, the same for all rows. Or a function of
            the context alone, which sets all of them, the angles too: ``net(0, count)`` makes
            a module called as ``conditioner(empty, context)`` with ``empty`` of shape
            (batch, 0) that returns (batch, count).
        rank: Columns of Q, 1 to features; features by default.
        schedule: Planes that turn Q, ``hurwitz(features).frame(rank)`` by default: it reaches
            every frame. Not ``cosine_sine``, which is degenerate where the angles start.
        mixing: What makes Q: ``"angles"`` of rotations; ``"householder"``, the first columns
            of a product of ``rank`` reflections, in which pairs of equal vectors undo each
            other at the start; or ``"permutation"``, a fixed random choice of the features, so
            that R and :math:`\tilde R` alone are learned.

    Shape:
        inputs (batch, features) to outputs of the same shape, logabsdet (batch,) in nats.

    Raises:
        ValueError: If sizes, the schedule or ``mixing`` do not fit.

    Reference:
        van den Berg et al. (2018), Sylvester Normalizing Flows, arXiv 1803.05649, there by
        reflections or fixed permutations; Likhosherstov et al. (2021), arXiv 2004.08675, for the
        columns of a product of reflections (T-CWY)

    Example:
        >>> import torch
        >>> from flows import Sylvester
        >>> layer = Sylvester(5, rank=2)
        >>> _ = torch.nn.init.normal_(layer.raw)
        >>> x = torch.randn(3, 5)
        >>> outputs, logabsdet = layer(x)
        >>> torch.allclose(layer.inverse(outputs)[0], x, atol=1e-3)
        True
    """

    def __init__(
        self,
        features: int,
        net: Callable[[int, int], nn.Module] | None = None,
        *,
        rank: int | None = None,
        schedule: givens.Schedule | None = None,
        mixing: Literal["angles", "householder", "permutation"] = "angles",
    ) -> None:
        super().__init__()
        check_at_least(2, features=features)
        if mixing not in ("angles", "householder", "permutation"):
            raise ValueError(
                "mixing must be 'angles', 'householder' or 'permutation', which make the columns "
                f"of Q orthonormal, got {mixing!r}."
            )
        if mixing != "angles" and schedule is not None:
            raise ValueError(f"schedule must be None for mixing={mixing!r}, got {schedule}.")
        rank = features if rank is None else rank
        if not 1 <= rank <= features:
            raise ValueError(f"rank must be from 1 to {features}, got {rank}.")
        if mixing == "angles" and schedule is None:
            schedule = givens.hurwitz(features).frame(rank)
        self.features = features
        self.rank = rank
        self.mixing = mixing
        self.schedule = schedule_from_zero(features, schedule) if mixing == "angles" else None
        above = rank * (rank - 1) // 2
        turns = rank * features if mixing == "householder" else count_angles(self.schedule)
        self.sizes = (turns, above, above, rank, rank, rank)
        self.net = None if net is None else net(0, sum(self.sizes))
        self.raw = nn.Parameter(torch.zeros(sum(self.sizes))) if net is None else None
        if mixing == "permutation":
            base = torch.eye(features)[torch.randperm(features)]
        else:
            base = nn.init.orthogonal_(torch.empty(features, features))
        self.register_buffer("base", base)
        # Where reflections start: what is learned is added, and no vector may be zero.
        pairs = torch.eye(features).repeat_interleave(2, dim=0)[:rank]
        self.register_buffer("pairs", pairs if mixing == "householder" else None, persistent=False)

    def forward(self, inputs: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        check_vectors(inputs, self.features)
        parts = self._parts(inputs, context)
        with torch.autocast(inputs.device.type, enabled=False):
            u = self._project(inputs, parts.turns)
            inner = torch.einsum("...ij,...j->...i", parts.inner, u) + parts.bias
            h = torch.tanh(inner)
            change = self._embed(torch.einsum("...ij,...j->...i", parts.outer, h), parts.turns)
        return inputs + change.to(inputs.dtype), _logabsdet(h, parts).to(inputs.dtype)

    def inverse(self, inputs: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        check_vectors(inputs, self.features)
        parts = self._parts(inputs, context)
        with torch.autocast(inputs.device.type, enabled=False):
            v = self._project(inputs, parts.turns)
            # Solutions of the rows below; the last row has only one unknown.
            u, h = v[:, :0], v[:, :0]
            for i in reversed(range(self.rank)):
                w = v[:, i] - (parts.outer[..., i, i + 1 :] * h).sum(-1)
                c = parts.bias[..., i] + (parts.inner[..., i, i + 1 :] * u).sum(-1)
                # u_i + r_i tanh(inner_i u_i + c) = w, for the argument of tanh instead of u_i.
                t = _solve(parts.product[..., i], parts.inner[..., i, i] * w + c)
                h_i = torch.tanh(t)
                u_i = w - parts.outer[..., i, i] * h_i
                u, h = torch.cat([u_i[:, None], u], dim=1), torch.cat([h_i[:, None], h], dim=1)
            change = self._embed(torch.einsum("...ij,...j->...i", parts.outer, h), parts.turns)
        return inputs - change.to(inputs.dtype), -_logabsdet(h, parts).to(inputs.dtype)

    def _parts(self, inputs: Tensor, context: Tensor | None) -> "_Parts":
        """What the parameters mean: one set for all rows, or one per row."""
        raw = self.raw
        if self.net is not None:
            raw = self.net(inputs.new_zeros(inputs.shape[0], 0), context).to(self.base.dtype)
        turns, outer, inner, log_slope, log_inner, bias = raw.split(self.sizes, dim=-1)
        if self.mixing == "householder":
            vectors = self.pairs + turns.unflatten(-1, self.pairs.shape)
            turns = householder.stiefel_cwy(vectors)
        log_slope, log_inner = bounded(log_slope, BOUND), bounded(log_inner, BOUND)
        product = torch.expm1(log_slope)
        outer = self._triangular(outer, product * torch.exp(-log_inner))
        return _Parts(turns, outer, self._triangular(inner, log_inner.exp()), product, bias)

    def _triangular(self, above: Tensor, diagonal: Tensor) -> Tensor:
        """Upper triangular matrices of the given entries, row by row above the diagonal."""
        rows, columns = torch.triu_indices(self.rank, self.rank, 1, device=above.device)
        filled = above.new_zeros(*above.shape[:-1], self.rank, self.rank)
        filled[..., rows, columns] = above / self.rank**0.5
        return filled + torch.diag_embed(diagonal)

    def _project(self, x: Tensor, turns: Tensor) -> Tensor:
        """Q^T x."""
        x = x.to(self.base.dtype) @ self.base
        if self.mixing == "householder":
            return torch.einsum("...ji,...j->...i", turns, x)
        if self.mixing == "angles":
            x = givens.rotate(x, turns, self.schedule, inverse=True)
        return x[..., : self.rank]

    def _embed(self, z: Tensor, turns: Tensor) -> Tensor:
        """Q z."""
        if self.mixing == "householder":
            return torch.einsum("...ij,...j->...i", turns, z) @ self.base.mT
        z = functional.pad(z, (0, self.features - self.rank))
        if self.mixing == "angles":
            z = givens.rotate(z, turns, self.schedule)
        return z @ self.base.mT

    @property
    def _identity(self) -> str:
        return f"{self._turned_by} rank={self.rank}"

    @property
    def _turned_by(self) -> str:
        return self.mixing if self.schedule is None else self.schedule.name

    def extra_repr(self) -> str:
        return f"features={self.features}, rank={self.rank}, {self._turned_by}"


class _Parts(NamedTuple):
    """The parameters of the formula, with or without an axis of rows in front."""

    turns: Tensor  # angles (num_angles,), columns of reflections (features, rank), or none
    outer: Tensor  # R, (rank, rank)
    inner: Tensor  # R~, (rank, rank)
    product: Tensor  # of their diagonals, (rank,)
    bias: Tensor  # b, (rank,)


def _logabsdet(h: Tensor, parts: _Parts) -> Tensor:
    """Sum of log(1 + tanh' r r~), given h = tanh: (batch, rank) -> (batch,)."""
    return torch.log1p((1 - h.square()) * parts.product).sum(-1)


def _solve(p: Tensor, c: Tensor) -> Tensor:
    """The t with t + p tanh(t) = c, p > -1, elementwise."""
    with torch.no_grad():
        t = _root(p, c)
    # A step of Newton's method from a constant is right to first order in p and c, a second
    # one to third order: so are the derivatives.
    for _ in range(2):
        t = _newton(t, p, c)
    return t


def _root(p: Tensor, c: Tensor) -> Tensor:
    # The equation is odd. For t >= 0 its left side is concave if p > 0 and convex if p < 0, so
    # from below or from above the root, respectively, Newton's method never crosses it. As
    # tanh t <= 1 and tanh t <= t, both c - p and c / (1 + p) are on that side: take the nearer.
    size = c.abs()
    starts = size - p, size / (1 + p)
    t = torch.where(p > 0, torch.maximum(*starts), torch.minimum(*starts))
    for _ in range(STEPS):
        t = _newton(t, p, size)
    return torch.copysign(t, c)


def _newton(t: Tensor, p: Tensor, c: Tensor) -> Tensor:
    h = torch.tanh(t)
    return t - (t + p * h - c) / (1 + p * (1 - h.square()))
