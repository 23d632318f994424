"""Angles from a matrix: the inverse of ``matrix``, in float64 and without gradients.

Each method takes a rotation and its schedule and returns the angles in the order of
``schedule.planes``. All but least squares are exact and cost O(n^3): ``cosine_sine`` splits
the matrix again and again, the others undo one turn after another, last or first ones first,
with the angle at which an entry off the diagonal vanishes.
"""

import math

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from flows.givens.schedule import Schedule

__all__ = ["recover"]

_TOLERANCE = 1e-4  # largest entry of Q^T Q - I that is accepted, as in Rotation(init=Q)


def recover(
    matrix: Float[Tensor, "*batch dim dim"],
    schedule: Schedule,
    *,
    starts: int = 32,
    generator: torch.Generator | None = None,
) -> Float[Tensor, "*batch num_angles"]:
    """Angles whose rotations give a matrix of determinant +1.

    Exact for the schedules cosine_sine, crossing, hurwitz and odd_even, and for round_robin if
    n is odd. For round_robin of even n, where no closed form is known, least squares from zero
    angles, then from random ones: practical up to about n = 24.

    Angles are not unique: others may come back than those that made the matrix. Small ones
    come back as they were, but for ``cosine_sine``.

    Args:
        matrix: Rotations, orthogonal to 1e-4: the angles are those of the nearest rotation.
            Leading axes are batch axes, worked through one matrix after another.
        schedule: As its constructor made it, without restrictions.
        starts: Least squares gives up after so many starts for one matrix.
        generator: Source of the random starts; by default one of its own, seeded alike in
            every call.

    Shape:
        matrix (..., dim, dim) to angles (..., num_angles)

    Returns:
        Radians from -pi to pi, in the order of ``schedule.planes``, in the dtype and on the
        device of ``matrix``.

    Raises:
        ValueError: If ``matrix`` is no rotation of the schedule's dimension, or if angles
            cannot be recovered for ``schedule``.
        RuntimeError: If least squares reached ``matrix`` from none of its starts.

    Reference:
        Golub and Van Loan, Matrix Computations, for the CS decomposition; Clements et al.
        (2016), arXiv 1603.08788, for odd_even; Hoffman, Raffenetti and Ruedenberg (1972),
        J. Math. Phys. 13, 528, for hurwitz; crossing: README.md

    Example:
        >>> import torch
        >>> from flows import givens
        >>> from flows.givens.recover import recover
        >>> angles = torch.tensor([0.3, -0.2, 0.1])
        >>> recover(givens.matrix(angles, givens.crossing(3)), givens.crossing(3))
        tensor([ 0.3000, -0.2000,  0.1000])
    """
    kind = schedule.name.removesuffix(f"({schedule.dim})")
    if kind not in _METHODS:
        raise ValueError(
            f"schedule must be one of {', '.join(_METHODS)}, without restrictions, for its "
            f"angles to be recovered, got {schedule}."
        )
    if starts < 1:
        raise ValueError(f"starts must be at least 1, got {starts}.")
    rotations = _nearest_rotations(matrix, schedule).reshape(-1, *matrix.shape[-2:]).numpy()
    if kind == "round_robin" and schedule.dim % 2 == 0:
        generator = torch.Generator().manual_seed(0) if generator is None else generator
        rows = [_least_squares(q, schedule, starts, generator) for q in rotations]
    else:
        rows = [_METHODS[kind](q, schedule) for q in rotations]
    angles = np.array(rows).reshape(*matrix.shape[:-2], schedule.num_angles)
    turns = np.round(angles / (2 * math.pi))
    return torch.from_numpy(angles - 2 * math.pi * turns).to(matrix)


def _nearest_rotations(matrix: Tensor, schedule: Schedule) -> Tensor:
    """The matrices in float64, checked and freed of rounding errors."""
    n = schedule.dim
    if not matrix.is_floating_point():
        raise ValueError(f"matrix must hold real floating-point numbers, got {matrix.dtype}.")
    if matrix.shape[-2:] != (n, n):
        raise ValueError(
            f"matrix must end in {n} rows and {n} columns, as {schedule} does, "
            f"got {tuple(matrix.shape)}."
        )
    q = matrix.detach().cpu().double()
    if not q.isfinite().all():
        raise ValueError("matrix must be finite, got NaN or infinite entries.")
    if q.numel() == 0:
        return q
    error = (q.mT @ q - torch.eye(n, dtype=q.dtype)).abs().max()
    if error > _TOLERANCE:
        raise ValueError(
            f"matrix must be orthogonal, Q^T Q = I to {_TOLERANCE:g}, "
            f"got a largest error of {error:.2g}."
        )
    if (torch.linalg.det(q) < 0).any():
        raise ValueError(
            "matrix must have determinant +1, as all products of rotations have, got -1. "
            "A reflection can stand in the base of a layer: Rotation(features, init=matrix)."
        )
    for _ in range(4):  # each step towards the nearest orthogonal matrix squares the error
        q = 1.5 * q - 0.5 * q @ (q.mT @ q)
    return q


