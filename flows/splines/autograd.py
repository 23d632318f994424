"""Compiled splines as differentiable functions.

Compiled code serves the forward pass and first derivatives of tensors in memory; derivatives
of derivatives, forward mode and batched gradients go by ``plain.py``. Inputs and parameters are
all that is kept.
"""

import inspect
from functools import partial
from typing import Any

import torch
from torch import Tensor

from flows.splines import plain

__all__ = ["spline"]


def spline(
    inputs: Tensor, parameters: Tensor, tail_bound: float, inverse: bool
) -> tuple[Tensor, Tensor]:
    """As ``plain.spline``, for tensors on the CPU in single or double precision."""
    return _Spline.apply(inputs, parameters, tail_bound, inverse)


class _Spline(torch.autograd.Function):
    """The compiled spline and its derivatives."""

    @staticmethod
    def forward(
        inputs: Tensor, parameters: Tensor, tail_bound: float, inverse: bool
    ) -> tuple[Tensor, Tensor]:
        from flows.splines import compiled

        return compiled.spline(inputs, parameters, tail_bound, inverse)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
        *tensors, ctx.tail_bound, ctx.inverse = inputs
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)

    @staticmethod
    def backward(ctx: Any, grad: Tensor, grad_log: Tensor) -> tuple[Tensor, Tensor, None, None]:
        given = *ctx.saved_tensors, grad, grad_log, ctx.tail_bound, ctx.inverse
        return *_pull(*given), None, None

    @staticmethod
    def jvp(ctx: Any, dinputs: Tensor | None, dparameters: Tensor | None, *_: None):
        inputs, parameters = ctx.saved_tensors
        # Each output hangs on its own input and parameters only, so that one backward pass
        # finds all the partial derivatives.
        parameters = parameters.expand(*inputs.shape, -1)
        one, none = torch.ones_like(inputs), torch.zeros_like(inputs)
        tangents = []
        for weights in ((one, none), (none, one)):
            by_inputs, by_parameters = _pull(
                inputs, parameters, *weights, ctx.tail_bound, ctx.inverse
            )
            tangent = none if dinputs is None else by_inputs * dinputs
            if dparameters is not None:
                tangent = tangent + (by_parameters * dparameters).sum(-1)
            tangents.append(tangent)
        return tuple(tangents)

    @staticmethod
    def vmap(info: Any, in_dims: tuple, inputs: Tensor, parameters: Tensor, *rest: Any):
        if in_dims[0] is None:
            inputs = inputs.expand(info.batch_size, *inputs.shape)
        else:
            inputs = inputs.movedim(in_dims[0], 0)
        if in_dims[1] is None:
            parameters = parameters.unsqueeze(0)
        else:
            parameters = parameters.movedim(in_dims[1], 0)
        return _Spline.apply(inputs, parameters, *rest), (0, 0)


# Torch asks for the signature in every call, which takes as long as a few splines.
_Spline.forward.__signature__ = inspect.signature(_Spline.forward)


def _pull(
    inputs: Tensor,
    parameters: Tensor,
    grad: Tensor,
    grad_log: Tensor,
    tail_bound: float,
    inverse: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients of inputs and parameters from those of outputs and log slopes."""
    tensors = inputs, parameters, grad, grad_log
    # If this is to be differentiated in turn, by operations that can be.
    if torch.is_grad_enabled() or not all(map(_in_memory, tensors)):
        function = partial(plain.spline, tail_bound=tail_bound, inverse=inverse)
        return torch.func.vjp(function, inputs, parameters)[1]((grad, grad_log))
    from flows.splines import compiled

    return compiled.pull(*tensors, tail_bound, inverse)


def _in_memory(tensor: Tensor) -> bool:
    """Whether there are numbers to read: not so for the wrappers of a batched backward."""
    try:
        tensor.data_ptr()
    except RuntimeError:
        return False
    return True
