"""Chains of transforms that keep less for the backward pass than autograd would.

Checkpointing keeps the inputs of some transforms and repeats the rest. A reversible chain
recovers inputs from outputs as well, so that what it keeps does not grow with its length. Both
repeat a transform as it was: with the same parameters, noise and precision, and without updating
its statistics again.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from flows.random_state import noise_since, random_state, set_random_state
from flows.transforms.base import Transform

__all__ = ["run", "run_checkpointed", "run_reversible"]

Result = tuple[Tensor, Tensor]


def run(
    transforms: Iterable[Transform], inputs: Tensor, context: Tensor | None, inverse: bool
) -> Result:
    """Outputs and logabsdet of one transform after the other, in the given order."""
    total = inputs.new_zeros(inputs.shape[0])
    for transform in transforms:
        inputs, logabsdet = _step(transform, inputs, context, inverse)
        total = total + logabsdet
    return inputs, total


def run_checkpointed(
    transforms: Sequence[Transform],
    inputs: Tensor,
    context: Tensor | None,
    inverse: bool,
    keep_every: int,
) -> Result:
    """As :func:`run`; the backward pass repeats ``keep_every`` transforms at a time."""
    total = inputs.new_zeros(inputs.shape[0])
    for start in range(0, len(transforms), keep_every):
        part = _Repeatable(transforms[start : start + keep_every], inverse)
        inputs, logabsdet = checkpoint(part, inputs, context, use_reentrant=False)
        total = total + logabsdet
    return inputs, total


def run_reversible(
    transforms: Sequence[Transform],
    inputs: Tensor,
    context: Tensor | None,
    inverse: bool,
    keep_every: int,
    report: Callable[[Tensor], None],
) -> Result:
    """As :func:`run`; the backward pass recovers what is not kept, and reports its error."""
    names = [dict(transform.named_parameters()) for transform in transforms]
    # A parameter that several transforms share is one input.
    parameters = list({id(p): p for found in names for p in found.values()}.values())
    number = {id(p): i for i, p in enumerate(parameters)}
    numbers = [{name: number[id(p)] for name, p in found.items()} for found in names]
    chain = transforms, numbers, inverse, keep_every, report
    return _Reversible.apply(chain, inputs, context, *parameters)


class _Repeatable:
    """A chain that is called again in the backward pass, as if for the first time."""

    def __init__(self, transforms: Sequence[Transform], inverse: bool) -> None:
        self.chain = nn.ModuleList(transforms)
        self.inverse = inverse
        self.record: _Record | None = None

    def __call__(self, inputs: Tensor, context: Tensor | None) -> Result:
        arguments = inputs, context, self.inverse
        if self.record is not None:
            return self.record.repeat(self.parameters, run, *arguments)
        self.parameters = dict(self.chain.named_parameters())
        record = _Record(self.chain)
        result = run(self.chain, *arguments)
        self.record = record.done()
        return result


class _Reversible(torch.autograd.Function):
    """A chain that keeps its outputs, and the inputs of every ``keep_every``-th transform.

    The parameters are inputs here, so that whatever watches their gradients sees them. The
    backward pass differentiates one transform at a time with respect to copies of them.
    """

    @staticmethod
    def forward(
        ctx: Any, chain: tuple, inputs: Tensor, context: Tensor | None, *parameters: Tensor
    ) -> Result:
        transforms, _, inverse, keep_every, _ = ctx.chain = chain
        ctx.precision = _precision(inputs.device)
        ctx.noise, ctx.records, kept = [], [], []
        outputs, total = inputs, inputs.new_zeros(inputs.shape[0])
        with _autocast(ctx.precision):
            for k, transform in enumerate(transforms):
                if k % keep_every == 0:
                    kept.append(outputs)
                noise, record = random_state(inputs.device), _Record(transform)
                outputs, logabsdet = _step(transform, outputs, context, inverse)
                total = total + logabsdet
                # Kept only where it is needed: each takes kilobytes.
                ctx.noise.append(noise if noise_since(inputs.device, noise) else None)
                ctx.records.append(record.done())
        ctx.save_for_backward(outputs, context, *kept, *parameters)
        return outputs, total

    @staticmethod
    def backward(ctx: Any, grad_outputs: Tensor, grad_logabsdet: Tensor) -> tuple:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "a chain with memory='reversible' has no derivatives of derivatives "
                "(create_graph=True): take 'store' or 'checkpoint'."
            )
        transforms, numbers, inverse, keep_every, report = ctx.chain
        outputs, context, *saved = ctx.saved_tensors
        number_kept = -(-len(transforms) // keep_every)
        kept, parameters = saved[:number_kept], saved[number_kept:]
        _, wants_inputs, wants_context, *wants = ctx.needs_input_grad
        if context is not None:
            context = context.detach().requires_grad_(wants_context)
        totals: dict[str | int, Tensor] = {}  # of the context, and of parameters by number
        grad, error = grad_outputs, outputs.new_zeros(())
        for k in reversed(range(len(transforms))):
            copies = {
                name: parameters[i].detach().requires_grad_(wants[i])
                for name, i in numbers[k].items()
            }
            with (
                torch.enable_grad(),
                _autocast(ctx.precision),
                _repeated_noise(ctx.noise[k], outputs.device) as rewind,
            ):
                given = outputs, context, inverse, rewind
                inputs, *results = ctx.records[k].repeat(copies, _recover, *given)
            wanted = {"inputs": inputs} if inputs.requires_grad and (k or wants_inputs) else {}
            wanted |= {"context": context} if wants_context else {}
            wanted |= {i: copies[name] for name, i in numbers[k].items() if wants[i]}
            found = _gradients(results, (grad, grad_logabsdet), wanted)
            grad = found.pop("inputs", None)
            for key, gradient in found.items():
                totals[key] = totals[key] + gradient if key in totals else gradient
            recovered, outputs = outputs, inputs.detach()
            if k % keep_every == 0:
                exact = kept.pop()
                # The former sees errors that an inverse to grey levels rounds away.
                for pair in ((results[0].detach(), recovered), (outputs, exact)):
                    error = torch.maximum(error, _distance(*pair))
                outputs = exact
            if grad is None and k:
                grad = torch.zeros_like(outputs)
        report(error)
        return None, grad, totals.get("context"), *map(totals.get, range(len(parameters)))


def _step(transform: Transform, inputs: Tensor, context: Tensor | None, inverse: bool) -> Result:
    return transform.inverse(inputs, context) if inverse else transform(inputs, context)


def _recover(
    transform: Transform,
    outputs: Tensor,
    context: Tensor | None,
    inverse: bool,
    rewind: Callable[[], None],
) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs of a step from its outputs, and the step from them, differentiable."""
    rewind()
    if _knows_how_to_recover(transform):
        return transform.recover(outputs, context, inverse=inverse)
    with torch.no_grad():
        inputs, _ = _step(transform, outputs, context, not inverse)
    inputs = inputs.detach()
    inputs.requires_grad_(inputs.is_floating_point())
    rewind()
    return inputs, *_step(transform, inputs, context, inverse)