def _undo(q: np.ndarray, i: np.ndarray, j: np.ndarray, angles: np.ndarray) -> None:
    """Un-rotate the rows of disjoint planes (i, j), in place."""
    c, s = np.cos(angles)[:, None], np.sin(angles)[:, None]
    q[i], q[j] = c * q[i] + s * q[j], c * q[j] - s * q[i]


def _rounds(schedule: Schedule) -> list[tuple[slice, np.ndarray, np.ndarray]]:
    """For each round the place of its angles among all, and its planes (i, j)."""
    i, j = schedule.planes.numpy().T
    ends = np.cumsum(schedule.round_sizes).tolist()
    spans = [slice(end - size, end) for end, size in zip(ends, schedule.round_sizes, strict=True)]
    return [(span, i[span], j[span]) for span in spans]


def _hurwitz(q: np.ndarray, schedule: Schedule) -> np.ndarray:
    """As in QR: plane (i, j) clears entry (j, i) and makes entry (i, i) positive.

    What is left is the identity, as its last entry is the determinant.
    """
    q = q.copy()
    angles = np.empty(schedule.num_angles)
    for span, i, j in reversed(_rounds(schedule)):
        angles[span] = np.arctan2(q[j, i], q[i, i])
        _undo(q, i, j, angles[span])
    return angles


def _crossing(q: np.ndarray, schedule: Schedule) -> np.ndarray:
    table = np.zeros_like(q)
    _uncross(q, table)
    i, j = schedule.planes.numpy().T
    return table[i, j]


def _uncross(q: np.ndarray, table: np.ndarray) -> None:
    """Write the angle of plane (i, j) into entry (i, j) of the table."""
    n = len(q)
    if n == 1:
        return
    h = n // 2
    # Turning the planes (a, b) back must take the span of the first h columns to the first h
    # axes. In a basis of it whose upper rows are triangular, (a, b) clears (b, a) for good.
    basis = _triangular_basis(q[:h, :h])
    q = np.concatenate([q[:, :h] @ basis.T, q[:, h:]], axis=1)
    for distance in range(n - 1, 0, -1):
        a = np.arange(max(0, h - distance), min(h, n - distance))
        b = a + distance
        table[a, b] = np.arctan2(q[b, a], q[a, a])
        _undo(q, a, b, table[a, b])
    upper, lower = q[:h, :h] @ basis, q[h:, h:]
    if np.linalg.det(upper) < 0:
        # So is the other: half a turn more in the plane that acts first negates a row of each.
        table[h - 1, h] += math.pi
        upper[-1] *= -1
        lower[0] *= -1
    _uncross(upper, table[:h, :h])
    _uncross(lower, table[h:, h:])


def _triangular_basis(q: np.ndarray) -> np.ndarray:
    """Orthogonal C with q C^T upper triangular, no diagonal entry negative."""
    rows, triangle = np.linalg.qr(q[::-1].T)
    return np.where(triangle.diagonal() < 0, -rows, rows).T[::-1]


def _cosine_sine(q: np.ndarray, schedule: Schedule) -> np.ndarray:
    table = np.zeros((len(schedule), schedule.dim))
    _split(q, table)
    return table[schedule.round_of_plane.numpy(), schedule.planes[:, 0].numpy()]


def _split(q: np.ndarray, table: np.ndarray) -> None:
    """Write the angle of plane (i, j) in round r into entry (r, i) of the table."""
    from scipy.linalg import cossin  # 0.2 s that importing flows should not take

    n = len(q)
    if n == 1:
        return
    if n == 2:
        table[0, 0] = math.atan2(q[1, 0], q[0, 0])
        return
    p = (n + 1) // 2
    (u1, u2), angles, (v1, v2) = cossin(q, p=p, q=p, separate=True)
    if n % 2:  # scipy puts the axis without a partner first, we put it last
        u1, v1 = np.roll(u1, -1, axis=1), np.roll(v1, -1, axis=0)
    # The first axis takes the signs that make all four factors rotations; their product is +1,
    # so that the first plane still turns.
    a, b, c, d = (math.copysign(1, np.linalg.det(factor)) for factor in (u1, u2, v1, v2))
    u1[:, 0] *= a
    u2[:, 0] *= b
    v1[0] *= c
    v2[0] *= d
    middle = 2 ** (p - 1).bit_length() - 1  # the round between those of right and left factors
    table[middle, : n - p] = angles
    table[middle, 0] = math.atan2(b * math.sin(angles[0]) * c, a * math.cos(angles[0]) * c)
    _split(v1, table[:middle, :p])
    _split(v2, table[:middle, p:])
    _split(u1, table[middle + 1 :, :p])
    _split(u2, table[middle + 1 :, p:])


def _odd_even(q: np.ndarray, schedule: Schedule) -> np.ndarray:
    return _brick_wall(q, schedule, list(range(schedule.dim)))


