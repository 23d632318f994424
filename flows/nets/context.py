"""What conditioners ask of a context."""

from torch import Tensor

__all__ = ["check_context"]


def check_context(context: Tensor | None, features: int) -> None:
    """Refuse a context that is missing or not (batch, features)."""
    if context is None or context.ndim != 2 or context.shape[-1] != features:
        came = None if context is None else tuple(context.shape)
        raise ValueError(f"context must have {features} features, got {came}.")
