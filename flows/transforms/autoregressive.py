"""Masked autoregressive layers: every feature's map is set by the features before it."""

from abc import abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor, nn

from flows.checks import check_at_least, check_positive
from flows.splines import rational_quadratic_spline, spline_parameters
from flows.transforms.base import Transform, bounded, check_vectors, sum_features

__all__ = ["MaskedAutoregressive", "MaskedAutoregressiveAffine", "MaskedAutoregressiveSpline"]


class MaskedAutoregressive(Transform):
    """Maps feature d by a function whose parameters depend on the features before d.

    ``forward`` takes one pass of the conditioner, ``inverse`` one per feature.

    Args:
        features: Size of the vectors, at least 1; one feature has an elementwise map that
            only the context can change.
        net: ``net(features, parameters_per_feature)`` makes the conditioner, a module called
            as ``conditioner(inputs, context)`` that returns (batch, features,
            parameters_per_feature), those of feature d from the features before d: such as
            :class:`flows.nets.MADE`.
        reverse: Take the features in the opposite order, last one first.
    """

    def __init__(
        self, features: int, net: Callable[[int, int], nn.Module], *, reverse: bool = False
    ) -> None:
        super().__init__()
        check_at_least(1, features=features)
        self.features = features
        self.reverse = reverse
        self.net = net(features, self.parameters_per_feature)

    @property
    @abstractmethod
    def parameters_per_feature(self) -> int:
        """Number of parameters that map one feature."""

    @abstractmethod
    def map_features(
        self, inputs: Tensor, parameters: Tensor, *, inverse: bool
    ) -> tuple[Tensor, Tensor]:
        """Map (batch, count) elementwise, given (batch, count, parameters_per_feature).

        Returns outputs and log derivatives of the shape of ``inputs``.
        """

    def forward(self, inputs: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        check_vectors(inputs, self.features)
        ordered = self._order(inputs)
        parameters = self._condition(ordered, context)
        outputs, logabsdet = self.map_features(ordered, parameters, inverse=False)
        return self._order(outputs), sum_features(logabsdet)

    def inverse(self, inputs: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        check_vectors(inputs, self.features)
        ordered = self._order(inputs)
        # What is known so far, and zeros, which the conditioner must not look at.
        known, unknown = ordered[:, :0], torch.zeros_like(ordered)
        logabsdet = inputs.new_zeros(inputs.shape[0])
        for d in range(self.features):
            parameters = self._condition(torch.cat([known, unknown[:, d:]], dim=1), context)
            one = slice(d, d + 1)
            feature, log_derivative = self.map_features(
                ordered[:, one], parameters[:, one], inverse=True
            )
            known = torch.cat([known, feature], dim=1)
            logabsdet = logabsdet + log_derivative[:, 0]
        return self._order(known), logabsdet

    def _order(self, values: Tensor) -> Tensor:
        """Features in the order of the conditioner, or back."""
        return values.flip(1) if self.reverse else values

    def _condition(self, inputs: Tensor, context: Tensor | None) -> Tensor:
        parameters = self.net(inputs, context)
        expected = (*inputs.shape, self.parameters_per_feature)
        if parameters.shape != expected:
            raise ValueError(f"net must return shape {expected}, got {tuple(parameters.shape)}.")
        # Autocast may have made them in half precision; what they do is done in full.
        return parameters.to(inputs.dtype)

    def extra_repr(self) -> str:
        return f"features={self.features}, reverse={self.reverse}"


class MaskedAutoregressiveAffine(MaskedAutoregressive):
    r"""Affine autoregressive map :math:`y_d = e^{s(x_{<d})} x_d + t(x_{<d})`, :math:`|s|` bounded.

    :math:`s = b \tanh(\cdot / b)` with the bound b, as in :class:`AffineCoupling`. Density
    estimation takes one pass, sampling one per feature. Zero outputs of the conditioner
    make the identity.

    Args:
        features: Size of the vectors, at least 1.
        net: ``net(features, 2)`` makes the conditioner, such as :class:`flows.nets.MADE`, a
            module called as ``conditioner(inputs, context)`` that returns (batch, features, 2),
            those of feature d from the features before d.
        bound: Bound b of the log-scale, in nats.
        reverse: Take the features in the opposite order, last one first.

    Shape:
        inputs (batch, features) to outputs of the same shape, logabsdet (batch,) in nats.

    Raises:
        ValueError: If ``features`` is below 1 or not that of the inputs, ``bound`` is not
            positive, or the conditioner returns another shape.

    Reference:
        Papamakarios et al. (2017), Masked Autoregressive Flow, arXiv 1705.07057

    Example:
        >>> import torch
        >>> from flows import MaskedAutoregressiveAffine
        >>> from flows.nets import MADE
        >>> layer = MaskedAutoregressiveAffine(3, MADE)
        >>> _ = torch.nn.init.normal_(layer.net.last.weight, std=0.1)
        >>> x = torch.randn(2, 3)
        >>> outputs, logabsdet = layer(x)
        >>> torch.allclose(layer.inverse(outputs)[0], x, atol=1e-4)
        True
        >>> changed = layer(x + torch.tensor([0.0, 0.0, 1.0]))[0]
        >>> torch.allclose(changed[:, :2], outputs[:, :2])  # features before see nothing of it
        True
    """

    parameters_per_feature = 2

    def __init__(
        self,
        features: int,
        net: Callable[[int, int], nn.Module],
        *,
        bound: float = 2.0,
        reverse: bool = False,
    ) -> None:
        check_positive(bound=bound)
        super().__init__(features, net, reverse=reverse)
        self.bound = bound

    def map_features(
        self, inputs: Tensor, parameters: Tensor, *, inverse: bool
    ) -> tuple[Tensor, Tensor]:
        shift, raw = parameters.unbind(-1)
        log_scale = bounded(raw, self.bound)
        if inverse:
            return (inputs - shift) * (-log_scale).exp(), -log_scale
        return inputs * log_scale.exp() + shift, log_scale


class MaskedAutoregressiveSpline(MaskedAutoregressive):
    r"""Autoregressive splines :math:`y_d = g(x_d;\, \theta(x_{<d}))`.

    g is rational-quadratic on [-B, B], see :func:`flows.splines.rational_quadratic_spline`,
    and the identity outside. Density estimation takes one pass, sampling one per feature. Zero
    outputs of the conditioner make the identity.

    Args:
        features: Size of the vectors, at least 1.
        net: ``net(features, 3 * bins - 1)`` makes the conditioner, such as
            :class:`flows.nets.MADE`, a module called as ``conditioner(inputs, context)`` that
            returns (batch, features, 3 * bins - 1), those of feature d from the features
            before d.
        bins: Number of bins of every spline.
        tail_bound: Half-width B of the interval.
        reverse: Take the features in the opposite order, last one first.

    Shape:
        inputs (batch, features) to outputs of the same shape, logabsdet (batch,) in nats.

    Raises:
        ValueError: If ``features`` is below 1 or not that of the inputs, ``bins`` is below 2,
            ``tail_bound`` is not positive, or the conditioner returns another shape.

    Reference:
        Durkan et al. (2019), Neural Spline Flows, arXiv 1906.04032

    Example:
        >>> import torch
        >>> from flows import MaskedAutoregressiveSpline
        >>> from flows.nets import MADE
        >>> layer = MaskedAutoregressiveSpline(3, MADE, bins=4)
        >>> _ = torch.nn.init.normal_(layer.net.last.weight, std=0.1)
        >>> x = torch.randn(2, 3)
        >>> outputs, logabsdet = layer(x)
        >>> back, minus_logabsdet = layer.inverse(outputs)
        >>> torch.allclose(back, x, atol=1e-4)
        True
        >>> torch.allclose(minus_logabsdet, -logabsdet, atol=1e-3)
        True
    """

    def __init__(
        self,
        features: int,
        net: Callable[[int, int], nn.Module],
        *,
        bins: int = 8,
        tail_bound: float = 5.0,
        reverse: bool = False,
    ) -> None:
        check_positive(tail_bound=tail_bound)
        self.bins = bins
        super().__init__(features, net, reverse=reverse)
        self.tail_bound = tail_bound

    @property
    def parameters_per_feature(self) -> int:
        return spline_parameters(self.bins)

    def map_features(
        self, inputs: Tensor, parameters: Tensor, *, inverse: bool
    ) -> tuple[Tensor, Tensor]:
        return rational_quadratic_spline(
            inputs, parameters, tail_bound=self.tail_bound, inverse=inverse
        )

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, bins={self.bins}, tail_bound={self.tail_bound}"
