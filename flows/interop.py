"""Our layers inside flows of other libraries, and theirs inside ours.

nflows needs nothing: our layers are nflows transforms. What is here imports none of the other
libraries. It calls their layers as they ask to be called, in the module that keeps their
parameters.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import constraints
from torch.distributions import transforms as torch_transforms

from flows.checks import check_at_least
from flows.transforms.base import Transform

__all__ = ["from_normflows", "from_zuko", "to_normflows", "to_torch", "to_zuko"]


def to_normflows(transform: Transform) -> nn.Module:
    r"""A layer for ``normflows.NormalizingFlow``, whose ``forward`` goes from noise to data.

    Its ``forward`` is the inverse of ``transform`` and its ``inverse`` the forward, with the
    same parameters; both return ``(value, log_det)`` and take ``context``, as the layers of
    ``normflows.ConditionalNormalizingFlow`` do.

    Args:
        transform: One of our layers, a ``Composite`` of them, or any other nflows transform.

    Shape:
        As the transform; log_det (batch,), in nats.

    Reference:
        Stimper et al. (2023), normflows, arXiv 2302.12014

    Example:
        >>> import torch
        >>> from flows import Rotation
        >>> from flows.interop import to_normflows
        >>> layer = to_normflows(Rotation(2, init="haar"))
        >>> x, log_det = layer(torch.ones(3, 2))
        >>> torch.allclose(layer.inverse(x)[0], torch.ones(3, 2))
        True
    """
    return _Opposite(transform)


def from_normflows(layer: nn.Module) -> Transform:
    r"""A layer of normflows as a transform, for :class:`~flows.transforms.Composite` or nflows.

    Its ``forward`` is the layer's ``inverse``, data to noise, and its ``inverse`` the layer's
    ``forward``. A context is handed on where there is one; layers that take none then raise.

    Args:
        layer: A module with ``forward`` and ``inverse``, each returning ``(value, log_det)``,
            where log_det is (batch,) or one number for all rows. Not layers that split their
            input into a list.

    Shape:
        As the layer; logabsdet (batch,), in nats.

    Reference:
        Stimper et al. (2023), normflows, arXiv 2302.12014

    Example:
        >>> import torch
        >>> from flows import Rotation
        >>> from flows.interop import from_normflows, to_normflows
        >>> theirs = to_normflows(Rotation(2, init="haar"))  # stands for a layer of normflows
        >>> ours = from_normflows(theirs)
        >>> x = torch.ones(3, 2)
        >>> torch.equal(ours(x)[0], theirs.inverse(x)[0])
        True
    """
    return _Opposite(layer)


class _Opposite(Transform):
    """``forward`` by the inverse of a layer and the other way round."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, inputs: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return _fresh(inputs, *self.layer.inverse(inputs, **_given(context)))

    def inverse(self, inputs: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return _fresh(inputs, *self.layer(inputs, **_given(context)))


def _given(context: Tensor | None) -> dict[str, Tensor]:
    """Not every layer of normflows knows the argument."""
    return {} if context is None else {"context": context}


def _fresh(inputs: Tensor, outputs: Tensor, logabsdet: Tensor) -> tuple[Tensor, Tensor]:
    """Outputs and a dense logabsdet (batch,), as nflows adds to it in place."""
    if logabsdet.numel() != 1 and logabsdet.shape != inputs.shape[:1]:
        raise ValueError(
            f"log_det must be one number or ({inputs.shape[0]},), got {tuple(logabsdet.shape)}."
        )
    return outputs, inputs.new_zeros(inputs.shape[0]) + logabsdet.reshape(-1)


def to_torch(
    transform: Transform,
    context: Tensor | None = None,
    *,
    event_dim: int = 1,
    context_dim: int = 1,
) -> torch_transforms.Transform:
    r"""A transform as one of ``torch.distributions``, in the same direction: data to noise.

    :class:`torch.distributions.TransformedDistribution` goes from noise to data and takes its
    ``.inv``. Inputs may have any leading axes, and a context broadcasts against them from the
    right. It also has ``call_and_ladj``, as zuko's transforms do, which takes one pass where
    ``TransformedDistribution.log_prob`` takes two.

    The parameters stay those of ``transform``: what is returned is no module, so hand
    ``transform.parameters()`` to the optimizer.

    Args:
        transform: One of our layers, a ``Composite`` of them, or any other nflows transform,
            that keeps the shape of its inputs.
        context: Rows of context (..., *row), or None.
        event_dim: Axes of one sample: 1 for vectors, 3 for images.
        context_dim: Axes of one row of context: 1 for vectors, 0 for class labels.

    Shape:
        inputs (..., *sample) to outputs (..., *sample), log abs det (...), in nats;
        context (..., *row)

    Raises:
        ValueError: If ``event_dim`` is less than 1 or ``context_dim`` less than 0; when called,
            for inputs of fewer axes than ``event_dim``, a context whose leading axes do not fit
            them, or a transform that changes the shape.

    Example:
        >>> import torch
        >>> from torch.distributions import Independent, Normal, TransformedDistribution
        >>> from flows import Rotation
        >>> from flows.interop import to_torch
        >>> noise = Independent(Normal(torch.zeros(2), torch.tensor([1.0, 3.0])), 1)
        >>> turned = TransformedDistribution(noise, to_torch(Rotation(2, init="haar")).inv)
        >>> turned.log_prob(turned.rsample((5,))).shape
        torch.Size([5])
    """
    check_at_least(1, event_dim=event_dim)
    check_at_least(0, context_dim=context_dim)
    return _TorchTransform(transform, context, event_dim, context_dim, inverse=False)


class _TorchTransform(torch_transforms.Transform):
    """A transform, or its inverse, given a context."""

    bijective = True

    def __init__(
        self,
        transform: Transform,
        context: Tensor | None,
        event_dim: int,
        context_dim: int,
        *,
        inverse: bool,
    ) -> None:
        super().__init__()
        self.transform = transform
        self.context = context
        self.context_dim = context_dim
        self.inverse = inverse
        self.domain = self.codomain = constraints.independent(constraints.real, event_dim)

    @property
    def inv(self) -> "_TorchTransform":
        given = self.transform, self.context, self.domain.event_dim, self.context_dim
        return _TorchTransform(*given, inverse=not self.inverse)

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, _TorchTransform)
            and self.transform is other.transform
            and self.context is other.context
            and self.inverse == other.inverse
        )

    __hash__ = None

    def with_cache(self, cache_size: int = 1) -> "_TorchTransform":
        """Itself: nothing is kept between calls."""
        return self

    def call_and_ladj(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Outputs of the shape of x and logabsdet of its leading axes."""
        axes = self.domain.event_dim
        if x.ndim < axes:
            raise ValueError(f"inputs must have {axes} axes per sample, got {tuple(x.shape)}.")
        leading = x.shape[: x.ndim - axes]
        rows = x.reshape(-1, *x.shape[len(leading) :])
        function = self.transform.inverse if self.inverse else self.transform
        outputs, logabsdet = function(rows, self._rows_of_context(leading))
        if outputs.shape != rows.shape:
            raise ValueError(
                f"the transform must keep the shape of samples, got {tuple(outputs.shape[1:])} "
                f"for {tuple(rows.shape[1:])}."
            )
        return outputs.reshape(x.shape), logabsdet.reshape(leading)

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        return self.call_and_ladj(x)[1]

    def _call(self, x: Tensor) -> Tensor:
        return self.call_and_ladj(x)[0]

    def _inverse(self, y: Tensor) -> Tensor:
        return self.inv.call_and_ladj(y)[0]

    def _rows_of_context(self, leading: torch.Size) -> Tensor | None:
        """The context repeated to a row per row of inputs."""
        if self.context is None:
            return None
        row = self.context.shape[self.context.ndim - self.context_dim :]
        try:
            context = self.context.expand(*leading, *row)
        except RuntimeError:
            raise ValueError(
                f"context must broadcast to {(*leading, *row)}, a row per input, "
                f"got {tuple(self.context.shape)}."
            ) from None
        return context.reshape(-1, *row)


def to_zuko(transform: Transform, *, event_dim: int = 1, context_dim: int = 1) -> nn.Module:
    r"""A lazy transform for ``zuko.lazy.Flow``: called with a context, it returns a transform.

    ``zuko.lazy.Flow([to_zuko(layer), ...], base)`` registers and trains the parameters.
    zuko's flows go from data to noise, as ours do.

    Args:
        transform: As in :func:`to_torch`, which makes what is returned when it is called.
        event_dim: As in :func:`to_torch`.
        context_dim: As in :func:`to_torch`.

    Raises:
        ValueError: If ``event_dim`` is less than 1 or ``context_dim`` less than 0; what is
            returned raises as in :func:`to_torch`.

    Reference:
        Rozet et al. (2022), Zuko, 10.5281/zenodo.7625672

    Example:
        >>> import torch
        >>> from flows import Rotation
        >>> from flows.interop import to_zuko
        >>> lazy = to_zuko(Rotation(2))
        >>> noise, ladj = lazy(None).call_and_ladj(torch.ones(3, 2))
        >>> ladj
        tensor([0., 0., 0.])
    """
    check_at_least(1, event_dim=event_dim)
    check_at_least(0, context_dim=context_dim)
    return _LazyTransform(transform, event_dim, context_dim)


class _LazyTransform(nn.Module):
    """Makes a transform of torch from a context."""

    def __init__(self, transform: Transform, event_dim: int, context_dim: int) -> None:
        super().__init__()
        self.transform = transform
        self.event_dim = event_dim
        self.context_dim = context_dim

    def forward(self, c: Tensor | None = None) -> torch_transforms.Transform:
        return to_torch(self.transform, c, event_dim=self.event_dim, context_dim=self.context_dim)


def from_zuko(lazy: nn.Module) -> Transform:
    r"""A lazy transform of zuko as one for :class:`~flows.transforms.Composite` or nflows.

    Args:
        lazy: A module that makes a transform with ``call_and_ladj`` and ``inv`` from a context
            or None: any of zuko's lazy transforms.

    Shape:
        inputs (batch, features) to outputs of the same shape, logabsdet (batch,), in nats.

    Reference:
        Rozet et al. (2022), Zuko, 10.5281/zenodo.7625672

    Example:
        >>> import torch
        >>> from flows import Rotation
        >>> from flows.interop import from_zuko, to_zuko
        >>> theirs = to_zuko(Rotation(2, init="haar"))  # stands for a lazy transform of zuko
        >>> ours = from_zuko(theirs)
        >>> x = torch.ones(3, 2)
        >>> torch.allclose(ours.inverse(ours(x)[0])[0], x)
        True
    """
    return _FromLazy(lazy)


class _FromLazy(Transform):
    """The transform that a lazy one makes of each context."""

    def __init__(self, lazy: nn.Module) -> None:
        super().__init__()
        self.lazy = lazy

    def forward(self, inputs: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self._apply_transform(self.lazy(context), inputs)

    def inverse(self, inputs: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self._apply_transform(self.lazy(context).inv, inputs)

    def _apply_transform(self, transform: Any, inputs: Tensor) -> tuple[Tensor, Tensor]:
        outputs, ladj = transform.call_and_ladj(inputs)
        # Elementwise transforms leave the sum over features to others.
        return _fresh(inputs, outputs, ladj.flatten(1).sum(1) if ladj.ndim > 1 else ladj)
