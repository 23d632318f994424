"""Layers that keep a random part of their inputs for the backward pass: unbiased, in less memory.

What autograd keeps of a network is mostly the inputs of its linear layers and convolutions, and
only the gradients of their weights need those. Here a layer keeps k of d numbers instead, and the
seed that says which. Outputs, and the gradients of inputs and biases, are what they were to the
last bit.
"""

import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrize

from flows.nets.bit_relu import bit_relu
from flows.nets.made import MaskedLinear

__all__ = [
    "BitReLU",
    "RandomizedConv2d",
    "RandomizedLinear",
    "RandomizedMaskedLinear",
    "randomize",
]

METHODS = ("without_replacement", "with_replacement", "rademacher")


def randomize(
    module: nn.Module,
    keep: float = 0.1,
    *,
    method: Literal["without_replacement", "with_replacement", "rademacher"] = METHODS[0],
    per_sample: bool = True,
) -> nn.Module:
    r"""Let every ``Linear``, ``Conv2d`` and ``ReLU`` keep less for the backward pass.

    A linear layer keeps :math:`x_b R` of the inputs :math:`x_b`, with a random d x k matrix,
    :math:`k = \lceil \mathrm{keep} \cdot d \rceil` and :math:`E\,R R^T = 1`. With the gradients
    :math:`g_b` of its outputs it finds

    .. math:: \hat G = \sum_b g_b\, x_b R R^T, \qquad E\,\hat G = G = \sum_b g_b\, x_b^T.

    R picks k of the d numbers, times :math:`\sqrt{d / k}`. If the rows of a batch share it,

    .. math:: E\,|\hat G - G|^2 = \frac{d - k}{k}\, |G|^2,

    and with one for each row :math:`\frac{d - k}{k} \sum_b |g_b x_b^T|^2`, which is less where
    rows agree on the gradient. With replacement, and with random signs (shared), it is
    :math:`d - 1` in place of :math:`d - k`. A convolution does so along its pixels, d = height
    times width, with rows that are the channels of every image; there the pixels' parts
    :math:`C_p` of G overlap, and shared picks have the variance
    :math:`\frac{d - k}{k} (d \sum_p |C_p|^2 - |G|^2) / (d - 1)`. A ReLU keeps a bit for each
    number, and all of its gradient.

    The flow's angles, splines and log-dets, and the gradients of all of these and of biases, stay
    exact. Values do, too, and in eval mode the layers are what they were. They remain the same
    modules with the same parameters, so that weights, optimizers and hooks go on, and
    parametrized weights (:func:`flows.orthogonal`) are computed as before.

    Every call in training draws one seed from torch's generator of the CPU: ``torch.manual_seed``
    repeats a run, and a chain that repeats a layer, ``Composite(memory="checkpoint")`` or
    ``"reversible"``, repeats its draw. Within ``torch.func`` transforms the layers are exact.
    They have no derivatives of derivatives, and ``torch.compile`` leaves them as they are.

    It serves where such inputs are what memory holds, less so next to a SiLU, which keeps its
    own. Where layers can be repeated, ``memory="checkpoint"`` keeps less, without noise, at more
    time; and a smaller batch that keeps as much often trains as well
    (``benchmarks/randomized_autodiff.py``).

    Args:
        module: A layer, a conditioner, or a whole flow; changed in place.
        keep: Part of the inputs to keep, in (0, 1]; with 1 gradients are exact. Called again,
            this changes it.
        method: R picks ``"without_replacement"`` or ``"with_replacement"``, or has
            ``"rademacher"`` entries, :math:`\pm 1 / \sqrt k`.
        per_sample: Each row has its own R; otherwise all share one, which is faster.

    Returns:
        The module.

    Raises:
        ValueError: If there is no such layer, ``keep`` is not in (0, 1], ``method`` is none of
            these, or is ``"rademacher"`` for each row, which would take more memory than it saves.

    Reference:
        Oktay et al. (2021), Randomized Automatic Differentiation, arXiv 2007.10412. There the
        picks are with replacement.

    Example:
        >>> import torch
        >>> from flows.nets import MLP, randomize
        >>> net = randomize(MLP(4, 6, activation="relu"), keep=0.1)
        >>> net.last
        RandomizedLinear(in_features=64, out_features=6, bias=True, keep=0.1)
        >>> net(torch.randn(5, 4)).sum().backward()
    """
    sketch = _Sketch(keep, method, per_sample)
    sketch.check()
    found = False
    for part in module.modules():
        kind = parametrize.type_before_parametrizations(part)
        if kind in _KINDS:
            _change_class(part, _KINDS[kind])
        elif kind not in _KINDS.values():
            continue
        found = True
        if not isinstance(part, BitReLU):
            part.sketch = sketch
    if not found:
        names = ", ".join(kind.__name__ for kind in _KINDS)
        raise ValueError(f"module must hold one of {names}, got {type(module).__name__}.")
    return module


