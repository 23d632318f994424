"""The public door of ``flows.givens``: checks the arguments, chooses, calls."""

from importlib.util import find_spec
from types import ModuleType
from typing import Literal

import torch
from jaxtyping import Float, Inexact
from torch import Tensor

from flows.givens import autograd, product, reference
from flows.givens.exact import matmul
from flows.givens.schedule import Schedule

__all__ = ["IMPLS", "matrix", "rotate"]

IMPLS = ("auto", "reference", "rounds", "product", "compiled", "triton")
Impl = Literal["auto", "reference", "rounds", "product", "compiled", "triton"]

# Without numba a shared matrix is built by products from this dimension on (README.md).
PRODUCT_FROM = 64

# On the CPU everything is done by compiled code where that can be.
HAS_NUMBA = find_spec("numba") is not None

# Complex results exist in these precisions.
COMPLEX = {torch.float32: torch.complex64, torch.float64: torch.complex128}


def matrix(
    angles: Float[Tensor, "*batch num_angles"],
    schedule: Schedule,
    *,
    phases: Float[Tensor, "*batch num_phases"] | None = None,
    impl: Impl = "auto",
) -> Inexact[Tensor, "*batch dim dim"]:
    r"""Orthogonal matrix U of determinant +1: all rotations applied, first round first.

    The rotation of plane (i, j) by the angle t maps
    :math:`x_i \to \cos t\, x_i - \sin t\, x_j` and :math:`x_j \to \sin t\, x_i + \cos t\, x_j`.
    With phases U is unitary: the phase p of a plane puts :math:`e^{-ip} \sin t` and
    :math:`e^{ip} \sin t` in place of the two sines, and :math:`e^{i\,\mathrm{phase}}` multiplies
    each axis after the last round.

    Args:
        angles: Radians, in the order of ``schedule.planes``; leading axes are batch axes.
        schedule: Planes in order of application.
        phases: Radians, (..., num_angles + dim): one per plane, in the order of the angles,
            then one per axis; leading axes, dtype and device as those of ``angles``.
        impl: ``"reference"`` (the definition), ``"rounds"`` (plain tensor operations),
            ``"compiled"`` (CPU, needs numba), ``"triton"`` (GPU, needs triton), ``"product"``
            (schedules made by ``crossing`` or ``cosine_sine``), or ``"auto"``: the fastest
            that is there. With phases: ``"reference"`` or ``"rounds"``.

    Shape:
        angles (..., num_angles) to matrices (..., dim, dim)

    Returns:
        One matrix per set of angles, in the dtype and on the device of ``angles``; with phases
        in the complex dtype of that precision.

    Raises:
        ValueError: If the number or type of angles or phases, or ``impl``, does not fit.
        ImportError: If ``impl`` needs a package that is not installed.

    Reference:
        Hamze (2021), arXiv 2106.00003

    Example:
        >>> import math, torch
        >>> from flows import givens
        >>> givens.matrix(torch.tensor([math.pi / 2]), givens.crossing(2)).round().tolist()
        [[-0.0, -1.0], [1.0, -0.0]]
    """
    _check_angles(angles, schedule)
    if phases is not None:
        _check_phases(phases, angles, schedule)
        return _unitary(impl).matrix(angles, schedule, phases=phases)
    match _chosen(impl, angles, schedule, shared=True):
        case "reference":
            return reference.matrix(angles, schedule)
        case "rounds":
            return autograd.matrix(angles, schedule)
        case "product":
            return product.matrix(angles, schedule)
        case "compiled" | "triton" as name:
            return autograd.matrix(angles, schedule, engine=_engine(name))
        case _:
            raise ValueError(f"impl must be one of {IMPLS}, got {impl!r}.")


