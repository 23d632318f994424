"""Compiled for the CPU: a slab of columns stays in cache through all rotations.

An engine of ``autograd.py``. Each tile of the program (``program.py``) loads a few rows of the
slab into vector registers, turns them, and stores them (``lanes.py``). A turn by t is three
shears, with tau = tan(t / 2) and s = sin t,

    x_i <- x_i - tau x_j        x_j <- x_j + s x_i        x_i <- x_i - tau x_j

that is three fused multiply-adds, where the definition takes four operations. They want
|t| <= pi / 2: half turns are signs of two rows, and are carried to the end. Where each sample
has angles of its own, samples lie side by side in a vector and are turned by c and s.
README.md derives and counts.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from flows.givens.lanes import (
    ROW_OF_SAMPLES,
    VECTOR,
    carry_signs,
    collect,
    pull_each,
    pull_shared,
    shears,
    turn_each,
    turn_shared,
)
from flows.givens.program import program
from flows.givens.schedule import Schedule
from flows.native import parallel

__all__ = ["pull", "turn"]

# Bytes in a row of a slab, at most: wide, so that turns are seldom read.
ROW = 1024
# So many turns of a vector are worth a thread of their own: some 100 microseconds.
TURNS_PER_THREAD = 100_000


# --- the engine ---------------------------------------------------------------------------------


def turn(x: Tensor | None, angles: Tensor, schedule: Schedule, inverse: bool) -> Tensor:
    """Rows x (sets, rows, dim), turned by the angles (sets, num_angles) of their set.

    Without x, the matrix of each set (sets, dim, dim).
    """
    if angles.device.type != "cpu":
        raise ValueError(f"impl='compiled' works on the CPU, got tensors on {angles.device}.")
    if angles.dtype not in (torch.float32, torch.float64):
        y = turn(None if x is None else x.float(), angles.float(), schedule, inverse)
        return y.to(angles.dtype)
    n, columns = schedule.dim, x is None
    y = angles.new_empty((len(angles), n, n)) if columns else angles.new_empty(x.shape)
    if _own_angles(y, columns):
        sides = _array(x)[:, 0], _array(y)[:, 0], _array(angles)
        _each(turn_each, sides, schedule, inverse)
    else:
        sides = _array(y if columns else x), _array(y)
        _shared(sides, angles, schedule, inverse, columns)
    return y


def pull(
    y: Tensor, grad: Tensor, angles: Tensor, schedule: Schedule, inverse: bool, *, columns: bool
) -> tuple[Tensor, Tensor]:
    """Gradients of x, unless ``columns``, and angles from what ``turn`` returned."""
    if angles.dtype not in (torch.float32, torch.float64):
        full = (t.float() for t in (y, grad, angles))
        dx, dangles = pull(*full, schedule, inverse, columns=columns)
        return dx.to(y.dtype), dangles.to(angles.dtype)
    dangles = angles.new_empty(angles.shape)
    dx = grad.new_empty((0, *grad.shape[1:]) if columns else grad.shape)
    if _own_angles(y, columns):
        rows = (_array(t)[:, 0] for t in (y, grad, dx))
        _each(pull_each, (*rows, _array(angles), _array(dangles)), schedule, inverse)
    else:
        sides = _array(y), _array(grad), _array(dx)
        _shared(sides, angles, schedule, inverse, columns, dangles)
    return dx, dangles


def _array(tensor: Tensor) -> np.ndarray:
    return tensor.detach().resolve_neg().contiguous().numpy()


def _own_angles(y: Tensor, columns: bool) -> bool:
    return not columns and y.shape[0] > 1 and y.shape[1] == 1


def _shared(
    sides: tuple[np.ndarray, ...],
    angles: Tensor,
    schedule: Schedule,
    inverse: bool,
    columns: bool,
    dangles: Tensor | None = None,
) -> None:
    """Turn (x, y), or pull (y, grad, dx), where a set of angles turns several columns."""
    x, (runs, rows, number, span) = sides[0], program(schedule, inverse=inverse)
    sets, count = len(x), x.shape[2 if columns else 1]
    vectors = -(-count * x.itemsize // VECTOR)
    threads = _threads(sets * vectors * len(number))
    slabs = -(-vectors * VECTOR // ROW)
    if sets < threads:  # equal shares
        slabs = -(-slabs // threads) * threads
    width = -(-vectors // max(slabs, 1)) * VECTOR // x.itemsize
    jobs = sets * -(-count // max(width, 1))
    table = np.empty((sets, len(number), 2), x.dtype)
    direction = np.empty((sets, len(number)), x.dtype)
    given = _array(angles), number, table, direction
    parallel(shears, given, direction.size, threads)
    signs = carry_signs(schedule.dim, runs, rows, table, direction)
    given = *sides, columns, width, runs, rows, span, table, signs
    if dangles is None:
        parallel(turn_shared, given, jobs, threads)
    else:
        sums = np.zeros((threads, sets, len(number)), x.dtype)
        parallel(pull_shared, (*given, sums), jobs, threads)
        given = sums, number, direction, _array(dangles)
        parallel(collect, given, len(number), threads)


def _each(
    loop: Callable, arrays: tuple[np.ndarray, ...], schedule: Schedule, inverse: bool
) -> None:
    """Turn or pull where each row has angles of its own."""
    x = arrays[0]
    jobs = -(-len(x) * x.itemsize // ROW_OF_SAMPLES)
    # Making a turn from its angle costs about eight times the turn.
    threads = _threads(8 * jobs * (ROW_OF_SAMPLES // VECTOR) * schedule.num_angles)
    parallel(loop, (*arrays, schedule.planes.numpy(), inverse), jobs, threads)


# --- threads ------------------------------------------------------------------------------------


def _threads(turns: int) -> int:
    return max(1, min(torch.get_num_threads(), turns // TURNS_PER_THREAD))
