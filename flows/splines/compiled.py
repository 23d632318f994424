"""Compiled for the CPU: one pass over inputs and parameters, another for all gradients.

Splines are computed a few dozen at a time in vectors (``loops.py``), from parameters that are
read where they lie.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from flows.native import parallel
from flows.splines.loops import CHUNK, LANES, apply_splines, compiled_loop, pull_splines
from flows.splines.plain import MIN_BIN, MIN_SLOPE, SLOPE_OFFSET

__all__ = ["pull", "spline"]

# So many inputs are worth a thread of their own: some 100 microseconds.
INPUTS_PER_THREAD = 2048


def spline(
    inputs: Tensor, parameters: Tensor, tail_bound: float, inverse: bool
) -> tuple[Tensor, Tensor]:
    """Outputs and log slopes; parameters have one axis more than inputs, and broadcast."""
    layout = _Layout(inputs, parameters)
    x, raw = layout.values(inputs), layout.rows(parameters)
    y, log_slope = torch.empty_like(x), torch.empty_like(x)
    _run(apply_splines, (x, raw, y, log_slope), tail_bound, inverse)
    return layout.values_back(y), layout.values_back(log_slope)


def pull(
    inputs: Tensor,
    parameters: Tensor,
    grad: Tensor,
    grad_log: Tensor,
    tail_bound: float,
    inverse: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients of inputs and parameters from those of outputs and log slopes."""
    layout = _Layout(inputs, parameters)
    x, grad, grad_log = map(layout.values, (inputs, grad, grad_log))
    raw = layout.rows(parameters)
    dx, chunks = torch.empty_like(x), -(-x.shape[-1] // CHUNK)
    # Every chunk of a spline's inputs has a gradient of its own.
    draw = torch.empty_like(raw)[None] if chunks == 1 else raw.new_empty((chunks, *raw.shape))
    _run(pull_splines, (x, raw, grad, grad_log, dx, draw), tail_bound, inverse)
    return layout.values_back(dx), layout.rows_back(draw[0] if chunks == 1 else draw.sum(0))


class _Layout:
    """Inputs as (outer, inner, inputs of one spline), parameters as (outer, inner, number).

    The axes along which splines differ make two groups, as parameters that come from a
    convolution, or from a layer that many features share, have strides for two.
    """

    def __init__(self, inputs: Tensor, parameters: Tensor) -> None:
        shape, sizes = inputs.shape, parameters.shape[:-1]
        own = [axis for axis in range(inputs.ndim) if sizes[axis] == shape[axis]]
        shared = [axis for axis in range(inputs.ndim) if sizes[axis] != shape[axis]]
        self.order = own + shared
        self.back = [self.order.index(axis) for axis in range(inputs.ndim)]
        self.shape = [shape[axis] for axis in self.order]
        self.sizes = [sizes[axis] for axis in self.order]
        self.count = parameters.shape[-1]
        self.outer = shape[own[0]] if len(own) > 1 else 1
        self.inner = math.prod(shape[axis] for axis in own[len(own) > 1 :])
        self.inputs = math.prod(shape[axis] for axis in shared)

    def values(self, tensor: Tensor) -> Tensor:
        tensor = tensor.detach().resolve_neg().permute(self.order)
        return tensor.reshape(self.outer, self.inner, self.inputs)

    def values_back(self, values: Tensor) -> Tensor:
        return values.reshape(self.shape).permute(self.back)

    def rows(self, tensor: Tensor) -> Tensor:
        tensor = tensor.detach().resolve_neg().permute(*self.order, -1)
        return tensor.reshape(self.outer, self.inner, self.count)

    def rows_back(self, rows: Tensor) -> Tensor:
        return rows.reshape(*self.sizes, self.count).permute(*self.back, -1)


def _run(loop: Callable, tensors: tuple[Tensor, ...], tail_bound: float, inverse: bool) -> None:
    outer, inner, inputs = tensors[0].shape
    jobs = -(-outer * inner // LANES) * -(-inputs // CHUNK)
    threads = min(torch.get_num_threads(), outer * inner * inputs // INPUTS_PER_THREAD)
    limits = float(tail_bound), MIN_BIN, MIN_SLOPE, SLOPE_OFFSET
    arrays = [tensor.numpy() for tensor in tensors]
    given = *arrays, limits, inverse
    parallel(compiled_loop(loop, arrays[0].dtype), given, jobs, max(1, threads))