def rotate(
    x: Inexact[Tensor, "*rows dim"],
    angles: Float[Tensor, "*batch num_angles"],
    schedule: Schedule,
    *,
    phases: Float[Tensor, "*batch num_phases"] | None = None,
    inverse: bool = False,
    impl: Impl = "auto",
) -> Inexact[Tensor, "*rows dim"]:
    """Apply all rotations to the last axis of x: ``x @ matrix(angles, schedule).mT``.

    Args:
        x: Vectors, shape (..., dim); with phases real or complex.
        angles: Radians; (num_angles,) for one rotation of all vectors, or
            (..., num_angles) with the leading axes of x for one rotation per vector.
        schedule: Planes in order of application.
        phases: As in :func:`matrix`, with the leading axes of ``angles``.
        inverse: Undo the rotations instead; the inverse of U is ``U.mH``.
        impl: As in :func:`matrix`.

    Shape:
        x (..., dim), angles (num_angles,) or (..., num_angles), to rotated x (..., dim)

    Returns:
        Rotated vectors, of the shape of x; complex with phases.

    Raises:
        ValueError: If shapes, dtypes, devices or ``impl`` do not fit.

    Reference:
        Hamze (2021), arXiv 2106.00003; the backward pass keeps only the output and the angles.

    Example:
        >>> import math, torch
        >>> from flows import givens
        >>> angles, schedule = torch.tensor([math.pi / 2]), givens.crossing(2)
        >>> y = givens.rotate(torch.tensor([3.0, 4.0]), angles, schedule)
        >>> y.round(decimals=4)  # a quarter turn
        tensor([-4.,  3.])
        >>> givens.rotate(y, angles, schedule, inverse=True).round(decimals=4)
        tensor([3., 4.])
    """
    _check_angles(angles, schedule)
    if x.ndim == 0 or x.shape[-1] != schedule.dim:
        raise ValueError(
            f"x must end in {schedule.dim} entries, as {schedule} does, got {tuple(x.shape)}."
        )
    if angles.ndim > 1 and angles.shape[:-1] != x.shape[:-1]:
        raise ValueError(
            "angles must be one set for all vectors or one set per vector: expected "
            f"{(schedule.num_angles,)} or {(*x.shape[:-1], schedule.num_angles)}, "
            f"got {tuple(angles.shape)}."
        )
    if phases is not None:
        _check_phases(phases, angles, schedule)
        x = _complex(x, angles)
        return _unitary(impl).rotate(x, angles, schedule, phases=phases, inverse=inverse)
    if x.dtype != angles.dtype or x.device != angles.device:
        raise ValueError(
            "x and angles must share dtype and device, got "
            f"{x.dtype} on {x.device} and {angles.dtype} on {angles.device}."
        )
    match _chosen(impl, angles, schedule, shared=angles.ndim == 1):
        case "reference":
            return reference.rotate(x, angles, schedule, inverse=inverse)
        case "rounds":
            return autograd.rotate(x, angles, schedule, inverse=inverse)
        case "product":
            return product.rotate(x, angles, schedule, inverse=inverse)
        case "compiled" if angles.ndim == 1 and x.numel() >= schedule.dim * _many(schedule.dim):
            u = autograd.matrix(angles, schedule, engine=_engine("compiled"))
            rows = x.reshape(-1, schedule.dim)
            return matmul(rows, u if inverse else u.mT).reshape(x.shape)
        case "compiled" | "triton" as name:
            engine = _engine(name)
            return autograd.rotate(x, angles, schedule, inverse=inverse, engine=engine)
        case _:
            raise ValueError(f"impl must be one of {IMPLS}, got {impl!r}.")


def _chosen(impl: str, angles: Tensor, schedule: Schedule, *, shared: bool) -> str:
    """What "auto" stands for, see README.md; anything else is obeyed."""
    if impl != "auto":
        return impl
    # A program that is exported must run where neither numba nor this library is.
    if angles.device.type == "cpu" and HAS_NUMBA and not torch.compiler.is_exporting():
        return "compiled"
    products = schedule.name.startswith(("crossing(", "cosine_sine("))
    return "product" if shared and products and schedule.dim >= PRODUCT_FROM else "rounds"


def _many(dim: int) -> int:
    """So many vectors are sooner multiplied by the matrix than turned one by one."""
    return max(2 * dim, 192)


def _engine(name: str) -> ModuleType:
    """The engines that need a package of their own, imported at the moment of use."""
    if name == "triton":
        from flows.givens import kernels

        return kernels
    from flows.givens import compiled

    return compiled


def _check_angles(angles: Tensor, schedule: Schedule) -> None:
    if not angles.is_floating_point():
        raise ValueError(f"angles must be real floating-point numbers, got {angles.dtype}.")
    if angles.ndim == 0 or angles.shape[-1] != schedule.num_angles:
        raise ValueError(
            f"angles must end in {schedule.num_angles} entries, one per plane of {schedule}, "
            f"got {tuple(angles.shape)}."
        )


def _check_phases(phases: Tensor, angles: Tensor, schedule: Schedule) -> None:
    if angles.dtype not in COMPLEX:
        raise ValueError(
            f"phases need angles of torch.float32 or torch.float64, got {angles.dtype}."
        )
    if phases.dtype != angles.dtype or phases.device != angles.device:
        raise ValueError(
            "phases and angles must share dtype and device, got "
            f"{phases.dtype} on {phases.device} and {angles.dtype} on {angles.device}."
        )
    count = schedule.num_angles + schedule.dim
    if phases.shape != (*angles.shape[:-1], count):
        raise ValueError(
            f"phases must have shape {(*angles.shape[:-1], count)}: {schedule.num_angles}, one "
            f"per plane of {schedule}, and {schedule.dim}, one per axis, after the leading axes "
            f"of angles; got {tuple(phases.shape)}."
        )


def _complex(x: Tensor, angles: Tensor) -> Tensor:
    """x in the complex dtype that matches the angles."""
    dtype = COMPLEX[angles.dtype]
    if x.dtype not in (angles.dtype, dtype) or x.device != angles.device:
        raise ValueError(
            f"with phases x must be {angles.dtype} or {dtype} on {angles.device}, as angles are, "
            f"got {x.dtype} on {x.device}."
        )
    return x.to(dtype)


def _unitary(impl: str) -> ModuleType:
    """The implementation that "auto" or a name stands for where there are phases."""
    match impl:
        case "reference":
            return reference
        case "auto" | "rounds":
            return autograd
        case _ if impl in IMPLS:
            raise ValueError(
                f"impl {impl!r} builds real matrices only; with phases use 'rounds', 'reference' "
                "or 'auto'."
            )
        case _:
            raise ValueError(f"impl must be one of {IMPLS}, got {impl!r}.")
