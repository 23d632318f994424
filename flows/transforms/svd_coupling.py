"""Coupling layers whose one half sets the singular value decomposition of the other's map."""

from collections.abc import Callable

from torch import Tensor, nn

from flows import givens
from flows.checks import check_positive
from flows.orthogonal_base import NamedAngles
from flows.transforms.base import bounded, sum_features
from flows.transforms.coupling import Coupling, kept_and_moved
from flows.transforms.per_sample import count_angles, rotate_features, schedule_from_zero

__all__ = ["SVDCoupling"]


class SVDCoupling(NamedAngles, Coupling):
    r"""Coupling :math:`y_2 = U(x_1)\, e^{S(x_1)}\, V(x_1)^T x_2 + t(x_1)`, S diagonal.

    Any linear map of positive determinant is such a product, and angles of zero make it an
    :class:`~flows.transforms.AffineCoupling`: so is it where a single feature moves. The
    log-scales on the diagonal of S are bounded as there, which bounds every singular value.

    Args:
        features: Size of axis 1, at least 2: features of vectors, channels of images.
        net: ``net(in_features, out_features)`` makes the conditioner, a module called as
            ``conditioner(kept, context)``.
        schedule: Planes of the moved features for both U and V, in order of application;
            ``crossing(features - features // 2)`` by default. Not ``cosine_sine``, which is
            degenerate where conditioners start, at angles of zero.
        bound: Bound of the log-scales, in nats.
        flip: Keep the second half instead of the first.

    Shape:
        inputs (batch, features, ...) to outputs of the same shape, logabsdet (batch,) in nats.

    Raises:
        ValueError: If sizes, ``bound`` or the schedule do not fit.

    Reference:
        Hamze (2021), arXiv 2106.00003, for the rotations; Xiao and Liu (2020),
        arXiv 2007.09651, map the moved half by a matrix exponential instead

    Example:
        >>> import torch
        >>> from flows import SVDCoupling
        >>> from flows.nets import MLP
        >>> layer = SVDCoupling(4, MLP, bound=2.0)
        >>> _ = torch.nn.init.constant_(layer.net.last.bias, 100.0)
        >>> layer(torch.randn(1, 4))[1].tolist()  # two features at the bound, whatever U and V
        [4.0]
    """

    def __init__(
        self,
        features: int,
        net: Callable[[int, int], nn.Module],
        *,
        schedule: givens.Schedule | None = None,
        bound: float = 2.0,
        flip: bool = False,
    ) -> None:
        check_positive(bound=bound)
        _, moved = kept_and_moved(features)
        self.schedule = schedule_from_zero(moved, schedule)
        super().__init__(features, net, flip=flip)
        self.bound = bound

    def count_parameters(self, moved: int) -> int:
        return 2 * moved + 2 * count_angles(self.schedule)

    def couple(self, moved: Tensor, parameters: Tensor, *, inverse: bool) -> tuple[Tensor, Tensor]:
        features, planes = moved.shape[1], count_angles(self.schedule)
        shift, raw, u, v = parameters.split([features, features, planes, planes], dim=1)
        log_scale = bounded(raw, self.bound)
        if inverse:
            scaled = rotate_features(moved - shift, u, self.schedule, inverse=True)
            unscaled = scaled * (-log_scale).exp()
            return rotate_features(unscaled, v, self.schedule), -sum_features(log_scale)
        scaled = rotate_features(moved, v, self.schedule, inverse=True) * log_scale.exp()
        return rotate_features(scaled, u, self.schedule) + shift, sum_features(log_scale)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, schedule={self.schedule}, bound={self.bound}"