def _knows_how_to_recover(transform: Transform) -> bool:
    """Whether its ``recover`` was written for its ``forward`` and ``inverse``, as they are."""
    for kind in type(transform).__mro__:
        if "recover" in vars(kind):
            return True
        if "forward" in vars(kind) or "inverse" in vars(kind):
            return False
    return False


def _gradients(
    results: Sequence[Tensor], grads: Sequence[Tensor], wanted: dict[Any, Tensor]
) -> dict[Any, Tensor]:
    """Gradients of what is wanted and used, given results and their gradients."""
    pairs = [(y, g) for y, g in zip(results, grads, strict=True) if y.requires_grad]
    if not (pairs and wanted):
        return {}
    outputs, grads = zip(*pairs, strict=True)
    found = torch.autograd.grad(outputs, list(wanted.values()), grads, allow_unused=True)
    named = zip(wanted, found, strict=True)
    return {key: gradient for key, gradient in named if gradient is not None}


def _distance(found: Tensor, exact: Tensor) -> Tensor:
    """Largest difference, in units of the largest entry or 1."""
    if not exact.numel() or not exact.is_floating_point():
        return (found != exact).sum().double()
    return (found - exact).abs().max() / exact.abs().max().clamp_min(1)


# --- repeating a module as it was --------------------------------------------------------------


class _Call(nn.Module):
    """A function of a module as a module, so that ``functional_call`` can lend it tensors."""

    def __init__(self, module: nn.Module, function: Callable) -> None:
        super().__init__()
        self.module = module
        self.function = function

    def forward(self, *arguments: Any) -> Any:
        return self.function(self.module, *arguments)


class _Record:
    """How a module was when it was called, so that the call can be repeated."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.modes = [part.training for part in module.modules()]
        self.versions = _versions(module)
        self.updates = False

    def done(self) -> "_Record":
        """To be called after the call: has it updated buffers?"""
        before, self.versions = self.versions, _versions(self.module)
        self.updates = self.versions != before
        return self

    def repeat(self, parameters: dict[str, Tensor], function: Callable, *arguments: Any) -> Any:
        """``function(module, *arguments)`` with these parameters, in the modes of then.

        Where the first call updated buffers, this one works on copies of them.
        """
        if _versions(self.module) != self.versions:
            raise RuntimeError(
                f"buffers of {type(self.module).__name__} were changed between its forward and "
                "its backward pass, so that what it did cannot be repeated."
            )
        lent = {f"module.{name}": tensor for name, tensor in parameters.items()}
        if self.updates:
            buffers = self.module.named_buffers()
            lent |= {f"module.{name}": buffer.clone() for name, buffer in buffers}
        parts = list(self.module.modules())
        now = [part.training for part in parts]
        try:
            for part, mode in zip(parts, self.modes, strict=True):
                part.training = mode
            return functional_call(_Call(self.module, function), lent, arguments)
        finally:
            for part, mode in zip(parts, now, strict=True):
                part.training = mode


def _versions(module: nn.Module) -> list[tuple[int, int]]:
    """Changes with every update of a buffer, in place or by assignment."""
    return [(id(buffer), buffer._version) for buffer in module.buffers()]


def _precision(device: torch.device) -> dict[str, Any]:
    """The present autocast; in older torch its cache hands on casts that know no gradient."""
    return {
        "device_type": device.type,
        "dtype": torch.get_autocast_dtype(device.type),
        "enabled": torch.is_autocast_enabled(device.type),
        "cache_enabled": False,
    }


def _autocast(precision: dict[str, Any]) -> AbstractContextManager:
    """Nothing where it is off then and now: entering it takes as long as a small layer."""
    if not precision["enabled"] and not torch.is_autocast_enabled(precision["device_type"]):
        return nullcontext()
    return torch.autocast(**precision)


@contextmanager
def _repeated_noise(
    noise: tuple[Tensor, ...] | None, device: torch.device
) -> Iterator[Callable[[], None]]:
    """Gives what sets the generators to this state; at the end they are as they were."""
    before = random_state(device)
    try:
        yield lambda: None if noise is None else set_random_state(device, noise)
    finally:
        set_random_state(device, before)
