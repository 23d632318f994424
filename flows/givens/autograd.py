"""Rotations by any engine, as differentiable functions.

An engine is a module with ``turn`` and ``pull``, its backward pass: they un-rotate the output
and its gradient together, so that what is kept does not depend on the number of rounds
(README.md). ``rounds.py`` is the plain one. Others serve the forward pass and the first
derivative; derivatives of derivatives and forward mode go by the rounds.
"""

import inspect
from importlib import import_module
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from flows.givens import rounds
from flows.givens.schedule import Schedule

__all__ = ["matrix", "rotate"]


def rotate(
    x: Tensor,
    angles: Tensor,
    schedule: Schedule,
    *,
    phases: Tensor | None = None,
    inverse: bool = False,
    engine: ModuleType = rounds,
) -> Tensor:
    """Turn the last axis of x; angles (num_angles,) for all rows, or one set per row of x.

    With phases (num_angles + dim,) or one set per row, x must be complex.
    """
    if phases is not None:
        angles, last = _with_phases(angles, phases, schedule)
        x = x * rounds.unit(-last) if inverse else x
    sets, n = angles.reshape(-1, angles.shape[-1]), schedule.dim
    rows = x.reshape(1, -1, n) if angles.ndim == 1 else x.reshape(-1, 1, n)
    y = _apply(rows, sets, schedule, inverse, engine).reshape(x.shape)
    return y if phases is None or inverse else y * rounds.unit(last)


def matrix(
    angles: Tensor,
    schedule: Schedule,
    *,
    phases: Tensor | None = None,
    engine: ModuleType = rounds,
) -> Tensor:
    """U for each set of angles: the rotations applied to the columns of the identity."""
    if phases is not None:
        angles, last = _with_phases(angles, phases, schedule)
    n, sets = schedule.dim, angles.reshape(-1, angles.shape[-1])
    u = _apply(None, sets, schedule, False, engine).reshape(*angles.shape[:-1], n, n)
    return u if phases is None else rounds.unit(last).unsqueeze(-1) * u


def _with_phases(angles: Tensor, phases: Tensor, schedule: Schedule) -> tuple[Tensor, Tensor]:
    """Angles followed by the phases of their planes, and the phases of the diagonal."""
    turned, last = phases.tensor_split([schedule.num_angles], dim=-1)
    return torch.cat([angles, turned], dim=-1), last


def _apply(
    x: Tensor | None, angles: Tensor, schedule: Schedule, inverse: bool, engine: ModuleType
) -> Tensor:
    if not torch.compiler.is_compiling():
        return _Rotate.apply(x, angles, schedule, inverse, engine)
    if engine is rounds or torch.compiler.is_exporting():
        # The compiler derives a backward pass of its own, and decides itself what to keep.
        return rounds.turn(x, angles, schedule, inverse)
    return _turn(x, angles, schedule.name, inverse, engine.__name__)


class _Rotate(torch.autograd.Function):
    """An engine's ``turn`` and its derivatives."""

    @staticmethod
    def forward(
        x: Tensor | None,
        angles: Tensor,
        schedule: Schedule,
        inverse: bool,
        engine: ModuleType,
    ) -> Tensor:
        y = engine.turn(x, angles, schedule, inverse)
        # Forward mode wants an output that is no view.
        return y.clone() if engine is rounds else y

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        x, angles, ctx.schedule, ctx.inverse, ctx.engine = inputs
        ctx.columns = x is None
        ctx.save_for_backward(output, angles)
        ctx.save_for_forward(output, angles)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor, None, None, None]:
        y, angles = ctx.saved_tensors
        # If this is to be differentiated in turn, by operations that can be.
        plain = torch.is_grad_enabled() or not _in_memory(grad)
        pull = rounds.pull if plain else ctx.engine.pull
        dx, dangles = pull(y, grad, angles, ctx.schedule, ctx.inverse, columns=ctx.columns)
        return None if ctx.columns else dx, dangles, None, None, None

    @staticmethod
    def jvp(ctx: Any, dx: Tensor | None, dangles: Tensor | None, *_: None) -> Tensor:
        given = *ctx.saved_tensors, dx, dangles, ctx.schedule, ctx.inverse
        return rounds.push(*given, ctx.columns)

    @staticmethod
    def vmap(info: Any, in_dims: tuple, x: Tensor | None, angles: Tensor, *rest: Any):
        x_dim, angles_dim = in_dims[:2]
        if angles_dim is None:  # more rows with the same angles
            x = x.movedim(x_dim, 1)
            y = _Rotate.apply(x.flatten(1, 2), angles, *rest)
            return y.unflatten(1, x.shape[1:3]), 1
        angles = angles.movedim(angles_dim, 0)
        if x is not None:
            x = x.unsqueeze(0) if x_dim is None else x.movedim(x_dim, 0)
            x = x.expand(info.batch_size, -1, -1, -1).flatten(0, 1)
        y = _Rotate.apply(x, angles.flatten(0, 1), *rest)
        return y.unflatten(0, angles.shape[:2]), 0


# Torch asks for the signature in every call, which takes as long as a small rotation.
_Rotate.forward.__signature__ = inspect.signature(_Rotate.forward)


def _in_memory(tensor: Tensor) -> bool:
    """Whether there are numbers to read: not so for the wrappers of a batched backward."""
    try:
        tensor.data_ptr()
    except RuntimeError:
        return False
    return True


# --- engines as operators that the compiler does not look into ----------------------------------


@torch.library.custom_op("givens_flows::turn", mutates_args=())
def _turn(x: Tensor | None, angles: Tensor, schedule: str, inverse: bool, engine: str) -> Tensor:
    return import_module(engine).turn(x, angles, Schedule.named(schedule), inverse)


@torch.library.custom_op("givens_flows::pull", mutates_args=())
def _pull(
    y: Tensor,
    grad: Tensor,
    angles: Tensor,
    schedule: str,
    inverse: bool,
    engine: str,
    columns: bool,
) -> tuple[Tensor, Tensor]:
    given = y, grad, angles, Schedule.named(schedule), inverse
    return import_module(engine).pull(*given, columns=columns)


@_turn.register_fake
def _(x, angles, schedule, inverse, engine):
    dim = Schedule.named(schedule).dim
    return angles.new_empty(x.shape if x is not None else (len(angles), dim, dim))


@_pull.register_fake
def _(y, grad, angles, schedule, inverse, engine, columns):
    shape = (0, *grad.shape[1:]) if columns else grad.shape
    return grad.new_empty(shape), angles.new_empty(angles.shape)


def _save(ctx: Any, inputs: tuple, output: Tensor) -> None:
    x, angles, *ctx.rest = inputs
    ctx.columns = x is None
    ctx.save_for_backward(output, angles)


def _pull_saved(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor, None, None, None]:
    y, angles = ctx.saved_tensors
    dx, dangles = _pull(y, grad, angles, *ctx.rest, ctx.columns)
    return None if ctx.columns else dx, dangles, None, None, None


_turn.register_autograd(_pull_saved, setup_context=_save)
