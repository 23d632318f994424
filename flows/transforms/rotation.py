"""Learnable rotations of feature vectors and of image channels."""

import hashlib
import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from flows import givens
from flows.checks import check_at_least, check_positive
from flows.orthogonal_base import (
    OrthogonalBase,
    check_orthogonal,
    nearest_orthogonal,
    starts_at_random,
)
from flows.transforms.base import Transform, bounded, check_features

__all__ = ["Rotation", "Rotation1x1"]

Init = Literal["identity", "haar", "permutation"] | Tensor
Ties = Literal["rounds"] | Sequence[int]


class Rotation(OrthogonalBase, Transform):
    r"""Volume-preserving map :math:`y = W x`, :math:`W = B\,U(\theta)`.

    :math:`B` is a fixed orthogonal matrix, :math:`U` turns each plane of the schedule by
    one learned angle. W starts at ``init``: angles start at zero and B at ``init``, except
    for ``cosine_sine`` schedules, which are degenerate at zero: there the angles start at
    random and B undoes them.

    Args:
        features: Size of the last axis, at least 2.
        schedule: Planes in order of application; ``crossing(features)`` by default.
        init: Where W starts: ``"identity"``, ``"haar"`` (uniform on the orthogonal group),
            ``"permutation"`` (a random one) or an orthogonal matrix.
        angle_limit: Keeps every angle within (-limit, limit) radians, smoothly:
            limit * tanh(parameter / limit).
        ties: Angles that share a parameter: ``"rounds"`` for one parameter per round, or
            for every angle the number of its parameter, 0, 1, ...

    Shape:
        inputs (batch, ..., features) to outputs of the same shape, logabsdet (batch,), zero.

    Raises:
        ValueError: If sizes do not fit, or ``init`` is no orthogonal matrix.

    Reference:
        Hamze (2021), arXiv 2106.00003

    Example:
        >>> import math, torch
        >>> from flows import Rotation
        >>> layer = Rotation(2)
        >>> _ = torch.nn.init.constant_(layer.raw_angles, math.pi / 2)
        >>> outputs, logabsdet = layer(torch.tensor([[3.0, 4.0]]))
        >>> outputs.round(decimals=4).tolist(), logabsdet.item()  # a quarter turn
        ([[-4.0, 3.0]], 0.0)
        >>> layer.recenter()
        >>> layer.raw_angles.tolist(), layer(torch.tensor([[3.0, 4.0]]))[0].round().tolist()
        ([0.0], [[-4.0, 3.0]])
    """

    volume_preserving = True

    def __init__(
        self,
        features: int,
        schedule: givens.Schedule | None = None,
        *,
        init: Init = "identity",
        angle_limit: float | None = None,
        ties: Ties | None = None,
    ) -> None:
        super().__init__()
        check_at_least(2, features=features)
        if angle_limit is not None:
            check_positive(angle_limit=angle_limit)
            if math.isinf(angle_limit):
                raise ValueError("angle_limit must be finite, or None for no limit, got inf.")
        self.features = features
        self.schedule = givens.crossing(features) if schedule is None else schedule
        if self.schedule.dim != features:
            raise ValueError(f"schedule must have dimension {features}, got {self.schedule}.")
        self.angle_limit = angle_limit
        groups = _groups(ties, self.schedule)
        # Derived from the arguments, so never saved and never averaged.
        self.register_buffer("groups", groups, persistent=False)
        count = self.schedule.num_angles if groups is None else int(groups.max()) + 1
        self.raw_angles = nn.Parameter(torch.zeros(count))
        self.register_buffer("base", _initial_matrix(init, features))
        self._restart()

    @property
    def angles(self) -> Tensor:
        """The angles in radians, after ties and limit, shape (num_angles,)."""
        angles = self.raw_angles if self.groups is None else self.raw_angles[self.groups]
        if self.angle_limit is None:
            return angles
        return bounded(angles, self.angle_limit)

    def matrix(self) -> Tensor:
        """W, shape (features, features); in full precision under autocast, too."""
        with torch.autocast(self.base.device.type, enabled=False):
            return self.base @ givens.matrix(self.angles, self.schedule)

    def forward(self, inputs: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        check_features(inputs, self.features, axis=-1)
        return _mix(inputs, self.matrix().mT), inputs.new_zeros(inputs.shape[0])

    def inverse(self, inputs: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        check_features(inputs, self.features, axis=-1)
        return _mix(inputs, self.matrix()), inputs.new_zeros(inputs.shape[0])

    def recover(
        self, outputs: Tensor, context: Tensor | None = None, *, inverse: bool = False
    ) -> tuple[Tensor, Tensor, Tensor]:
        """As :meth:`Coupling.recover`; one W serves the way back and the way forth."""
        weight = self.matrix() if inverse else self.matrix().mT
        inputs = _mix(outputs, weight.detach().mT).requires_grad_()
        return inputs, _mix(inputs, weight), inputs.new_zeros(inputs.shape[0])

    @torch.no_grad()
    def recenter(self) -> None:
        """Fold the learned rotation into the base and restart the angles; W is unchanged.

        Optimizer moments and averages of the angles must restart with it.
        """
        turned = givens.matrix(self.angles.double(), self.schedule)
        self.base.copy_(nearest_orthogonal(self.base.double() @ turned))
        self._restart()

    @torch.no_grad()
    def _restart(self) -> None:
        """Angles where learning starts; the base takes up what they turn."""
        if not starts_at_random(self.schedule):
            self.raw_angles.zero_()
            return
        # Within the limit, where its derivative is not yet small.
        widest = math.pi if self.angle_limit is None else min(math.pi, self.angle_limit)
        self.raw_angles.uniform_(-widest, widest)
        turned = givens.matrix(self.angles.double(), self.schedule)
        self.base.copy_(self.base.double() @ turned.mT)

    @property
    def _identity(self) -> str:
        """What the parameters mean: the schedule, and limit and ties if there are any."""
        parts = [self.schedule.name]
        if self.angle_limit is not None:
            parts.append(f"angle_limit={self.angle_limit:g}")
        if self.groups is not None:
            digest = hashlib.sha256(repr(self.groups.tolist()).encode()).hexdigest()[:16]
            parts.append(f"ties={digest}")
        return " ".join(parts)

    def extra_repr(self) -> str:
        return f"features={self.features}, schedule={self.schedule}, angles={len(self.raw_angles)}"


class Rotation1x1(Transform):
    """A :class:`Rotation` of image channels: an orthogonal 1x1 convolution.

    :math:`y = W x` at every pixel, with one W for all of them.

    Args:
        channels: Number of channels, at least 2.
        schedule: As in :class:`Rotation`.
        init: As in :class:`Rotation`.
        angle_limit: As in :class:`Rotation`.
        ties: As in :class:`Rotation`.

    Shape:
        inputs (batch, channels, height, width) to outputs of the same shape,
        logabsdet (batch,), zero.

    Raises:
        ValueError: If sizes do not fit, or ``init`` is no orthogonal matrix.

    Reference:
        Kingma and Dhariwal (2018), Glow, arXiv 1807.03039, for the 1x1 convolution

    Example:
        >>> import torch
        >>> from flows import Rotation1x1
        >>> layer = Rotation1x1(3, init="haar")
        >>> images = torch.randn(2, 3, 4, 4)
        >>> outputs, logabsdet = layer(images)
        >>> torch.allclose(outputs.norm(dim=1), images.norm(dim=1), atol=1e-5)  # at every pixel
        True
    """

    volume_preserving = True

    def __init__(
        self,
        channels: int,
        schedule: givens.Schedule | None = None,
        *,
        init: Init = "identity",
        angle_limit: float | None = None,
        ties: Ties | None = None,
    ) -> None:
        super().__init__()
        self.rotation = Rotation(channels, schedule, init=init, angle_limit=angle_limit, ties=ties)

    def forward(self, inputs: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self._mix(inputs, self.rotation.matrix())

    def inverse(self, inputs: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self._mix(inputs, self.rotation.matrix().mT)

    def recover(
        self, outputs: Tensor, context: Tensor | None = None, *, inverse: bool = False
    ) -> tuple[Tensor, Tensor, Tensor]:
        """As :meth:`Coupling.recover`; one W serves the way back and the way forth."""
        weight = self.matrix().mT if inverse else self.matrix()
        inputs = self._mix(outputs, weight.detach().mT)[0].requires_grad_()
        return inputs, *self._mix(inputs, weight)

    def matrix(self) -> Tensor:
        """W, shape (channels, channels)."""
        return self.rotation.matrix()

    def recenter(self) -> None:
        """As :meth:`Rotation.recenter`."""
        self.rotation.recenter()

    def _mix(self, inputs: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        check_features(inputs, self.rotation.features)
        if inputs.ndim != 4:
            raise ValueError(
                "inputs must be images (batch, channels, height, width), "
                f"got {tuple(inputs.shape)}."
            )
        with torch.autocast(inputs.device.type, enabled=False):
            outputs = nn.functional.conv2d(inputs, weight[:, :, None, None].to(inputs.dtype))
        return outputs, inputs.new_zeros(inputs.shape[0])


def _mix(inputs: Tensor, weight: Tensor) -> Tensor:
    """inputs @ weight in the dtype of the inputs, whatever autocast would choose."""
    with torch.autocast(inputs.device.type, enabled=False):
        return inputs @ weight.to(inputs.dtype)


def _groups(ties: Ties | None, schedule: givens.Schedule) -> Tensor | None:
    """The number of its parameter for every angle, or None if each has its own."""
    if ties is None:
        return None
    if isinstance(ties, str):
        if ties != "rounds":
            raise ValueError(f"ties must be 'rounds' or a sequence of numbers, got {ties!r}.")
        return schedule.round_of_plane.clone()
    groups = torch.as_tensor(ties)
    if groups.shape != (schedule.num_angles,) or groups.is_floating_point():
        raise ValueError(
            f"ties must name a parameter for each of the {schedule.num_angles} angles of "
            f"{schedule}, got {tuple(groups.shape)} of {groups.dtype}."
        )
    used = groups.unique()
    if not torch.equal(used, torch.arange(len(used))):
        raise ValueError(f"ties must use the numbers 0, 1, ... without gaps, got {used.tolist()}.")
    return groups.long()


def _initial_matrix(init: Init, features: int) -> Tensor:
    """The orthogonal matrix that ``init`` asks for, in the default dtype."""
    dtype = torch.get_default_dtype()
    match init:
        case Tensor():
            if init.shape != (features, features):
                raise ValueError(
                    f"init must have shape {(features, features)}, got {tuple(init.shape)}."
                )
            check_orthogonal("init", init)
            return nearest_orthogonal(init.detach().double()).to(dtype)
        case "identity":
            return torch.eye(features)
        case "permutation":
            return torch.eye(features)[torch.randperm(features)]
        case "haar":
            q, r = torch.linalg.qr(torch.randn(features, features, dtype=torch.float64))
            # Positive diagonal of R makes Q uniform (Mezzadri 2007, math-ph/0609050).
            return (q * r.diagonal().sign()).to(dtype)
        case _:
            raise ValueError(
                "init must be 'identity', 'haar', 'permutation' or an orthogonal matrix, "
                f"got {init!r}."
            )
