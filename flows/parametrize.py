"""Our rotations as a torch parametrization: orthogonal weights in any network."""

import math

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from flows import givens
from flows.orthogonal_base import OrthogonalBase, check_orthogonal, starts_at_random

__all__ = ["orthogonal"]


def orthogonal(
    module: nn.Module, name: str = "weight", schedule: givens.Schedule | None = None
) -> nn.Module:
    r"""Keep a weight orthogonal: from now on it is computed from freely learned angles.

    The weight, all axes but the first flattened, is a matrix of m orthonormal columns, or rows
    if they are fewer, of length N. It is made as

    .. math:: W = B\,U(\theta)_{:, :m}, \quad\text{or}\quad W = (B\,U(\theta)_{:, :m})^T,

    with a fixed orthogonal matrix B of size N and the product U of the turns of ``schedule``.
    W starts at the polar factor of the weight there is, which is the nearest orthogonal matrix:
    a weight that is orthogonal stays as it is. A square weight keeps the sign of its
    determinant. Angles start at zero (those of ``cosine_sine`` at random, undone by B).

    Assigning an orthogonal matrix, ``module.weight = q``, moves B there and restarts the angles.
    ``torch.nn.utils.parametrize`` has the rest: ``cached()`` to compute a weight once,
    ``remove_parametrizations(module, "weight")`` to make it a plain parameter again. Make the
    optimizer afterwards: the angles are a new parameter,
    ``module.parametrizations.weight.original0``.

    Each use of the weight turns m columns (N, for m >= N / 2) and multiplies them by B, which
    takes 2 N^2 m flops; the N^2 numbers of B are stored. For many thousands of inputs to a
    filter that is much: then keep a smaller weight orthogonal.

    Args:
        module: Linear or convolution layer, or any module with such a weight; changed in place.
        name: Its parameter, with at least two axes.
        schedule: Planes in order of application, of dimension N. By default one that reaches
            every such matrix (of either determinant where the weight is square: its own),
            immersed at the start: ``crossing(N)`` for m >= N - 1, ``crossing(N).frame(m)``
            for m = N // 2, else ``hurwitz(N).frame(m)``. In large dimensions
            ``crossing(N).frame(m)`` is faster, but proved to reach only what is near the start.

    Returns:
        The module.

    Raises:
        ValueError: If there is no such parameter, it is parametrized already, not real
            floating-point, not finite, of less than two axes or of one element, or the
            schedule does not fit; later, if a value is assigned that is not orthogonal.

    Reference:
        Lezcano-Casado (2019), arXiv 1909.09501, for the fixed matrix in front

    Example:
        >>> import torch
        >>> from flows import orthogonal
        >>> layer = orthogonal(torch.nn.Conv2d(3, 8, kernel_size=2))
        >>> rows = layer.weight.flatten(1)
        >>> rows.shape
        torch.Size([8, 12])
        >>> torch.allclose(rows @ rows.mT, torch.eye(8), atol=1e-5)
        True
    """
    if parametrize.is_parametrized(module, name):
        raise ValueError(f"{name} is parametrized already: remove that parametrization first.")
    weight = module._parameters.get(name)
    if weight is None:
        known = [key for key, value in module._parameters.items() if value is not None]
        raise ValueError(f"name must be a parameter of the module, one of {known}, got {name!r}.")
    _check_weight(name, weight)
    rows, columns = len(weight), math.prod(weight.shape[1:])
    size, count = max(rows, columns), min(rows, columns)
    if schedule is None:
        schedule = _default_schedule(size, count)
    if schedule.dim != size:
        raise ValueError(
            f"schedule must have dimension {size}, the longer side of the {rows} x {columns} "
            f"weight, got {schedule}."
        )
    parametrize.register_parametrization(module, name, _Orthogonal(weight.shape, schedule))
    module.parametrizations[name].register_load_state_dict_pre_hook(_refuse_other_weights)
    return module


