"""Rotations whose angles depend on the context."""

from collections.abc import Callable

from torch import Tensor, nn

from flows import givens
from flows.checks import check_at_least
from flows.orthogonal_base import NamedAngles
from flows.transforms.base import Transform, check_features
from flows.transforms.per_sample import rotate_features, schedule_from_zero

__all__ = ["ConditionalRotation"]


class ConditionalRotation(NamedAngles, Transform):
    r"""Volume-preserving map :math:`y = U(\theta(c)) x`, with angles from the context c.

    Images are rotated along their channels, alike at every position. Angles of zero are the
    identity.

    Args:
        features: Size of axis 1, at least 2: features of vectors, channels of images.
        net: ``net(0, out_features)`` makes the conditioner, a module called as
            ``conditioner(inputs, context)`` with inputs (batch, 0).
        schedule: Planes in order of application; ``crossing(features)`` by default. Not
            ``cosine_sine``, which is degenerate where conditioners start, at angles of zero.

    Shape:
        inputs (batch, features, ...) to outputs of the same shape, logabsdet (batch,), zero.

    Raises:
        ValueError: If sizes or the schedule do not fit.

    Reference:
        Hamze (2021), arXiv 2106.00003, for the rotation

    Example:
        >>> from functools import partial
        >>> import torch
        >>> from flows import ConditionalRotation
        >>> from flows.nets import MLP
        >>> layer = ConditionalRotation(4, partial(MLP, context_features=1))
        >>> _ = torch.nn.init.normal_(layer.net.last.weight)
        >>> x, context = torch.randn(3, 4), torch.randn(3, 1)
        >>> outputs, logabsdet = layer(x, context)
        >>> torch.allclose(outputs.norm(dim=1), x.norm(dim=1), atol=1e-5), logabsdet.tolist()
        (True, [0.0, 0.0, 0.0])
    """

    volume_preserving = True

    def __init__(
        self,
        features: int,
        net: Callable[[int, int], nn.Module],
        schedule: givens.Schedule | None = None,
    ) -> None:
        super().__init__()
        check_at_least(2, features=features)
        self.features = features
        self.schedule = schedule_from_zero(features, schedule)
        self.net = net(0, self.schedule.num_angles)

    def forward(self, inputs: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self._rotate(inputs, context, inverse=False)

    def inverse(self, inputs: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self._rotate(inputs, context, inverse=True)

    def _rotate(
        self, inputs: Tensor, context: Tensor | None, *, inverse: bool
    ) -> tuple[Tensor, Tensor]:
        check_features(inputs, self.features)
        angles = self.net(inputs.new_zeros(inputs.shape[0], 0), context)
        outputs = rotate_features(inputs, angles, self.schedule, inverse=inverse)
        return outputs, inputs.new_zeros(inputs.shape[0])

    def extra_repr(self) -> str:
        return f"features={self.features}, schedule={self.schedule}"
