r"""Sums over per-sample gradients :math:`G_b = \sum_t g_{bt} a_{bt}^T` of a layer's matrix."""

from collections.abc import Iterator

import torch
from torch import Tensor

from flows.optim.layers import BUDGET, MatrixLayer

__all__ = ["damped_inverse", "gram_of_inputs", "per_sample", "second_moment", "total"]


def second_moment(
    layer: MatrixLayer, inputs: list[Tensor], gradients: list[Tensor]
) -> tuple[Tensor, Tensor]:
    r"""Sums over a batch of :math:`G_b G_b^T`, (o, o), and of :math:`G_b`, (o, columns).

    :math:`G_b G_b^T = g_b^T (a_b a_b^T) g_b` needs the positions' inner products, or the
    :math:`G_b` themselves where those are fewer; either for a few samples at a time, so that
    memory does not grow with the batch. A layer that is called once per sample needs neither:
    there the sum is :math:`\sum_b |a_b|^2 g_b g_b^T`.

    Args:
        layer: The layer.
        inputs: Of its calls in one pass.
        gradients: Of the outputs of these calls.
    """
    _check_samples_match(layer, inputs)
    positions = layer.positions(gradients)
    rows, columns = layer.rows, layer.columns
    whole = layer.mask is not None or positions**2 > rows * columns
    moment = total = 0.0
    per_position = rows + columns
    if whole:
        size = rows * columns + positions * per_position
    else:
        size = positions * (positions + 2 * per_position)
    for a, g in layer.parts(inputs, gradients, max(1, BUDGET // size)):
        if whole:
            matrices = _matrices(layer, a, g)
            total = total + matrices.sum(0)
            flat = matrices.transpose(0, 1).flatten(1)
            moment = moment + flat @ flat.mT
            continue
        flat = g.flatten(0, 1)
        total = total + flat.mT @ a.flatten(0, 1)
        if positions == 1:
            weighted = a.square().sum(-1, keepdim=True) * g
        else:
            weighted = (a @ a.mT) @ g
        moment = moment + flat.mT @ weighted.flatten(0, 1)
    return moment, total


def per_sample(
    layer: MatrixLayer, inputs: list[Tensor], gradients: list[Tensor]
) -> Iterator[Tensor]:
    """The :math:`G_b` of a few samples at a time, (samples, o, columns)."""
    _check_samples_match(layer, inputs)
    size = layer.rows * layer.columns + layer.positions(gradients) * (layer.rows + layer.columns)
    for a, g in layer.parts(inputs, gradients, max(1, BUDGET // size)):
        yield _matrices(layer, a, g)


def total(layer: MatrixLayer, inputs: list[Tensor], gradients: list[Tensor]) -> Tensor:
    """Sum of the :math:`G_b` over the calls of a pass, (o, columns)."""
    found = sum(g.mT @ a for a, g in _flat(layer, inputs, gradients))
    return found if layer.mask is None else found * layer.mask


def gram_of_inputs(layer: MatrixLayer, inputs: list[Tensor], gradients: list[Tensor]) -> Tensor:
    r"""Sum of :math:`a_{bt} a_{bt}^T` over the calls of a pass, (columns, columns)."""
    return sum(a.mT @ a for a, _ in _flat(layer, inputs, gradients))


def damped_inverse(matrix: Tensor, damping: float) -> Tensor:
    """(matrix + damping I)^-1 of a positive semidefinite matrix, by Cholesky in float64."""
    wide = matrix if matrix.device.type == "mps" else matrix.double()
    # As much as rounding may have taken from the smallest eigenvalues of a large one.
    damping = damping + torch.finfo(matrix.dtype).eps * wide.trace()
    factor = torch.linalg.cholesky(wide + damping * torch.eye(len(wide)).to(wide))
    return torch.cholesky_inverse(factor).to(matrix.dtype)


def _flat(
    layer: MatrixLayer, inputs: list[Tensor], gradients: list[Tensor]
) -> Iterator[tuple[Tensor, Tensor]]:
    """Columns and gradients of each call, some samples at a time, positions as rows."""
    for x, gradient in zip(inputs, gradients, strict=True):
        size = layer.positions([gradient]) * (layer.rows + layer.columns) if len(x) else 1
        for a, g in layer.parts([x], [gradient], max(1, BUDGET // max(1, size))):
            yield a.flatten(0, 1), g.flatten(0, 1)


def _check_samples_match(layer: MatrixLayer, inputs: list[Tensor]) -> None:
    sizes = [len(x) for x in inputs]
    if len(set(sizes)) > 1:
        raise ValueError(
            f"{layer.name} was called for batches of {', '.join(map(str, sizes))} samples in one "
            "backward pass, so gradients of single samples are unknown: take backward passes of "
            f"their own, or exclude {layer.name!r}."
        )


def _matrices(layer: MatrixLayer, a: Tensor, g: Tensor) -> Tensor:
    matrices = g.mT @ a
    return matrices if layer.mask is None else matrices * layer.mask.to(matrices.dtype)
