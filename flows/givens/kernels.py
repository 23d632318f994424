"""All rounds in one launch: Triton kernels for NVIDIA GPUs, an engine of ``autograd.py``.

A program holds a slab, some vectors of one set of angles or some vectors with a set of their
own each, in registers from the first round to the last. Partners meet by shuffles inside a
warp, or, where a vector is too long for that, in a scratch buffer that stays in cache. The
backward pass un-rotates output and gradient together (README.md). Without a GPU the kernels
run, slowly, if TRITON_INTERPRET=1 is set before this module is imported.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple, no_type_check

import torch
from torch import Tensor

from flows.givens.schedule import Schedule

try:
    import triton
    import triton.language as tl
except ImportError as error:
    raise ImportError(
        'impl="triton" needs the triton package: pip install givens-flows[triton]'
    ) from error

__all__ = ["pull", "turn"]

LARGEST_DIM = 8192
# A shuffle reaches one of dim / 32 registers, so its cost per entry grows with dim.
SHUFFLE_UP_TO = 128


def turn(x: Tensor | None, angles: Tensor, schedule: Schedule, inverse: bool) -> Tensor:
    """Rows x (sets, rows, dim), turned by the angles (sets, num_angles) of their set.

    Without x, the matrix of each set (sets, dim, dim): the rows of the identity times U, which
    is the inverse turn.
    """
    _check(angles, schedule)
    if x is None:
        identity = torch.eye(schedule.dim, dtype=angles.dtype, device=angles.device)
        x, inverse = identity.expand(len(angles), -1, -1), not inverse
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if y.numel():
        # One identity may stand for all sets.
        x = x if x.stride()[1:] == (x.shape[2], 1) and x.shape[1] > 1 else x.contiguous()
        launch = _Launch(x, angles.contiguous(), schedule, pull=False)
        for first in range(0, launch.slabs, launch.span):
            launch(_rotate_kernel, [x], [y], first, inverse)
    return y


def pull(
    y: Tensor, grad: Tensor, angles: Tensor, schedule: Schedule, inverse: bool, *, columns: bool
) -> tuple[Tensor, Tensor]:
    """Gradients of x and angles from what ``turn`` returned; of x none for ``columns``."""
    inverse = inverse != columns
    dx = torch.empty(y.shape, dtype=y.dtype, device=y.device)
    if not y.numel():
        return dx, torch.zeros_like(angles)
    y, grad, angles = y.contiguous(), grad.contiguous(), angles.contiguous()
    launch = _Launch(y, angles, schedule, pull=True)
    grads = []
    for first in range(0, launch.slabs, launch.span):
        span = () if launch.own else (min(launch.span, launch.slabs - first),)
        shape = (len(angles), *span, angles.shape[1])
        if not launch.own or not grads:
            grads.append(angles.new_empty(shape, dtype=launch.real))
        launch(_pull_kernel, [y, grad], [dx, grads[-1]], first, not inverse)
    # No atomics: the partial sums are always added in the same order.
    total = grads[0] if launch.own else sum(part.sum(1) for part in grads)
    return dx.new_empty((0, *dx.shape[1:])) if columns else dx, total.to(angles.dtype)


def _check(angles: Tensor, schedule: Schedule) -> None:
    if angles.device.type != "cuda" and isinstance(_rotate_kernel, triton.JITFunction):
        raise ValueError(
            'impl="triton" needs tensors on a GPU, or TRITON_INTERPRET=1 set before the first '
            f"use, got tensors on {angles.device}."
        )
    if angles.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        raise ValueError(f'impl="triton" knows 16, 32 and 64 bits, got {angles.dtype}.')
    if schedule.dim > LARGEST_DIM:
        raise ValueError(
            f'impl="triton" turns at most {LARGEST_DIM} axes, got {schedule.dim} of {schedule}.'
        )


# --- kernels ----------------------------------------------------------------------------------


@triton.jit
@no_type_check
def _slab(
    pid, first_slab, span, rows, set_stride, DIM: tl.constexpr, N: tl.constexpr, COLS: tl.constexpr
):
    """Set and rows of a program; places (COLS, N) of its entries, set_stride from set to set."""
    of_set = pid // span
    row = (first_slab + pid % span) * COLS + tl.arange(0, COLS)
    axis = tl.arange(0, N)
    mask = (row < rows)[:, None] & (axis < DIM)[None, :]
    return of_set, row, axis, of_set * set_stride + row[:, None] * DIM + axis[None, :], mask


@triton.jit
@no_type_check
def _load_round(
    turn_ptr, start_ptr, cos_ptr, sin_ptr, r, angle_at, live, axis, N: tl.constexpr,
    OWN: tl.constexpr, BACKWARDS: tl.constexpr, REAL: tl.constexpr,
):  # fmt: skip
    """A round: partner (N,), place of its angle in the set (N,), cosine and signed sine.

    Cosines and sines are (1, N), or (COLS, N) if each row has angles of its own.
    """
    packed = tl.load(turn_ptr + r * N + axis)
    partner, place = packed & 0xFFFF, tl.load(start_ptr + r) + (packed >> 16)
    turns = partner != axis
    # The first axis of a plane has the minus sign; backwards the second one.
    minus = partner < axis if BACKWARDS else partner > axis
    if OWN:
        # Read by this program alone: cheaper to compute here than to store and read back.
        angles = cos_ptr + angle_at[:, None] + place[None, :]
        angle = tl.load(angles, mask=live[:, None] & turns[None, :], other=0.0).to(REAL)
        return partner, place, tl.cos(angle), tl.sin(tl.where(minus[None, :], -angle, angle))
    else:
        c = tl.load(cos_ptr + angle_at + place, mask=turns, other=1.0)
        s = tl.load(sin_ptr + angle_at + place, mask=turns, other=0.0)
        return partner, place, c[None, :], tl.where(minus, -s, s)[None, :]


@triton.jit
@no_type_check
def _met(
    x, partner, axis, scratch_ptr, N: tl.constexpr, COLS: tl.constexpr, SHUFFLE: tl.constexpr
):
    """x[:, partner] of x (COLS, N).

    A scratch buffer must not serve two meetings in succession: the barrier of the one between
    them is what tells that all threads have read.
    """
    if SHUFFLE:
        return tl.gather(x, tl.broadcast_to(partner[None, :], (COLS, N)), axis=1)
    else:
        # Columns side by side, so that what lies together is read together.
        column = tl.arange(0, COLS)[:, None]
        tl.store(scratch_ptr + axis[None, :] * COLS + column, x)
        tl.debug_barrier()
        return tl.load(scratch_ptr + partner[None, :] * COLS + column)


# Sizes that change from call to call must not each have a program compiled.
@triton.jit(do_not_specialize=["first_slab", "span", "rows"])
@no_type_check
def _rotate_kernel(
    x_ptr,  # [sets, rows, DIM], a set set_stride behind the last
    cos_ptr,  # [sets, num_angles]; OWN: angles [rows, num_angles]
    sin_ptr,  # [sets, num_angles]; OWN: not read
    turn_ptr,  # [rounds, N] partner, and 65536 times the place of the angle in its round
    start_ptr,  # [rounds] place of a round's first angle
    y_ptr,  # [sets, rows, DIM]
    scratch_ptr,  # [programs, 2, N, COLS]
    first_slab, span, rows, set_stride, num_angles, rounds,
    DIM: tl.constexpr, N: tl.constexpr, COLS: tl.constexpr, OWN: tl.constexpr,
    BACKWARDS: tl.constexpr, SHUFFLE: tl.constexpr, REAL: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0).to(tl.int64)
    of_set, row, axis, at, mask = _slab(pid, first_slab, span, rows, set_stride, DIM, N, COLS)
    x = tl.load(x_ptr + at, mask=mask, other=0.0).to(REAL)
    angle_at = row * num_angles if OWN else of_set * num_angles
    scratch_ptr += pid * (2 * COLS * N)
    for k in range(rounds):
        r = rounds - 1 - k if BACKWARDS else k
        partner, _, c, s = _load_round(
            turn_ptr, start_ptr, cos_ptr, sin_ptr, r, angle_at, row < rows, axis,
            N, OWN, BACKWARDS, REAL,
        )  # fmt: skip
        met = _met(x, partner, axis, scratch_ptr + k % 2 * (COLS * N), N, COLS, SHUFFLE)
        x = c * x + s * met
    to = of_set * rows * DIM + row[:, None] * DIM + axis[None, :]
    tl.store(y_ptr + to, x, mask=mask)


# Sizes that change from call to call must not each have a program compiled.
@triton.jit(do_not_specialize=["first_slab", "span", "rows"])
@no_type_check
def _pull_kernel(
    y_ptr,  # [sets, rows, DIM] what a rotation gave, which is undone
    grad_ptr,  # [sets, rows, DIM] its gradient
    cos_ptr, sin_ptr, turn_ptr, start_ptr,  # as above
    grad_x_ptr,  # [sets, rows, DIM]
    grad_angles_ptr,  # [sets, span, num_angles], summed over a slab; OWN: [rows, num_angles]
    scratch_ptr,  # [programs, 2, N, COLS]
    first_slab, span, rows, set_stride, num_angles, rounds,
    DIM: tl.constexpr, N: tl.constexpr, COLS: tl.constexpr, OWN: tl.constexpr,
    BACKWARDS: tl.constexpr, SHUFFLE: tl.constexpr, REAL: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0).to(tl.int64)
    of_set, row, axis, at, mask = _slab(pid, first_slab, span, rows, set_stride, DIM, N, COLS)
    y = tl.load(y_ptr + at, mask=mask, other=0.0).to(REAL)
    g = tl.load(grad_ptr + at, mask=mask, other=0.0).to(REAL)
    angle_at = row * num_angles if OWN else of_set * num_angles
    scratch_ptr += pid * (2 * COLS * N)
    for k in range(rounds):
        r = rounds - 1 - k if BACKWARDS else k
        partner, place, c, s = _load_round(
            turn_ptr, start_ptr, cos_ptr, sin_ptr, r, angle_at, row < rows, axis,
            N, OWN, BACKWARDS, REAL,
        )  # fmt: skip
        y_met = _met(y, partner, axis, scratch_ptr, N, COLS, SHUFFLE)
        g_met = _met(g, partner, axis, scratch_ptr + COLS * N, N, COLS, SHUFFLE)
        # dy_i/dt = -y_j and dy_j/dt = y_i if the rotation that is undone went forwards.
        dt = y * g_met - y_met * g if BACKWARDS else y_met * g - y * g_met
        first = partner > axis
        if OWN:
            to = grad_angles_ptr + angle_at[:, None] + place[None, :]
            tl.store(to, dt, mask=(row < rows)[:, None] & first[None, :])
        else:
            tl.store(grad_angles_ptr + pid * num_angles + place, tl.sum(dt, axis=0), mask=first)
        y, g = c * y + s * y_met, c * g + s * g_met
    tl.store(grad_x_ptr + at, g, mask=mask)


# --- launchers --------------------------------------------------------------------------------


class _Launch:
    """What both kernels are given: sizes, cosines and sines, room for partners to meet."""

    def __init__(self, x: Tensor, angles: Tensor, schedule: Schedule, *, pull: bool) -> None:
        key, device = ("kernels", angles.device), angles.device
        turns, starts = schedule.remember(key, lambda: _tables(schedule, device))
        sets, rows, dim = x.shape
        self.own = rows == 1
        if self.own:
            sets, rows = 1, sets
        n, count = turns.shape[1], angles.shape[1]
        self.real = torch.promote_types(angles.dtype, torch.float32)
        self.sets, self.shuffle = sets, n <= SHUFFLE_UP_TO
        # First a program for each multiprocessor of a large GPU, then wider slabs, which share
        # the reading of rounds; the interpreter takes one program after another.
        wide = sets * rows // (128 if x.is_cuda else 2)
        least, most = max(1, 256 // n), max(1, (1024 if self.own else 2048 if pull else 4096) // n)
        self.cols = min(max(least, min(_power(wide), most)), _power(2 * rows - 1))
        self.slabs = -(-rows // self.cols)
        # Further launches where the buffers of one would be too large for cache or memory.
        self.span = self.slabs
        if not self.shuffle:
            self.span = min(self.span, max(1, 4096 // sets))
        if pull and not self.own:
            self.span = min(self.span, max(1, 2**26 // (sets * count)))
        meeting = 0 if self.shuffle else sets * self.span * 2 * self.cols * n
        self.scratch = x.new_empty(meeting, dtype=self.real)
        table = angles.to(self.real)
        self.tables = (angles, angles) if self.own else (table.cos(), table.sin())
        self.tables += turns, starts
        self.sizes = rows, (x.stride(0) if sets > 1 else 0), count, len(turns), dim, n, self.cols
        # So many entries for each thread: few where each has a cosine and a sine of its own.
        self.warps = min(16, max(1, n * self.cols // (32 * (4 if self.own else 8))))

    def __call__(self, kernel: Any, inputs: Sequence, outputs: Sequence, first: int, back: bool):
        span = min(self.span, self.slabs - first)
        real = tl.float64 if self.real == torch.float64 else tl.float32
        flags = self.own, back, self.shuffle, real
        tensors = *inputs, *self.tables, *outputs, self.scratch
        with torch.cuda.device_of(self.scratch):
            kernel[(self.sets * span,)](
                *tensors, first, span, *self.sizes, *flags, num_warps=self.warps
            )


def _power(number: int) -> int:
    """The largest power of two up to number, 1 at least."""
    return 1 << max(0, number.bit_length() - 1)


class _Tables(NamedTuple):
    """A schedule as index tensors on a device, as the kernels read them."""

    turns: Tensor
    starts: Tensor


def _tables(schedule: Schedule, device: torch.device) -> _Tables:
    i, j, r = *schedule.planes.int().unbind(1), schedule.round_of_plane
    sizes = torch.tensor(schedule.round_sizes)
    starts = (sizes.cumsum(0) - sizes).int()
    place = torch.arange(schedule.num_angles, dtype=torch.int32) - starts[r]
    turns = torch.arange(_power(2 * schedule.dim - 1), dtype=torch.int32).repeat(len(schedule), 1)
    turns[r, i], turns[r, j] = j + (place << 16), i + (place << 16)
    return _Tables(turns.to(device), starts.to(device))