class _Orthogonal(OrthogonalBase):
    """Angles to a weight of the given shape, and back."""

    def __init__(self, shape: torch.Size, schedule: givens.Schedule) -> None:
        super().__init__()
        self.shape = shape
        self.rows, self.columns = shape[0], math.prod(shape[1:])
        self.schedule = schedule
        # Torch hands the first weight to right_inverse on registration.
        self.register_buffer("base", None)

    def forward(self, angles: Tensor) -> Tensor:
        # Half precision only rounds the result; under autocast the weight stays as it is.
        wide = torch.promote_types(angles.dtype, torch.float32)
        with torch.autocast(angles.device.type, enabled=False):
            base, count = self.base.to(wide), min(self.rows, self.columns)
            turned = self._turned_columns(angles.to(wide), count)
            weight = base @ turned if self.rows >= self.columns else turned.mT @ base.mT
        return weight.to(angles.dtype).view(self.shape)

    def _turned_columns(self, angles: Tensor, count: int) -> Tensor:
        """The first columns of U; where they are few, without the others."""
        size = self.schedule.dim
        if 2 * count >= size:
            return givens.matrix(angles, self.schedule)[:, :count]
        start = torch.eye(count, size, dtype=angles.dtype, device=angles.device)
        return givens.rotate(start, angles, self.schedule).mT

    @torch.no_grad()
    def right_inverse(self, weight: Tensor) -> tuple[Tensor]:
        """Angles of a weight; the base moves to where they can start afresh."""
        if weight.shape != self.shape:
            raise ValueError(
                f"the weight must have shape {tuple(self.shape)}, got {tuple(weight.shape)}."
            )
        matrix = weight.detach().reshape(self.rows, self.columns)
        first = self.base is None
        if not first:
            check_orthogonal("the weight", matrix)
            matrix = matrix.to(self.base)
        base = _completed(matrix if self.rows >= self.columns else matrix.mT)
        angles = base.new_zeros(self.schedule.num_angles)
        if starts_at_random(self.schedule):
            angles.uniform_(-math.pi, math.pi)
            base = base @ givens.matrix(angles, self.schedule).mT
        if first:
            self.base = base.to(matrix.dtype)
        else:
            self.base.copy_(base)
        # As a tuple: torch then makes a new parameter and does not reshape the old one.
        return (angles.to(matrix.dtype),)

    @property
    def _identity(self) -> str:
        return f"{self.schedule.name} {self.rows}x{self.columns}"

    def extra_repr(self) -> str:
        return (
            f"{self.rows} x {self.columns}, schedule={self.schedule}, "
            f"angles={self.schedule.num_angles}"
        )


def _default_schedule(size: int, count: int) -> givens.Schedule:
    """The cheapest schedule that is known to reach every frame of ``count`` columns."""
    if count >= size - 1:
        return givens.crossing(size)
    if count == size // 2:
        return givens.crossing(size).frame(count)
    return givens.hurwitz(size).frame(count)


def _completed(columns: Tensor) -> Tensor:
    """Orthogonal matrix in float64 that starts with the polar factor of these columns."""
    left, _, right = torch.linalg.svd(columns.double(), full_matrices=True)
    count = columns.shape[1]
    return torch.cat([left[:, :count] @ right, left[:, count:]], dim=1)


def _check_weight(name: str, weight: Tensor) -> None:
    if not weight.is_floating_point():
        raise ValueError(f"{name} must be real floating-point numbers, got {weight.dtype}.")
    if isinstance(weight, nn.UninitializedParameter) or weight.is_meta:
        raise ValueError(f"{name} has no values yet: initialize the module first.")
    if weight.ndim < 2 or weight.numel() < 2:
        raise ValueError(
            f"{name} must have at least two axes and two elements, got {tuple(weight.shape)}."
        )
    if not weight.isfinite().all():
        raise ValueError(f"{name} must be finite, to start from the nearest orthogonal matrix.")


def _refuse_other_weights(parametrizations: nn.Module, state: dict, prefix: str, *_) -> None:
    # Torch loads the angles before it comes to the module that knows what they mean.
    if f"{prefix}0._extra_state" in state:
        parametrizations[0].set_extra_state(state[f"{prefix}0._extra_state"])
