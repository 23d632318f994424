r"""Products of Householder reflections in compact WY form (CWY) and Stiefel frames (T-CWY).

With the unit vectors :math:`u_i = v_i / |v_i|` as the columns of U and
:math:`H(v) = I - 2\, v v^T / |v|^2`,

.. math:: H(v_1) \cdots H(v_k) = I - U S^{-1} U^T, \qquad
    S = \tfrac12 I + \mathrm{striu}(U^T U).

The rows of ``vectors`` are the :math:`v_i`. Their scale does not matter, but a zero vector
gives NaN: to refuse it, a GPU would have to be waited for. Half-precision vectors are turned
into reflections in float32, and autocast is off.
"""

import torch
from torch import Tensor

__all__ = ["cwy", "reflect", "stiefel_cwy"]


def cwy(vectors: Tensor) -> Tensor:
    r"""Orthogonal matrix :math:`H(v_1) \cdots H(v_k)`, of determinant :math:`(-1)^k`.

    :math:`H(v) = I - 2\, v v^T / |v|^2` reflects along v.

    Costs 3 k^2 n + 2 k n^2 flops: inner products, triangular solve, product.

    Args:
        vectors: Reflections, shape (..., k, n); leading axes are batch axes.

    Shape:
        vectors (..., k, n) to matrices (..., n, n)

    Returns:
        The matrices, in the dtype of ``vectors``.

    Raises:
        ValueError: If ``vectors`` is not real floating-point with at least two axes.

    Reference:
        Likhosherstov et al. (2021), CWY Parametrization, arXiv 2004.08675

    Example:
        >>> import torch
        >>> from flows.householder import cwy
        >>> cwy(torch.tensor([[1.0, 0.0], [3.0, 3.0]])).round().int().tolist()  # quarter turn
        [[0, 1], [-1, 0]]
    """
    _check_vectors(vectors)
    with _without_autocast(vectors):
        rows, gram = _unit_rows(vectors)
        matrix = _eye_like(rows) - rows.mT @ _solve(gram, rows)
    return matrix.to(vectors.dtype)


def stiefel_cwy(vectors: Tensor) -> Tensor:
    r"""First k columns of H(v_1) ... H(v_k): :math:`[I; 0] - U S^{-1} U_1^T` (T-CWY).

    U_1 holds the first k rows of U. Every frame of k orthonormal columns in n > k dimensions
    is reached. Costs 4 k^2 n + k^3 flops.

    Args:
        vectors: Reflections, shape (..., k, n), k at most n; leading axes are batch axes.

    Shape:
        vectors (..., k, n) to frames (..., n, k)

    Returns:
        Frames of orthonormal columns, in the dtype of ``vectors``.

    Raises:
        ValueError: If ``vectors`` is not real floating-point with at least two axes, or k
            exceeds n.

    Reference:
        Likhosherstov et al. (2021), CWY Parametrization, arXiv 2004.08675, section 3

    Example:
        >>> import torch
        >>> from flows.householder import stiefel_cwy
        >>> frame = stiefel_cwy(torch.randn(2, 5))
        >>> torch.allclose(frame.mT @ frame, torch.eye(2), atol=1e-5)
        True
    """
    _check_vectors(vectors)
    k, n = vectors.shape[-2:]
    if k > n:
        raise ValueError(
            f"vectors must be at most as many as they have entries, got {tuple(vectors.shape)}."
        )
    with _without_autocast(vectors):
        rows, gram = _unit_rows(vectors)
        frame = _eye_like(rows)[:, :k] - rows.mT @ _solve(gram, rows[..., :k])
    return frame.to(vectors.dtype)


def reflect(x: Tensor, vectors: Tensor, *, inverse: bool = False) -> Tensor:
    """Apply the reflections to the last axis of x: ``x @ cwy(vectors).mT``, without the matrix.

    Costs 2 k^2 n + 4 k n + k^2 flops, the last two for each row of x. For the same vectors in
    all rows, of which there are many, the matrix is cheaper once k exceeds about n / 2.

    Args:
        x: Shape (..., n).
        vectors: Reflections, shape (k, n) for all rows of x, or (..., k, n) with the leading
            axes of x for each row its own.
        inverse: Apply them in reverse order, which undoes them.

    Shape:
        x (..., n), vectors (k, n) or (..., k, n), to reflected x (..., n)

    Returns:
        Vectors of the dtype of x; computed in float32 or better.

    Raises:
        ValueError: If shapes or dtypes do not fit.

    Reference:
        Likhosherstov et al. (2021), CWY Parametrization, arXiv 2004.08675

    Example:
        >>> import torch
        >>> from flows.householder import reflect
        >>> x = torch.tensor([3.0, 4.0])
        >>> reflect(x, torch.tensor([[1.0, 0.0]]))
        tensor([-3.,  4.])
    """
    _check_vectors(vectors)
    n = vectors.shape[-1]
    if not x.is_floating_point() or x.ndim == 0 or x.shape[-1] != n:
        raise ValueError(
            f"x must be real floating-point numbers and end in {n} entries, as vectors do, "
            f"got {x.dtype} of shape {tuple(x.shape)}."
        )
    if vectors.ndim > 2 and vectors.shape[:-2] != x.shape[:-1]:
        raise ValueError(
            f"vectors must have shape (k, {n}) or the leading axes of x, {tuple(x.shape[:-1])}, "
            f"before these two, got {tuple(vectors.shape)}."
        )
    with _without_autocast(vectors):
        rows, gram = _unit_rows(vectors.to(torch.promote_types(x.dtype, vectors.dtype)))
        y = x.reshape(-1, n) if vectors.ndim == 2 else x.unsqueeze(-2)
        y = y.to(rows.dtype)
        # y S^-T from the lower triangle, y S^-1 from the upper one: gram is symmetric.
        along = torch.linalg.solve_triangular(
            2 * gram, 2 * y @ rows.mT, upper=inverse, left=False, unitriangular=True
        )
        y = y - along @ rows
    return y.reshape(x.shape).to(x.dtype)


def _check_vectors(vectors: Tensor) -> None:
    if not vectors.is_floating_point() or vectors.ndim < 2:
        raise ValueError(
            "vectors must be real floating-point numbers of shape (..., k, n), "
            f"got {vectors.dtype} of shape {tuple(vectors.shape)}."
        )


def _without_autocast(tensor: Tensor) -> torch.autocast:
    return torch.autocast(tensor.device.type, enabled=False)


def _unit_rows(vectors: Tensor) -> tuple[Tensor, Tensor]:
    """U^T and U^T U, in float32 or better."""
    vectors = vectors.to(torch.promote_types(vectors.dtype, torch.float32))
    rows = vectors / torch.linalg.vector_norm(vectors, dim=-1, keepdim=True)
    return rows, rows @ rows.mT


def _solve(gram: Tensor, b: Tensor) -> Tensor:
    """S^-1 b = (I + 2 striu(gram))^-1 2 b: the solver takes the diagonal as 1."""
    return torch.linalg.solve_triangular(2 * gram, 2 * b, upper=True, unitriangular=True)


def _eye_like(rows: Tensor) -> Tensor:
    return torch.eye(rows.shape[-1], dtype=rows.dtype, device=rows.device)
