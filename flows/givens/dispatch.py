"""The public door of ``flows.givens``: checks the arguments, chooses, calls."""

from types import ModuleType
from typing import Literal

from jaxtyping import Float
from torch import Tensor

from flows.givens import product, reference, rounds
from flows.givens.schedule import Schedule

__all__ = ["IMPLS", "matrix", "rotate"]

IMPLS = ("auto", "reference", "rounds", "product", "compiled")
Impl = Literal["auto", "reference", "rounds", "product", "compiled"]

# From this dimension on a shared matrix is built by products; below it the two cost alike.
PRODUCT_FROM = 64


def matrix(
    angles: Float[Tensor, "*batch num_angles"], schedule: Schedule, *, impl: Impl = "auto"
) -> Float[Tensor, "*batch dim dim"]:
    r"""Orthogonal matrix U of determinant +1: all rotations applied, first round first.

    The rotation of plane (i, j) by the angle t maps
    :math:`x_i \to \cos t\, x_i - \sin t\, x_j` and :math:`x_j \to \sin t\, x_i + \cos t\, x_j`.

    Args:
        angles: Radians, in the order of ``schedule.planes``; leading axes are batch axes.
        schedule: Planes in order of application.
        impl: ``"reference"`` (the definition), ``"rounds"``, ``"product"`` (schedules made by
            ``crossing`` or ``cosine_sine``), or ``"auto"``: products from dimension 64 on where
            they exist, else rounds.

    Returns:
        One matrix per set of angles, in the dtype and on the device of ``angles``.

    Raises:
        ValueError: If the number or type of angles, or ``impl``, does not fit.

    Reference:
        Hamze (2021), arXiv 2106.00003

    Example:
        >>> import math, torch
        >>> from flows import givens
        >>> givens.matrix(torch.tensor([math.pi / 2]), givens.crossing(2)).round().tolist()
        [[-0.0, -1.0], [1.0, -0.0]]
    """
    _check_angles(angles, schedule)
    match _chosen(impl, schedule, shared=True):
        case "reference":
            return reference.matrix(angles, schedule)
        case "rounds":
            return rounds.matrix(angles, schedule)
        case "product":
            return product.matrix(angles, schedule)
        case "compiled":
            return rounds.matrix(angles, schedule, engine=_compiled())
        case _:
            raise ValueError(f"impl must be one of {IMPLS}, got {impl!r}.")


def rotate(
    x: Float[Tensor, "*rows dim"],
    angles: Float[Tensor, "*batch num_angles"],
    schedule: Schedule,
    *,
    inverse: bool = False,
    impl: Impl = "auto",
) -> Float[Tensor, "*rows dim"]:
    """Apply all rotations to the last axis of x: ``x @ matrix(angles, schedule).mT``.

    Args:
        x: Vectors, shape (..., dim).
        angles: Radians; (num_angles,) for one rotation of all vectors, or
            (..., num_angles) with the leading axes of x for one rotation per vector.
        schedule: Planes in order of application.
        inverse: Undo the rotations instead.
        impl: As in :func:`matrix`.

    Returns:
        Rotated vectors, of the shape of x.

    Raises:
        ValueError: If shapes, dtypes, devices or ``impl`` do not fit.

    Reference:
        Hamze (2021), arXiv 2106.00003; the backward pass keeps only the output and the angles.
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
    if x.dtype != angles.dtype or x.device != angles.device:
        raise ValueError(
            "x and angles must share dtype and device, got "
            f"{x.dtype} on {x.device} and {angles.dtype} on {angles.device}."
        )
    match _chosen(impl, schedule, shared=angles.ndim == 1):
        case "reference":
            return reference.rotate(x, angles, schedule, inverse=inverse)
        case "rounds":
            return rounds.rotate(x, angles, schedule, inverse=inverse)
        case "product":
            return product.rotate(x, angles, schedule, inverse=inverse)
        case "compiled":
            return rounds.rotate(x, angles, schedule, inverse=inverse, engine=_compiled())
        case _:
            raise ValueError(f"impl must be one of {IMPLS}, got {impl!r}.")


def _chosen(impl: str, schedule: Schedule, *, shared: bool) -> str:
    """What "auto" stands for; anything else is obeyed."""
    if impl != "auto":
        return impl
    products = schedule.name.startswith(("crossing(", "cosine_sine("))
    return "product" if shared and products and schedule.dim >= PRODUCT_FROM else "rounds"


def _compiled() -> ModuleType:
    """The compiled engine, which needs numba; imported when used."""
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
