"""What a model is conditional on: columns of numbers, or class labels."""

from torch import nn

from flows.checks import check_at_least
from flows.nets import OneHot, StandardizedContext

__all__ = ["embed_context"]


def embed_context(context_features: int, classes: int | None) -> tuple[nn.Module | None, int]:
    """The ``embedding_net`` of a flow, and the width of what its conditioners then see.

    Args:
        context_features: Columns of a context (batch, context_features) in their own units;
            0 for none.
        classes: Number of classes whose labels, integers (batch,), are the context; None for
            none.
    """
    check_at_least(0, context_features=context_features)
    if classes is None:
        if not context_features:
            return None, 0
        return StandardizedContext(context_features), context_features
    if context_features:
        raise ValueError(
            f"the context must be columns or labels, got context_features={context_features} "
            f"and classes={classes}."
        )
    return OneHot(classes), classes