class RandomizedLinear(nn.Linear):
    """A linear layer that :func:`randomize` has changed."""

    sketch: "_Sketch"

    def forward(self, inputs: Tensor) -> Tensor:
        return _linear(self, inputs, self.weight)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {self.sketch}"


class RandomizedMaskedLinear(MaskedLinear):
    """A layer of :class:`flows.nets.MADE` that :func:`randomize` has changed."""

    sketch: "_Sketch"

    def forward(self, inputs: Tensor) -> Tensor:
        return _linear(self, inputs, self.weight * self.mask)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {self.sketch}"


class RandomizedConv2d(nn.Conv2d):
    """A convolution that :func:`randomize` has changed."""

    sketch: "_Sketch"

    def forward(self, inputs: Tensor) -> Tensor:
        if _exact(self) or self.sketch.count(inputs.shape[-2:].numel()) is None:
            return super().forward(inputs)
        padding = self.padding
        if isinstance(padding, str) or self.padding_mode != "zeros":
            mode = "constant" if self.padding_mode == "zeros" else self.padding_mode
            inputs = functional.pad(inputs, self._reversed_padding_repeated_twice, mode)
            padding = (0, 0)
        geometry = self.stride, padding, self.dilation, self.groups
        images = inputs if inputs.ndim == 4 else inputs[None]
        arguments = images, self.weight, self.bias, geometry, self.sketch
        outputs = _uncompiled(_seeded, _Conv2d.apply, *arguments)
        return outputs if inputs.ndim == 4 else outputs[0]

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {self.sketch}"


class BitReLU(nn.ReLU):
    """A ReLU that :func:`randomize` has changed: it keeps a bit for each number."""

    def forward(self, inputs: Tensor) -> Tensor:
        if _exact(self):
            return super().forward(inputs)
        return _uncompiled(bit_relu, inputs, self.inplace)


_KINDS = {
    nn.Linear: RandomizedLinear,
    MaskedLinear: RandomizedMaskedLinear,
    nn.Conv2d: RandomizedConv2d,
    nn.ReLU: BitReLU,
}


def _change_class(module: nn.Module, kind: type) -> None:
    if parametrize.is_parametrized(module):
        # Its class is its own: this one with the properties that compute its weights.
        own = {name: value for name, value in vars(type(module)).items() if name != "__dict__"}
        kind = type(f"Parametrized{kind.__name__}", (kind,), own)
    module.__class__ = kind


def _exact(module: nn.Module) -> bool:
    transformed = torch._C._are_functorch_transforms_active() or torch.compiler.is_exporting()
    return not module.training or transformed


def _linear(module: nn.Linear, inputs: Tensor, weight: Tensor) -> Tensor:
    if _exact(module) or module.sketch.count(inputs.shape[-1]) is None:
        return functional.linear(inputs, weight, module.bias)
    arguments = inputs, weight, module.bias, module.sketch
    return _uncompiled(_seeded, _Linear.apply, *arguments)


def _uncompiled(function: Callable[..., Tensor], *arguments: Any) -> Tensor:
    """Compiled code would draw other seeds, and knows no generators of one's own."""
    if torch.compiler.is_compiling():
        function = torch.compiler.disable(function)
    return function(*arguments)


def _seeded(function: Callable[..., Tensor], *arguments: Any) -> Tensor:
    # Drawn without gradients as well: what is repeated with them must find the same state.
    return function(*arguments, int(torch.randint(2**62, (), device="cpu")))