def _round_robin(q: np.ndarray, schedule: Schedule) -> np.ndarray:
    """For odd n the circle is a brick wall of wires that start in another order."""
    n = schedule.dim
    return _brick_wall(q, schedule, [n - 1 - p if p % 2 else p for p in reversed(range(n))])


def _brick_wall(q: np.ndarray, schedule: Schedule, wires: list[int]) -> np.ndarray:
    """Clements' order: diagonal after diagonal, cleared by the first turns or the last ones.

    ``wires`` are the axes in the order in which the first round pairs neighbours. Turns that
    act first mix columns, turns that act last mix rows; two wires that turned change places.
    Each turn clears one entry of its plane and makes one on the diagonal positive. But for one
    axis that is the last to happen to it, so that the identity is left, as in QR.
    """
    from scipy.linalg.blas import drot  # as in _split

    n = schedule.dim
    q = q.copy()
    flat, table = q.ravel(), np.zeros_like(q)
    columns, rows = wires, wires[::-1]
    for step in range(n - 1):
        for k in range(step + 1):
            if step % 2 == 0:
                place = slice(step - k, step - k + 2)
                keep, clear = columns[place]
                columns[place] = clear, keep
                angle, start, stride = math.atan2(q[keep, clear], q[keep, keep]), 1, n
            else:
                place = slice(n - 2 - step + k, n - step + k)
                clear, keep = rows[place]
                rows[place] = keep, clear
                angle, start, stride = math.atan2(q[clear, keep], q[keep, keep]), n, 1
            # Of the two columns or rows, keep <- c keep + s clear, clear <- c clear - s keep.
            x, y = start * keep, start * clear
            drot(flat, flat, math.cos(angle), math.sin(angle), n, x, stride, y, stride, 1, 1)
            if keep < clear:
                table[keep, clear] = angle if step % 2 else -angle
            else:
                table[clear, keep] = -angle if step % 2 else angle
    i, j = schedule.planes.numpy().T
    return table[i, j]


def _least_squares(
    q: np.ndarray, schedule: Schedule, starts: int, generator: torch.Generator
) -> np.ndarray:
    best = math.inf
    for start in range(starts):
        angles = np.zeros(schedule.num_angles)
        if start > 0:
            uniform = torch.rand(len(angles), generator=generator, dtype=torch.float64).numpy()
            angles = math.pi * (2 * uniform - 1)
        angles, residual = _levenberg_marquardt(q, angles, schedule)
        if residual <= 1e-13 * len(q):
            return angles
        best = min(best, residual)
    raise RuntimeError(
        f"least squares found no angles of {schedule} for the matrix: the best of {starts} starts "
        f"left a residual of {best:.2g} (Frobenius norm). Try more starts, or a schedule of "
        "exact recovery, such as crossing."
    )


def _levenberg_marquardt(
    q: np.ndarray, angles: np.ndarray, schedule: Schedule
) -> tuple[np.ndarray, float]:
    """Angles at a local minimum of |U - Q|, U their matrix, and its value.

    Derivatives are taken in the frame of U, where that by an angle is a unit bivector and the
    way to Q is the skew part of U^T Q. Damping as in Madsen, Nielsen and Tingleff (2004),
    Methods for Non-Linear Least Squares Problems.
    """
    n, rounds = len(q), _rounds(schedule)
    upper = np.triu_indices(n, 1)

    def linearize(angles: np.ndarray) -> tuple[np.ndarray, np.ndarray, float]:
        """U, for each angle the upper triangle of U^T dU, and |U - Q|."""
        u, jacobian = np.eye(n), np.empty((len(angles), len(angles)))
        a, b = upper
        for span, i, j in rounds:
            x, y = u[i], u[j]
            jacobian[span] = y[:, a] * x[:, b] - x[:, a] * y[:, b]
            _undo(u, i, j, -angles[span])
        return u, jacobian, float(np.linalg.norm(u - q))

    u, jacobian, residual = linearize(angles)
    damping, growth = 1e-2, 2.0
    for _ in range(500):
        way = u.T @ q
        gradient = jacobian @ (way - way.T)[upper] / 2
        if residual <= 1e-14 * n or np.linalg.norm(gradient) <= 1e-7 * residual:
            break
        normal = jacobian @ jacobian.T + damping * np.eye(len(angles))
        step = np.linalg.solve(normal, gradient)
        ahead = linearize(angles + step)
        if ahead[2] < residual:
            gain = (residual**2 - ahead[2] ** 2) / (2 * step @ (gradient + damping * step))
            damping, growth = damping * max(1 / 3, 1 - (2 * gain - 1) ** 3), 2.0
            angles = angles + step
            u, jacobian, residual = ahead
        else:
            damping, growth = damping * growth, growth * 2
    return angles, residual


_METHODS = {
    "cosine_sine": _cosine_sine,
    "crossing": _crossing,
    "hurwitz": _hurwitz,
    "odd_even": _odd_even,
    "round_robin": _round_robin,
}
