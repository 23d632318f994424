"""Coupling layers: one half of the features sets the map of the other half."""

from abc import abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor, nn

from flows.checks import check_at_least, check_positive
from flows.splines import rational_quadratic_spline, spline_parameters
from flows.transforms.base import Transform, bounded, check_features, sum_features

__all__ = [
    "AdditiveCoupling",
    "AffineCoupling",
    "Coupling",
    "IncompressibleCoupling",
    "SplineCoupling",
    "kept_and_moved",
]


def kept_and_moved(features: int) -> tuple[int, int]:
    """How many features a coupling keeps and how many it moves."""
    check_at_least(2, features=features)
    return features // 2, features - features // 2


class Coupling(Transform):
    r"""Keeps one half of axis 1: :math:`y_1 = x_1`, :math:`y_2 = g(x_2;\, \theta(x_1))`.

    A subclass says what g is and how many parameters it takes; the conditioner gives them.

    Args:
        features: Size of axis 1, at least 2: features of vectors, channels of images.
        net: ``net(in_features, out_features)`` makes the conditioner, a module called as
            ``conditioner(kept, context)`` that keeps any axes behind axis 1.
        flip: Keep the second half instead of the first. The kept half of an odd number
            of features is the smaller one.

    Shape:
        inputs (batch, features, ...) to outputs of the same shape, logabsdet (batch,) in nats.

    Raises:
        ValueError: If ``features`` is below 2 or not that of the inputs.

    Example:
        >>> import torch
        >>> from flows.nets import MLP
        >>> from flows.transforms import Coupling
        >>> class Reflection(Coupling):  # y_2 = t(x_1) - x_2, which undoes itself
        ...     def count_parameters(self, moved):
        ...         return moved
        ...     def couple(self, moved, parameters, *, inverse):
        ...         return parameters - moved, moved.new_zeros(len(moved))
        >>> layer = Reflection(4, MLP)
        >>> x = torch.randn(3, 4)
        >>> torch.equal(layer.inverse(layer(x)[0])[0], x)
        True
    """

    def __init__(
        self, features: int, net: Callable[[int, int], nn.Module], *, flip: bool = False
    ) -> None:
        super().__init__()
        kept, moved = kept_and_moved(features)
        self.features = features
        self.flip = flip
        self.sizes = (moved, kept) if flip else (kept, moved)
        self.net = net(kept, self.count_parameters(moved))

    @abstractmethod
    def count_parameters(self, moved: int) -> int:
        """Number of parameters that map ``moved`` features."""

    @abstractmethod
    def couple(self, moved: Tensor, parameters: Tensor, *, inverse: bool) -> tuple[Tensor, Tensor]:
        """Map (batch, moved features, ...), given parameters (batch, number of them, ...).

        Returns outputs of the shape of ``moved`` and logabsdet (batch,) in nats.
        """

    def forward(self, inputs: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self._apply_coupling(inputs, context, inverse=False)

    def inverse(self, inputs: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self._apply_coupling(inputs, context, inverse=True)

    def recover(
        self, outputs: Tensor, context: Tensor | None = None, *, inverse: bool = False
    ) -> tuple[Tensor, Tensor, Tensor]:
        """What ``forward`` (``inverse``) was given when it returned these outputs.

        The kept half is the same before and after, so one call of the conditioner serves both
        the way back and the way forth.

        Returns:
            The inputs, a leaf that requires its gradient; outputs and logabsdet as functions
            of it.
        """
        check_features(outputs, self.features)
        inputs = outputs.detach().clone().requires_grad_()
        kept, _ = self._split(inputs)
        parameters = self.net(kept, context).to(inputs.dtype)
        with torch.no_grad():
            _, moved = self._split(outputs)
            moved, _ = self.couple(moved, parameters, inverse=not inverse)
            # Not by the tensor itself: its kept half, which autograd has saved, stays valid.
            self._split(inputs.data)[1].copy_(moved)
        _, moved = self._split(inputs)
        moved, logabsdet = self.couple(moved, parameters, inverse=inverse)
        return inputs, self._join(kept, moved), logabsdet

    def _apply_coupling(
        self, inputs: Tensor, context: Tensor | None, *, inverse: bool
    ) -> tuple[Tensor, Tensor]:
        check_features(inputs, self.features)
        kept, moved = self._split(inputs)
        # Autocast may have made them in half precision; what they do is done in full.
        parameters = self.net(kept, context).to(inputs.dtype)
        moved, logabsdet = self.couple(moved, parameters, inverse=inverse)
        return self._join(kept, moved), logabsdet

    def _split(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """Kept and moved half."""
        first, second = inputs.split(self.sizes, dim=1)
        return (second, first) if self.flip else (first, second)

    def _join(self, kept: Tensor, moved: Tensor) -> Tensor:
        return torch.cat((moved, kept) if self.flip else (kept, moved), dim=1)

    def extra_repr(self) -> str:
        return f"features={self.features}, flip={self.flip}"


class AdditiveCoupling(Coupling):
    r"""Volume-preserving coupling :math:`y_2 = x_2 + t(x_1)`.

    Args:
        features: Size of axis 1, at least 2: features of vectors, channels of images.
        net: ``net(in_features, out_features)`` makes the conditioner, a module called as
            ``conditioner(kept, context)``.
        flip: Keep the second half instead of the first.

    Shape:
        inputs (batch, features, ...) to outputs of the same shape, logabsdet (batch,), zero.

    Raises:
        ValueError: If ``features`` is below 2 or not that of the inputs.

    Reference:
        Dinh et al. (2015), NICE, arXiv 1410.8516

    Example:
        >>> import torch
        >>> from flows import AdditiveCoupling
        >>> from flows.nets import MLP
        >>> layer = AdditiveCoupling(4, MLP)
        >>> _ = torch.nn.init.ones_(layer.net.last.bias)  # t(x_1) = 1
        >>> outputs, logabsdet = layer(torch.zeros(1, 4))
        >>> outputs.tolist(), logabsdet.tolist()
        ([[0.0, 0.0, 1.0, 1.0]], [0.0])
    """

    volume_preserving = True

    def count_parameters(self, moved: int) -> int:
        return moved

    def couple(self, moved: Tensor, parameters: Tensor, *, inverse: bool) -> tuple[Tensor, Tensor]:
        outputs = moved - parameters if inverse else moved + parameters
        return outputs, moved.new_zeros(moved.shape[0])


class AffineCoupling(Coupling):
    r"""Affine coupling :math:`y_2 = e^{s(x_1)} x_2 + t(x_1)`, :math:`|s|` bounded.

    :math:`s = b \tanh(\cdot / b)` with the bound b keeps the scale within
    :math:`(e^{-b}, e^{b})`, which is what keeps training stable.

    Args:
        features: Size of axis 1, at least 2: features of vectors, channels of images.
        net: ``net(in_features, out_features)`` makes the conditioner, a module called as
            ``conditioner(kept, context)``.
        bound: Bound b of the log-scale, in nats.
        flip: Keep the second half instead of the first.

    Shape:
        inputs (batch, features, ...) to outputs of the same shape, logabsdet (batch,) in nats.

    Raises:
        ValueError: If ``features`` is below 2 or not that of the inputs, or ``bound`` is not
            positive.

    Reference:
        Dinh et al. (2017), RealNVP, arXiv 1605.08803

    Example:
        >>> import torch
        >>> from flows import AffineCoupling
        >>> from flows.nets import MLP
        >>> layer = AffineCoupling(4, MLP, bound=2.0)
        >>> _ = torch.nn.init.constant_(layer.net.last.bias, 100.0)
        >>> layer(torch.randn(1, 4))[1].tolist()  # two features at the bound
        [4.0]
    """

    def __init__(
        self,
        features: int,
        net: Callable[[int, int], nn.Module],
        *,
        bound: float = 2.0,
        flip: bool = False,
    ) -> None:
        check_positive(bound=bound)
        super().__init__(features, net, flip=flip)
        self.bound = bound

    def count_parameters(self, moved: int) -> int:
        return 2 * moved

    def couple(self, moved: Tensor, parameters: Tensor, *, inverse: bool) -> tuple[Tensor, Tensor]:
        shift, raw = parameters.chunk(2, dim=1)
        log_scale = bounded(raw, self.bound)
        logabsdet = sum_features(-log_scale if inverse else log_scale)
        return _scale(moved, log_scale, shift, inverse=inverse), logabsdet


class IncompressibleCoupling(Coupling):
    r"""Volume-preserving coupling :math:`y_2 = e^{s(x_1)} x_2 + t(x_1)`, :math:`\sum s = 0`.

    s is bounded as in :class:`AffineCoupling`, then its mean is taken off, so that
    :math:`|s| < 2b`. The mean is over everything that moves in a sample, in images over the
    pixels as well: a mean per pixel would keep the volume at each of them, which asks for more
    than volume preservation, and leave nothing where one channel moves. Where a single number
    moves s is zero, and the layer an :class:`AdditiveCoupling`.

    Args:
        features: Size of axis 1, at least 2: features of vectors, channels of images.
        net: ``net(in_features, out_features)`` makes the conditioner, a module called as
            ``conditioner(kept, context)``.
        bound: Bound b of the log-scale before its mean is taken off, in nats.
        flip: Keep the second half instead of the first.

    Shape:
        inputs (batch, features, ...) to outputs of the same shape, logabsdet (batch,), zero.

    Raises:
        ValueError: If ``features`` is below 2 or not that of the inputs, or ``bound`` is not
            positive.

    Reference:
        Sorrenson et al. (2020), GIN, arXiv 2001.04872, where the last entry of s makes the
        sum zero

    Example:
        >>> import torch
        >>> from flows import IncompressibleCoupling
        >>> from flows.nets import MLP
        >>> layer = IncompressibleCoupling(6, MLP)
        >>> _ = torch.nn.init.normal_(layer.net.last.weight, std=0.1)
        >>> layer(torch.randn(3, 6))[1]
        tensor([0., 0., 0.])
    """

    volume_preserving = True

    def __init__(
        self,
        features: int,
        net: Callable[[int, int], nn.Module],
        *,
        bound: float = 2.0,
        flip: bool = False,
    ) -> None:
        check_positive(bound=bound)
        super().__init__(features, net, flip=flip)
        self.bound = bound

    def count_parameters(self, moved: int) -> int:
        return 2 * moved

    def couple(self, moved: Tensor, parameters: Tensor, *, inverse: bool) -> tuple[Tensor, Tensor]:
        shift, raw = parameters.chunk(2, dim=1)
        log_scale = bounded(raw, self.bound)
        everywhere = tuple(range(1, log_scale.ndim))
        log_scale = log_scale - log_scale.mean(everywhere, keepdim=True)
        outputs = _scale(moved, log_scale, shift, inverse=inverse)
        return outputs, moved.new_zeros(moved.shape[0])


class SplineCoupling(Coupling):
    r"""Coupling :math:`y_2 = g(x_2;\, \theta(x_1))` by monotonic splines of single features.

    g is rational-quadratic on [-B, B], see :func:`flows.splines.rational_quadratic_spline`,
    and the identity outside. Zero outputs of the conditioner make the identity.

    Args:
        features: Size of axis 1, at least 2: features of vectors, channels of images.
        net: ``net(in_features, out_features)`` makes the conditioner, a module called as
            ``conditioner(kept, context)``.
        bins: Number of bins of every spline.
        tail_bound: Half-width B of the interval.
        flip: Keep the second half instead of the first.

    Shape:
        inputs (batch, features, ...) to outputs of the same shape, logabsdet (batch,) in nats.

    Raises:
        ValueError: If ``features`` is below 2 or not that of the inputs, ``bins`` is below 2, or
            ``tail_bound`` is not positive.

    Reference:
        Durkan et al. (2019), Neural Spline Flows, arXiv 1906.04032

    Example:
        >>> import torch
        >>> from flows import SplineCoupling
        >>> from flows.nets import MLP
        >>> layer = SplineCoupling(2, MLP, tail_bound=5.0)
        >>> _ = torch.nn.init.normal_(layer.net.last.weight, std=0.1)
        >>> outputs, logabsdet = layer(torch.tensor([[0.5, 1.0], [0.5, 7.0]]))
        >>> outputs[1].tolist(), logabsdet[1].item()  # 7 is outside the interval
        ([0.5, 7.0], 0.0)
        >>> torch.allclose(layer.inverse(outputs)[0][0], torch.tensor([0.5, 1.0]), atol=1e-4)
        True
    """

    def __init__(
        self,
        features: int,
        net: Callable[[int, int], nn.Module],
        *,
        bins: int = 8,
        tail_bound: float = 5.0,
        flip: bool = False,
    ) -> None:
        check_positive(tail_bound=tail_bound)
        self.bins = bins
        super().__init__(features, net, flip=flip)
        self.tail_bound = tail_bound

    def count_parameters(self, moved: int) -> int:
        return spline_parameters(self.bins) * moved

    def couple(self, moved: Tensor, parameters: Tensor, *, inverse: bool) -> tuple[Tensor, Tensor]:
        per_feature = parameters.unflatten(1, (spline_parameters(self.bins), -1)).movedim(1, -1)
        outputs, logabsdet = rational_quadratic_spline(
            moved, per_feature, tail_bound=self.tail_bound, inverse=inverse
        )
        return outputs, sum_features(logabsdet)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, bins={self.bins}, tail_bound={self.tail_bound}"


def _scale(moved: Tensor, log_scale: Tensor, shift: Tensor, *, inverse: bool) -> Tensor:
    if inverse:
        return (moved - shift) * (-log_scale).exp()
    return moved * log_scale.exp() + shift
