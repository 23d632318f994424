"""Where numbers stopped being finite: a run ends there, with the name of the layer."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from flows.random_state import random_state, set_random_state
from flows.transforms.base import Transform

__all__ = ["culprit", "guarded_log_prob", "non_finite_gradient"]


def guarded_log_prob(flow: nn.Module, batch: tuple[Tensor, ...], what: str) -> Tensor:
    """The log_prob of a batch, (batch,), if its mean is finite.

    Args:
        flow: Called with the batch.
        batch: Inputs, and context if there is one.
        what: What diverged if it is not, for the message.

    Raises:
        FloatingPointError: Naming the layer; the pass is run again for it, with the same
            random numbers.
    """
    device = batch[0].device
    state = random_state(device)
    log_prob = flow(*batch)
    mean = log_prob.mean()
    if len(log_prob) and not mean.isfinite():
        set_random_state(device, state)
        with torch.no_grad():
            found = culprit(flow, batch)
        advice = "" if found.startswith("the data") else "; lower model.lr or clip gradients"
        raise FloatingPointError(f"{what}: nll is {-mean.item()}: {found}{advice}")
    return log_prob


def culprit(flow: nn.Module, batch: tuple[Tensor, ...]) -> str:
    """The first thing on the way to log_prob that is not finite, in words."""
    for name, tensor in zip(("inputs", "context"), batch, strict=False):
        if not _is_finite(tensor):
            row, *position = (~tensor.isfinite()).nonzero()[0].tolist()
            value = tensor[(row, *position)].item()
            return f"the data: {name} of row {row}, feature {_index(position)}, is {value}"
    for name, parameter in flow.named_parameters():
        if not _is_finite(parameter):
            return f"{name} is not finite, spoiled by the step before"
    found: list[tuple[str, str]] = []

    def watch(path: str, module: nn.Module) -> Any:
        def look(module: nn.Module, arguments: Any, result: Any) -> None:
            bad = [name for name, tensor in _results(result) if not _is_finite(tensor)]
            if bad:
                found.append((path, bad[0]))

        return module.register_forward_hook(look)

    handles = [watch(path, module) for path, module in flow.named_modules() if path]
    try:
        log_prob = flow(*batch)
    finally:
        for handle in handles:
            handle.remove()
    if found:
        path, result = found[0]
        return f"the {result} of {_in_its_layer(flow, path)} are not finite"
    if _is_finite(log_prob):
        return "every layer is finite, but not the mean of log_prob"
    row = (~log_prob.isfinite()).nonzero()[0].item()
    base = getattr(flow, "distribution", None)
    last = "its log_prob" if base is None else f"{type(base).__name__}, the base distribution,"
    return f"the layers are finite, but {last} gives row {row} {log_prob[row].item()}"


def non_finite_gradient(flow: nn.Module) -> str | None:
    """The name of the first parameter whose gradient is not finite, None if all are."""
    gradients = {name: p.grad for name, p in flow.named_parameters() if p.grad is not None}
    if torch.nn.utils.get_total_norm(gradients.values()).isfinite():
        return None
    # A norm may overflow where every entry is finite.
    return next((name for name, grad in gradients.items() if not _is_finite(grad)), None)


def _is_finite(tensor: Tensor) -> bool:
    return bool(tensor.isfinite().all())


def _index(position: list[int]) -> str:
    return str(position[0] if len(position) == 1 else tuple(position))


def _results(result: Any) -> Iterable[tuple[str, Tensor]]:
    """What a module returned: the pair of a transform, or any tensors."""
    results = result if isinstance(result, tuple) else (result,)
    names = ("outputs", "logabsdet") if len(results) == 2 else ("outputs",) * len(results)
    return [pair for pair in zip(names, results, strict=True) if isinstance(pair[1], Tensor)]


def _in_its_layer(flow: nn.Module, path: str) -> str:
    """A module by its path and class, and the transform that it is part of."""
    module = flow.get_submodule(path)
    layer = path
    while layer and not isinstance(flow.get_submodule(layer), Transform):
        layer = layer.rpartition(".")[0]
    if layer in ("", path):
        return f"{path} ({type(module).__name__})"
    inner = path.removeprefix(f"{layer}.")
    transform = type(flow.get_submodule(layer)).__name__
    return f"{layer} ({transform}), in its {inner} ({type(module).__name__}),"
