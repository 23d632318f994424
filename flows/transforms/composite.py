"""A chain of transforms."""

from collections.abc import Iterable
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from flows.checks import check_at_least
from flows.transforms.base import Transform, preserves_volume
from flows.transforms.memory import run, run_checkpointed, run_reversible

__all__ = ["Composite", "Memory"]

Memory = Literal["store", "checkpoint", "reversible"]


class Composite(Transform):
    r"""The chain :math:`f_k \circ \dots \circ f_1` of k transforms, ours or nflows'.

    ``memory`` says what is kept for the backward pass:

    * ``"store"``: all that autograd keeps, which grows with k.
    * ``"reversible"``: inputs and outputs of the chain. Every other input is recovered by the
      inverse of its transform, so that memory does not grow with k, and one transform at a
      time is differentiated. A training step of Glow takes half as much time again; with
      layers whose inverse is slow, such as masked autoregressive ones, far more.
    * ``"checkpoint"``: the inputs of every transform. What happens inside is repeated.

    Gradients are those of ``"store"``, up to the rounding of the inverses. Noise is repeated,
    which takes some kilobytes for every transform that draws it; statistics are updated once,
    autocast and the modes of modules are as they were.

    A reversible chain needs inverses in the mode it is in, tensors or None as context, and
    gradients of inputs, context and parameters only. Derivatives of derivatives and forward
    mode need ``"store"``, or the former ``"checkpoint"``. Neither repeats layers whose outputs
    depend on statistics that the same call updates, such as spectral normalization in training.
    ``torch.func`` transforms and ``torch.export`` go as ``"store"`` does, ``torch.compile``
    leaves a reversible chain uncompiled.

    Args:
        transforms: In the order of ``forward``, data to noise.
        memory: As above.
        keep_every: n keeps the inputs of every n-th transform. By default 1 for
            ``"checkpoint"``, and for ``"reversible"`` those of the first only. With more of
            them fewer errors of rounding add up.

    Shape:
        As the transforms say; logabsdet (batch,) in nats is the sum of theirs.

    Attributes:
        inversion_error: Of the last backward pass of a reversible chain, a scalar tensor: the
            largest difference between inputs that were kept and what was recovered, in units
            of the largest input or 1. None before there was one.

    Raises:
        ValueError: If ``memory`` is none of these, or ``keep_every`` does not fit it.

    Reference:
        Gomez et al. (2017), The Reversible Residual Network, arXiv 1707.04585; Chen et al.
        (2016), Training Deep Nets with Sublinear Memory Cost, arXiv 1604.06174

    Example:
        >>> import torch
        >>> from flows import AffineCoupling, Composite, Rotation
        >>> from flows.nets import MLP
        >>> layers = [Rotation(4, init="haar"), AffineCoupling(4, MLP)]
        >>> chain = Composite(layers, memory="reversible")
        >>> x = torch.randn(3, 4, requires_grad=True)
        >>> outputs, logabsdet = chain(x)
        >>> outputs.square().sum().backward()
        >>> torch.allclose(x.grad, 2 * x, atol=1e-4)  # as yet the chain keeps lengths
        True
    """

    def __init__(
        self,
        transforms: Iterable[Transform],
        *,
        memory: Memory = "store",
        keep_every: int | None = None,
    ) -> None:
        super().__init__()
        if memory not in ("store", "checkpoint", "reversible"):
            raise ValueError(
                f"memory must be 'store', 'checkpoint' or 'reversible', got {memory!r}."
            )
        if keep_every is not None:
            check_at_least(1, keep_every=keep_every)
            if memory == "store":
                raise ValueError(
                    "keep_every must be None for memory='store', which keeps everything, "
                    f"got {keep_every}."
                )
        self.transforms = nn.ModuleList(transforms)
        self.memory = memory
        self.keep_every = keep_every
        self.inversion_error: Tensor | None = None

    @property
    def volume_preserving(self) -> bool:
        return all(map(preserves_volume, self.transforms))

    def forward(self, inputs: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self._run(inputs, context, inverse=False)

    def inverse(self, inputs: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self._run(inputs, context, inverse=True)

    def _run(
        self, inputs: Tensor, context: Tensor | None, *, inverse: bool
    ) -> tuple[Tensor, Tensor]:
        order = list(reversed(self.transforms)) if inverse else list(self.transforms)
        if self.memory == "store" or not torch.is_grad_enabled() or _derives_otherwise():
            return run(order, inputs, context, inverse)
        if parametrize._cache_enabled:
            raise RuntimeError(
                f"memory={self.memory!r} cannot differentiate weights that parametrize.cached() "
                "holds: take 'store'."
            )
        if self.memory == "checkpoint":
            return run_checkpointed(order, inputs, context, inverse, self.keep_every or 1)
        every = self.keep_every or max(1, len(order))
        return run_reversible(order, inputs, context, inverse, every, self._report)

    def _report(self, error: Tensor) -> None:
        self.inversion_error = error

    def extra_repr(self) -> str:
        if self.memory == "store":
            return ""
        every = "" if self.keep_every is None else f", keep_every={self.keep_every}"
        return f"memory={self.memory!r}{every}"


def _derives_otherwise() -> bool:
    """Within ``torch.func`` or ``torch.export``, which know no such backward passes."""
    return torch._C._are_functorch_transforms_active() or torch.compiler.is_exporting()