class _Sketch(NamedTuple):
    """The random matrix R of :func:`randomize`, and products with it along the last axis."""

    keep: float
    method: str
    per_sample: bool

    def check(self) -> None:
        if not 0 < self.keep <= 1:
            raise ValueError(f"keep must be greater than 0 and at most 1, got {self.keep}.")
        if self.method not in METHODS:
            raise ValueError(f"method must be one of {METHODS}, got {self.method!r}.")
        if self.method == "rademacher" and self.per_sample:
            raise ValueError("method='rademacher' needs per_sample=False, got True.")

    def count(self, size: int) -> int | None:
        """k; None where it is all of them."""
        count = math.ceil(self.keep * size)
        return count if count < size else None

    def compress(self, rows: Tensor, seed: int) -> Tensor:
        """R^T of every row but for the factor of sampling: (rows, d) to (rows, k)."""
        if self.method == "rademacher":
            return rows @ self._signs(rows.shape[1], rows, seed)
        indices = self._indices(rows.shape[1], rows, seed)
        return rows.gather(1, indices) if self.per_sample else rows.index_select(1, indices)

    def expand(self, small: Tensor, size: int, seed: int) -> Tensor:
        """The rest of R R^T: (rows, k) to (rows, d)."""
        if self.method == "rademacher":
            return small @ self._signs(size, small, seed).mT
        indices = self._indices(size, small, seed)
        rows = small.new_zeros(len(small), size)
        small = small * (size / small.shape[1])
        if self.per_sample:
            return rows.scatter_add_(1, indices, small)
        return rows.index_add_(1, indices, small)

    def _indices(self, size: int, rows: Tensor, seed: int) -> Tensor:
        """(k,), or (rows, k)."""
        count, device = self.count(size), rows.device
        generator = torch.Generator(device).manual_seed(seed)
        if self.method == "with_replacement":
            shape = (len(rows), count) if self.per_sample else (count,)
            return torch.randint(size, shape, generator=generator, device=device)
        order = torch.randperm(size, generator=generator, device=device)
        if not self.per_sample:
            return order[:count]
        # Each row takes the next k of one random order from a start of its own. Starts being
        # independent, so are the rows given the order, and each R R^T has mean 1: the variance
        # is that of independent picks, for one random number a row.
        start = torch.randint(size, (len(rows), 1), generator=generator, device=device)
        return order[(start + torch.arange(count, device=device)) % size]

    def _signs(self, size: int, rows: Tensor, seed: int) -> Tensor:
        generator = torch.Generator(rows.device).manual_seed(seed)
        count = self.count(size)
        bits = torch.randint(2, (size, count), generator=generator, device=rows.device)
        return (2 * bits - 1).to(rows.dtype) / count**0.5

    def __str__(self) -> str:
        method = "" if self.method == METHODS[0] else f", method={self.method!r}"
        return f"keep={self.keep}{method}" + ", per_sample=False" * (not self.per_sample)


class _Linear(torch.autograd.Function):
    """``functional.linear`` that keeps R^T x."""

    @staticmethod
    def forward(
        ctx: Any, inputs: Tensor, weight: Tensor, bias: Tensor | None, sketch: _Sketch, seed: int
    ) -> Tensor:
        outputs = functional.linear(inputs, weight, bias)
        needs_inputs, needs_weight, *_ = ctx.needs_input_grad
        rows = inputs.reshape(-1, inputs.shape[-1])
        # In the dtype that autocast has chosen, as autograd would keep it.
        small = sketch.compress(rows, seed).to(outputs.dtype) if needs_weight else None
        ctx.save_for_backward(weight if needs_inputs else None, small)
        ctx.shape, ctx.sketch, ctx.seed = inputs.shape, sketch, seed
        return outputs

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple:
        _refuse_second_derivatives()
        weight, small = ctx.saved_tensors
        needs_inputs, needs_weight, needs_bias, *_ = ctx.needs_input_grad
        sketch, size = ctx.sketch, ctx.shape[-1]
        grad = grad.reshape(-1, grad.shape[-1])
        grad_inputs = grad_weight = None
        if needs_inputs:
            grad_inputs = (grad @ weight.to(grad.dtype)).view(ctx.shape)
        if needs_weight and sketch.per_sample:
            grad_weight = grad.mT @ sketch.expand(small, size, ctx.seed)
        elif needs_weight:
            # The same R for all rows: expanding the product is far cheaper.
            grad_weight = sketch.expand(grad.mT @ small, size, ctx.seed)
        return grad_inputs, grad_weight, grad.sum(0) if needs_bias else None, None, None


class _Conv2d(torch.autograd.Function):
    """``functional.conv2d`` that keeps R^T of every channel of every image."""

    @staticmethod
    def forward(
        ctx: Any,
        inputs: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        geometry: tuple,
        sketch: _Sketch,
        seed: int,
    ) -> Tensor:
        outputs = functional.conv2d(inputs, weight, bias, *geometry)
        rows = inputs.flatten(2).flatten(0, 1)
        needed = ctx.needs_input_grad[1]
        small = sketch.compress(rows, seed).to(outputs.dtype) if needed else None
        ctx.save_for_backward(weight, small)
        ctx.shape, ctx.geometry, ctx.sketch, ctx.seed = inputs.shape, geometry, sketch, seed
        return outputs

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple:
        _refuse_second_derivatives()
        weight, small = ctx.saved_tensors
        if small is None:  # only their shape is asked for
            inputs = grad.new_zeros(()).expand(ctx.shape)
        else:
            pixels = ctx.shape[2:].numel()
            inputs = ctx.sketch.expand(small, pixels, ctx.seed).view(ctx.shape)
        stride, padding, dilation, groups = ctx.geometry
        grads = torch.ops.aten.convolution_backward(
            grad,
            inputs,
            weight.to(grad.dtype),
            grad.shape[1:2],
            stride,
            padding,
            dilation,
            False,
            (0, 0),
            groups,
            ctx.needs_input_grad[:3],
        )
        return *grads, None, None, None


def _refuse_second_derivatives() -> None:
    if torch.is_grad_enabled():
        raise RuntimeError(
            "randomized layers have no derivatives of derivatives (create_graph=True): "
            "call eval(), or randomize(module, keep=1)."
        )
