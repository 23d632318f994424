"""Class labels as a context."""

import torch
from torch import Tensor, nn

from flows.checks import check_at_least

__all__ = ["OneHot"]


class OneHot(nn.Module):
    """Class labels to one-hot vectors in the module's dtype: an ``embedding_net`` of a flow.

    Args:
        classes: Number of classes, at least 1; labels are 0 ... classes - 1.

    Shape:
        integers (batch,) to (batch, classes)

    Raises:
        ValueError: For labels that are no integers, out of range, or not (batch,).

    Example:
        >>> import torch
        >>> from flows.nets import OneHot
        >>> OneHot(3)(torch.tensor([2, 0]))
        tensor([[0., 0., 1.],
                [1., 0., 0.]])
    """

    def __init__(self, classes: int) -> None:
        super().__init__()
        check_at_least(1, classes=classes)
        self.classes = classes
        # The dtype of the outputs: it follows .double().
        self.register_buffer("anchor", torch.zeros(()), persistent=False)

    def forward(self, labels: Tensor) -> Tensor:
        kind = labels.dtype
        if kind == torch.bool or kind.is_floating_point or kind.is_complex or labels.ndim != 1:
            raise ValueError(
                f"labels must be integers of shape (batch,), got {kind} {tuple(labels.shape)}."
            )
        if torch.compiler.is_exporting():
            inside = ((labels >= 0) & (labels < self.classes)).all()
            # A branch on values cannot be exported; this stays in the program as an assertion.
            torch._assert_async(inside, f"labels must be 0 to {self.classes - 1}.")
        elif labels.numel() and not (labels.min() >= 0 and labels.max() < self.classes):
            raise ValueError(
                f"labels must be 0 to {self.classes - 1}, got {labels.min()} to {labels.max()}."
            )
        classes = torch.arange(self.classes, device=labels.device)
        return (labels.unsqueeze(1) == classes).to(self.anchor.dtype)

    def extra_repr(self) -> str:
        return f"classes={self.classes}"
