"""Matrix products in the precision of their numbers, on which orthogonality depends."""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

__all__ = ["matmul"]


def _reduced(like: Tensor) -> bool:
    """Whether a product of such tensors would be made in less than their own precision."""
    device = like.device.type
    precision = _backend(device).matmul.fp32_precision
    return precision not in ("none", "ieee") or torch.is_autocast_enabled(device)


def _backend(device: str) -> Any:
    return torch.backends.cuda if device == "cuda" else torch.backends.mkldnn


@contextmanager
def _full_precision(like: Tensor) -> Iterator[None]:
    """Products in IEEE arithmetic of their own dtype, whatever the user has asked for."""
    device = like.device.type
    backend = _backend(device)
    before = backend.matmul.fp32_precision
    reduced = before not in ("none", "ieee")
    if reduced:
        backend.matmul.fp32_precision = "ieee"
    try:
        with torch.autocast(device, enabled=False):
            yield
    finally:
        if reduced:
            # An inherited setting is inherited again, an explicit one is put back.
            backend.matmul.fp32_precision = "none"
            if backend.matmul.fp32_precision != before:
                backend.matmul.fp32_precision = before


def _multiply(a: Tensor, b: Tensor) -> Tensor:
    if not _reduced(a):
        return a @ b
    with _full_precision(a):
        return a @ b


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """a @ b in full precision, and so are its derivatives of any order."""
    if torch.compiler.is_exporting():
        return a @ b  # a program must run where this library is not
    if torch.compiler.is_compiling():
        return _operator(a, b)
    return (_Matmul.apply if torch.is_grad_enabled() else _multiply)(a, b)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
    a, b = ctx.saved_tensors
    return (
        matmul(grad, b.mT) if ctx.needs_input_grad[0] else None,
        matmul(a.mT, grad) if ctx.needs_input_grad[1] else None,
    )


class _Matmul(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(a: Tensor, b: Tensor) -> Tensor:
        return _multiply(a, b)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        return _backward(ctx, grad)

    @staticmethod
    def jvp(ctx: Any, da: Tensor, db: Tensor) -> Tensor:
        a, b = ctx.saved_tensors
        return matmul(da, b) + matmul(a, db)


# Torch asks for the signature in every call, which takes as long as a small product.
_Matmul.forward.__signature__ = inspect.signature(_Matmul.forward)

# What the compiler is given instead: it cannot look inside, so that the precision stays.
_operator = torch.library.custom_op("givens_flows::matmul", _multiply, mutates_args=())
_operator.register_fake(torch.matmul)
_operator.register_autograd(
    _backward, setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs)
)
