"""A chain of transforms."""

from collections.abc import Iterable

from torch import Tensor, nn

from flows.transforms.base import Transform, preserves_volume

__all__ = ["Composite"]


class Composite(Transform):
    r"""The chain :math:`f_k \circ \dots \circ f_1` of k transforms, ours or nflows'.

    Args:
        transforms: In the order of ``forward``, data to noise.

    Shape:
        As the transforms say; logabsdet (batch,) is the sum of theirs.
    """

    def __init__(self, transforms: Iterable[Transform]) -> None:
        super().__init__()
        self.transforms = nn.ModuleList(transforms)

    @property
    def volume_preserving(self) -> bool:
        return all(map(preserves_volume, self.transforms))

    def forward(self, inputs: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        total = inputs.new_zeros(inputs.shape[0])
        for transform in self.transforms:
            inputs, logabsdet = transform(inputs, context)
            total = total + logabsdet
        return inputs, total

    def inverse(self, inputs: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        total = inputs.new_zeros(inputs.shape[0])
        for transform in reversed(self.transforms):
            inputs, logabsdet = transform.inverse(inputs, context)
            total = total + logabsdet
        return inputs, total
