"""Linear and convolution layers as matrices: which layers there are, and what they multiply."""

import math
from collections import defaultdict
from collections.abc import Collection, Iterator
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from flows.checks import check_at_least

__all__ = ["MatrixLayer", "matrix_layers", "param_groups_for"]

# Numbers that a part of a batch may take at a time: 16 MiB in float32.
BUDGET = 2**22


class MatrixLayer:
    """A layer as a matrix (o, i), or (o, i + 1) with the bias as its last column.

    Args:
        name: Name of the layer in the model; that of its class if it is the model.
        module: ``nn.Linear``, ``nn.Conv1d`` or ``nn.Conv2d``, or a masked linear layer: a
            subclass of ``nn.Linear`` with a buffer ``mask`` of the shape of its weight, by
            which it multiplies the weight.
    """

    def __init__(self, name: str, module: nn.Module) -> None:
        self.name = name or type(module).__name__
        self.module = module
        # The parameters themselves: a repeated pass may lend the module copies.
        self.weight: nn.Parameter = module.weight
        bias = module.bias
        self.bias: nn.Parameter | None = bias if _learns(bias) else None

    @property
    def parameters(self) -> list[nn.Parameter]:
        return [self.weight] if self.bias is None else [self.weight, self.bias]

    @property
    def rows(self) -> int:
        """o, the number of outputs."""
        return len(self.weight)

    @property
    def columns(self) -> int:
        """i, or i + 1 with a bias."""
        return self.weight[0].numel() + (self.bias is not None)

    @property
    def mask(self) -> Tensor | None:
        """Entries that the layer uses, (o, columns), as 0 and 1 in the weight's dtype."""
        mask = getattr(self.module, "mask", None)
        if not isinstance(mask, Tensor) or not isinstance(self.module, nn.Linear):
            return None
        ones = mask.new_ones(self.rows, self.columns - mask.shape[1])
        return torch.cat([mask, ones], dim=1).to(self.weight.dtype)

    def matrix(self, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Weight and bias, or what is of their shapes, as one matrix (o, columns)."""
        weight = weight.flatten(1)
        if self.bias is None:
            return weight
        column = torch.zeros_like(self.bias) if bias is None else bias
        return torch.cat([weight, column.unsqueeze(1)], dim=1)

    def gradient(self) -> Tensor:
        """The gradient as a matrix, where there is one."""
        return self.matrix(self.weight.grad, None if self.bias is None else self.bias.grad)

    def split(self, matrix: Tensor) -> list[Tensor]:
        """A matrix (o, columns) in the shapes of :attr:`parameters`, each contiguous."""
        if self.bias is None:
            return [matrix.contiguous().view_as(self.weight)]
        return [matrix[:, :-1].contiguous().view_as(self.weight), matrix[:, -1].contiguous()]

    def parts(
        self, inputs: list[Tensor], gradients: list[Tensor], size: int
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """What the matrix multiplied, and the gradients of the products, for parts of a batch.

        Args:
            inputs: Of the calls of one pass, each with the batch as its first axis.
            gradients: Of the outputs of these calls.
            size: Samples in a part.

        Yields:
            Columns (batch, positions, columns) and gradients (batch, positions, o), in float32
            or better; the calls are positions of the same samples.
        """
        wide = torch.promote_types(self.weight.dtype, torch.float32)
        pieces = zip(
            *(tensor.split(size) for tensor in inputs),
            *(tensor.split(size) for tensor in gradients),
            strict=True,
        )
        for piece in pieces:
            columns = [self._columns(x.to(wide)) for x in piece[: len(inputs)]]
            found = [self._positions(g.to(wide)) for g in piece[len(inputs) :]]
            yield torch.cat(columns, dim=1), torch.cat(found, dim=1)

    def positions(self, gradients: list[Tensor]) -> int:
        """Number of products with the matrix for one sample, over all calls of a pass."""
        return sum(gradient[0].numel() for gradient in gradients) // self.rows

    def _columns(self, inputs: Tensor) -> Tensor:
        if isinstance(self.module, nn.Linear):
            columns = inputs.reshape(len(inputs), -1, inputs.shape[-1])
        else:
            columns = _unfold(self.module, inputs)
        if self.bias is None:
            return columns
        return functional.pad(columns, (0, 1), value=1.0)

    def _positions(self, gradient: Tensor) -> Tensor:
        if isinstance(self.module, nn.Linear):
            return gradient.reshape(len(gradient), -1, self.rows)
        return gradient.flatten(2).mT


def matrix_layers(
    module: nn.Module, *, max_dim: int = 1024, exclude: Collection[str] = ()
) -> list[MatrixLayer]:
    """The layers of a model whose weights an optimizer of matrices trains.

    These are linear, masked linear and convolution layers whose weight is a plain parameter
    that learns and that no other module has. Left out are convolutions in groups, those whose
    padding is not zeros, layers with more than ``max_dim`` outputs, and ``exclude``.

    Args:
        module: Model.
        max_dim: Largest number of outputs.
        exclude: Names of layers, or patterns such as ``"*.last"``.

    Raises:
        ValueError: If a pattern fits no layer: it would be a misspelling.
    """
    check_at_least(1, max_dim=max_dim)
    if isinstance(exclude, str):
        raise ValueError(f"exclude must be a list of names or patterns, got {exclude!r}.")
    owners: dict[int, int] = defaultdict(int)
    for part in module.modules():
        for parameter in part._parameters.values():
            owners[id(parameter)] += 1
    candidates = [
        MatrixLayer(name, part) for name, part in module.named_modules() if _is_matrix(part)
    ]
    for pattern in exclude:
        if not any(fnmatchcase(layer.name, pattern) for layer in candidates):
            raise ValueError(
                f"exclude must name linear or convolution layers, got {pattern!r}, "
                f"none of {[layer.name for layer in candidates][:20]}."
            )
    return [
        layer
        for layer in candidates
        if layer.rows <= max_dim
        and all(owners[id(parameter)] == 1 for parameter in layer.parameters)
        and not any(fnmatchcase(layer.name, pattern) for pattern in exclude)
    ]


def param_groups_for(
    module: nn.Module, *, max_dim: int = 1024, exclude: Collection[str] = ()
) -> list[dict[str, Any]]:
    """Parameters of a model in two groups: matrices of linear and convolution layers, and others.

    The first has weights and biases of :func:`matrix_layers`, the second everything else:
    angles, scales, splines, norms, embeddings, base distributions. Groups may be empty.

    Args:
        module: Model.
        max_dim: Largest number of outputs of a layer of the first group.
        exclude: Names of layers that go to the second group, or patterns such as ``"*.last"``.

    Returns:
        ``[{"params": [...], "method": "matrix"}, {"params": [...], "method": "adamw"}]``

    Example:
        >>> from flows.optim import param_groups_for
        >>> from flows.recipes import RotationSplineFlow
        >>> matrices, others = param_groups_for(RotationSplineFlow(2, layers=1))
        >>> len(matrices["params"]) > 0, others["method"]
        (True, 'adamw')
    """
    layers = matrix_layers(module, max_dim=max_dim, exclude=exclude)
    matrices = [parameter for layer in layers for parameter in layer.parameters]
    chosen = set(map(id, matrices))
    others = [parameter for parameter in module.parameters() if id(parameter) not in chosen]
    return [
        {"params": matrices, "method": "matrix"},
        {"params": others, "method": "adamw"},
    ]


def _is_matrix(module: nn.Module) -> bool:
    if not _learns(module._parameters.get("weight")):
        return False
    if isinstance(module, nn.Linear):
        if type(module).forward is nn.Linear.forward:
            return True
        mask = getattr(module, "mask", None)
        return isinstance(mask, Tensor) and mask.shape == module.weight.shape
    if isinstance(module, nn.Conv1d | nn.Conv2d):
        kind = nn.Conv1d if isinstance(module, nn.Conv1d) else nn.Conv2d
        plain = type(module).forward is kind.forward
        return plain and module.groups == 1 and module.padding_mode == "zeros"
    return False


def _learns(parameter: Any) -> bool:
    return (
        isinstance(parameter, nn.Parameter)
        and not isinstance(parameter, nn.UninitializedParameter)
        and parameter.requires_grad
        and parameter.numel() > 0
        and parameter.is_floating_point()
    )


def _unfold(module: nn.Conv1d | nn.Conv2d, inputs: Tensor) -> Tensor:
    """What the filters of a convolution see, (batch, positions, columns)."""
    kernel, stride, dilation = module.kernel_size, module.stride, module.dilation
    # Padding as the module holds it, for "same" as well: from the last axis to the first.
    inputs = functional.pad(inputs, module._reversed_padding_repeated_twice)
    if isinstance(module, nn.Conv1d):
        inputs = inputs.unsqueeze(2)
        kernel, stride, dilation = (1, *kernel), (1, *stride), (1, *dilation)
    if math.prod(kernel) == 1 and stride == (1, 1):
        return inputs.flatten(2).mT
    return functional.unfold(inputs, kernel, dilation, 0, stride).mT
