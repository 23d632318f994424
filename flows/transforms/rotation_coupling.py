"""Coupling layers whose one half rotates and shifts the other."""

from collections.abc import Callable

from torch import Tensor, nn

from flows import givens
from flows.orthogonal_base import NamedAngles
from flows.transforms.coupling import Coupling, kept_and_moved
from flows.transforms.per_sample import count_angles, rotate_features, schedule_from_zero

__all__ = ["RotationCoupling"]


class RotationCoupling(NamedAngles, Coupling):
    r"""Volume-preserving coupling :math:`y_2 = U(\theta(x_1))\, x_2 + t(x_1)`.

    Images are rotated along their moved channels, at every pixel by angles of its own. Two
    features leave one to move, which is only shifted.

    Args:
        features: Size of axis 1, at least 2: features of vectors, channels of images.
        net: ``net(in_features, out_features)`` makes the conditioner, a module called as
            ``conditioner(kept, context)``.
        schedule: Planes of the moved features, in order of application;
            ``crossing(features - features // 2)`` by default. Not ``cosine_sine``, which is
            degenerate where conditioners start, at angles of zero.
        flip: Keep the second half instead of the first.

    Shape:
        inputs (batch, features, ...) to outputs of the same shape, logabsdet (batch,), zero.

    Raises:
        ValueError: If sizes or the schedule do not fit.

    Reference:
        Hamze (2021), arXiv 2106.00003, for the rotation

    Example:
        >>> import torch
        >>> from flows import RotationCoupling
        >>> from flows.nets import MLP
        >>> layer = RotationCoupling(6, MLP)
        >>> _ = torch.nn.init.normal_(layer.net.last.weight, std=0.1)
        >>> x = torch.randn(2, 6)
        >>> outputs, logabsdet = layer(x)
        >>> torch.allclose(layer.inverse(outputs)[0], x, atol=1e-4), logabsdet.tolist()
        (True, [0.0, 0.0])
    """

    volume_preserving = True

    def __init__(
        self,
        features: int,
        net: Callable[[int, int], nn.Module],
        *,
        schedule: givens.Schedule | None = None,
        flip: bool = False,
    ) -> None:
        _, moved = kept_and_moved(features)
        self.schedule = schedule_from_zero(moved, schedule)
        super().__init__(features, net, flip=flip)

    def count_parameters(self, moved: int) -> int:
        return moved + count_angles(self.schedule)

    def couple(self, moved: Tensor, parameters: Tensor, *, inverse: bool) -> tuple[Tensor, Tensor]:
        shift, angles = parameters.tensor_split([moved.shape[1]], dim=1)
        if inverse:
            outputs = rotate_features(moved - shift, angles, self.schedule, inverse=True)
        else:
            outputs = rotate_features(moved, angles, self.schedule) + shift
        return outputs, moved.new_zeros(moved.shape[0])

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, schedule={self.schedule}"
