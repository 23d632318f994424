"""Linear layers by their singular value decomposition."""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from flows import givens
from flows.checks import check_at_least, check_positive
from flows.transforms.base import Transform, bounded, check_features
from flows.transforms.per_sample import count_angles, rotate_features, schedule_from_zero
from flows.transforms.rotation import Init, Rotation

__all__ = ["SVDLinear"]


class SVDLinear(Transform):
    r"""Affine map :math:`y = W x + b`, :math:`W = U e^S V^T` with S diagonal.

    U and V are the :class:`~flows.transforms.Rotation` layers ``left`` and ``right``. W starts
    at ``init``: so does U, V starts at the identity and S at zero. It reaches every matrix
    whose determinant has the sign of that of ``init``, if the schedule reaches every rotation
    and there is no ``bound``.
    With ``net`` the context c adds to S and b, and rotates inside U and V:
    :math:`W(c) = U\,U'(c)\, e^{S + S'(c)}\, (V\,V'(c))^T`.

    Args:
        features: Size of axis 1, at least 2: features of vectors, channels of images.
        schedule: Planes of U and V, in order of application; ``crossing(features)`` by default.
        init: Where W starts, as in :class:`~flows.transforms.Rotation`.
        bound: Bound of the log-scales on the diagonal, in nats; None for none.
        net: ``net(0, out_features)`` makes the conditioner, a module called as
            ``conditioner(inputs, context)`` with inputs (batch, 0); None for a map without
            context. Conditioners start at angles of zero, where ``cosine_sine`` is degenerate:
            they need another schedule.

    Shape:
        inputs (batch, features, ...) to outputs of the same shape, logabsdet (batch,) in nats:
        the sum of the log-scales times the number of positions.

    Raises:
        ValueError: If sizes, ``init``, ``bound`` or the schedule do not fit.

    Reference:
        Zhang, Lei and Dhillon (2018), arXiv 1803.09327, there by reflections

    Example:
        >>> import torch
        >>> from flows import SVDLinear
        >>> layer = SVDLinear(3, init="haar")
        >>> _ = torch.nn.init.constant_(layer.log_scale, 0.5)
        >>> layer(torch.randn(2, 3))[1].tolist()
        [1.5, 1.5]
        >>> singular_values = torch.linalg.svdvals(layer.matrix())
        >>> torch.allclose(singular_values.log(), torch.tensor(0.5), atol=1e-5)
        True
    """

    def __init__(
        self,
        features: int,
        *,
        schedule: givens.Schedule | None = None,
        init: Init = "identity",
        bound: float | None = None,
        net: Callable[[int, int], nn.Module] | None = None,
    ) -> None:
        super().__init__()
        check_at_least(2, features=features)
        if bound is not None:
            check_positive(bound=bound)
        self.features = features
        self.bound = bound
        self.left = Rotation(features, schedule, init=init)
        self.right = Rotation(features, schedule)
        self.log_scale = nn.Parameter(torch.zeros(features))
        self.shift = nn.Parameter(torch.zeros(features))
        # The planes that the context turns, and their conditioner.
        self.schedule = None if net is None else schedule_from_zero(features, schedule)
        self.net = None if net is None else net(0, 2 * features + 2 * self.schedule.num_angles)

    def forward(self, inputs: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        check_features(inputs, self.features)
        log_scale, shift, left, right = self._parts(inputs, context)
        x = rotate_features(_unmix(inputs, self.right), right, self.schedule, inverse=True)
        x = x * _at_positions(log_scale.exp(), inputs)
        x = _mix(rotate_features(x, left, self.schedule), self.left)
        return x + _at_positions(shift, inputs), _logabsdet(log_scale, inputs)

    def inverse(self, inputs: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        check_features(inputs, self.features)
        log_scale, shift, left, right = self._parts(inputs, context)
        x = _unmix(inputs - _at_positions(shift, inputs), self.left)
        x = rotate_features(x, left, self.schedule, inverse=True)
        x = x * _at_positions((-log_scale).exp(), inputs)
        x = _mix(rotate_features(x, right, self.schedule), self.right)
        return x, _logabsdet(-log_scale, inputs)

    def matrix(self, context: Tensor | None = None) -> Tensor:
        """W, shape (features, features); with ``net`` (batch, features, features), W(c)."""
        rows = 1 if context is None else context.shape[0]
        log_scale, _, *angles = self._parts(self.log_scale.new_zeros(rows, 1), context)
        u, v = self.left.matrix(), self.right.matrix()
        if self.net is None:
            return u * log_scale.exp() @ v.mT
        u, v = (q @ givens.matrix(a, self.schedule) for q, a in zip((u, v), angles, strict=True))
        return u * log_scale.exp().unsqueeze(1) @ v.mT

    def recenter(self) -> None:
        """As :meth:`Rotation.recenter`, for U and V; W is unchanged, whatever the context."""
        self.left.recenter()
        self.right.recenter()

    def _parts(
        self, inputs: Tensor, context: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Log-scales, shifts, and the context's angles; one row for all without a conditioner."""
        if self.net is None:
            given = inputs.new_zeros(1, 2 * self.features)
        else:
            given = self.net(inputs.new_zeros(inputs.shape[0], 0), context)
        sizes = 2 * [self.features] + 2 * [count_angles(self.schedule)]
        log_scale, shift, left, right = given.split(sizes, dim=1)
        log_scale, shift = self.log_scale + log_scale, self.shift + shift
        if self.bound is not None:
            log_scale = bounded(log_scale, self.bound)
        return log_scale.to(inputs.dtype), shift.to(inputs.dtype), left, right

    def extra_repr(self) -> str:
        return f"features={self.features}, bound={self.bound}"


def _mix(inputs: Tensor, rotation: Rotation) -> Tensor:
    """Apply a rotation to axis 1."""
    return rotation(inputs.movedim(1, -1))[0].movedim(-1, 1)


def _unmix(inputs: Tensor, rotation: Rotation) -> Tensor:
    """Undo a rotation of axis 1."""
    return rotation.inverse(inputs.movedim(1, -1))[0].movedim(-1, 1)


def _at_positions(rows: Tensor, inputs: Tensor) -> Tensor:
    """Rows (batch or 1, features) that broadcast over the positions of the inputs."""
    return rows.reshape(*rows.shape, *[1] * (inputs.ndim - 2))


def _logabsdet(log_scale: Tensor, inputs: Tensor) -> Tensor:
    """Summed over features and positions, (batch,)."""
    positions = math.prod(inputs.shape[2:])
    return inputs.new_zeros(inputs.shape[0]) + positions * log_scale.sum(1)
