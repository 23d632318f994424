"""A ReLU that keeps one bit for each number for its backward pass."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

__all__ = ["bit_relu"]


def bit_relu(inputs: Tensor, inplace: bool = False) -> Tensor:
    """``relu`` that keeps the bits x > 0, eight to a byte; outputs and gradient are its own."""
    return _BitReLU.apply(inputs, inplace)


class _BitReLU(torch.autograd.Function):
    """``relu`` that keeps the bits x > 0, eight to a byte."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, inplace: bool) -> Tensor:
        outputs = inputs.relu_() if inplace else inputs.relu()
        if inplace:
            ctx.mark_dirty(inputs)
        # As torch has it, what is not a number passes its gradient.
        ctx.save_for_backward(_pack(~(outputs <= 0)))
        return outputs

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (packed,) = ctx.saved_tensors
        passes = _unpack(packed, grad.dtype)[: grad.numel()].view(grad.shape)
        return torch.ops.aten.threshold_backward(grad, passes, 0), None


def _pack(mask: Tensor) -> Tensor:
    """Booleans as bytes of eight, the last filled up with zeros."""
    mask = functional.pad(mask.flatten(), (0, -mask.numel() % 8))
    # As one integer eight booleans are bytes 0 or 1; the product gathers them in its top byte.
    return (mask.view(torch.int64) * 0x0102040810204080 >> 56).to(torch.uint8)


def _unpack(packed: Tensor, dtype: torch.dtype) -> Tensor:
    """What ``_pack`` packed, and the filling, as zeros and ones."""
    numbers = torch.arange(256, device=packed.device)[:, None]
    patterns = numbers >> torch.arange(8, device=packed.device) & 1
    # Which bit is which depends on the order of bytes of the machine.
    table = torch.empty(256, 8, dtype=dtype, device=packed.device)
    table[_pack(patterns.bool()).long()] = patterns.to(dtype)
    return table.index_select(0, packed.int()).flatten()
