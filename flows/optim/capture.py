"""What goes through layers in the backward passes of a step: their inputs and gradients."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from flows.optim.layers import MatrixLayer

__all__ = ["Capture", "Pass"]


class Pass:
    """What one backward pass brought a layer.

    Attributes:
        inputs: Inputs of the calls of the layer, each with the batch as its first axis.
        gradients: Gradients of the outputs of these calls.
        gradient: What the pass added to the gradient of the layer's matrix, (o, columns).
    """

    def __init__(self, inputs: list[Tensor], gradients: list[Tensor], gradient: Tensor) -> None:
        self.inputs = inputs
        self.gradients = gradients
        self.gradient = gradient

    @property
    def samples(self) -> int:
        return len(self.inputs[0]) if self.inputs else 0

    def first(self, samples: int) -> "Pass":
        """What the pass brought of its first samples."""
        inputs, gradients = (
            [tensor[:samples] for tensor in tensors] for tensors in (self.inputs, self.gradients)
        )
        return Pass(inputs, gradients, self.gradient)

    def divided_by(self, scale: float) -> "Pass":
        """The pass of a loss that is so much smaller."""
        if scale == 1.0:
            return self
        gradients = [gradient.float() / scale for gradient in self.gradients]
        return Pass(self.inputs, gradients, self.gradient / scale)


class Capture:
    """Hooks on layers in training mode, there between :meth:`start` and :meth:`stop` only.

    A forward hook keeps a call's input until the gradient of its output has come; a hook on the
    parameters sees when the pass has brought all of them. Calls in ``no_grad`` do not count, so
    that a pass that is repeated in the backward pass counts once. Nor do gradients of inputs
    alone, where no parameter gets one, and layers whose weight does not learn at the moment.

    Args:
        layers: Layers to watch.
        done: Called with a layer and its ``Pass`` at the end of every backward pass.
        restart: Called with a layer in its first pass of a step, before ``done``.
    """

    def __init__(
        self,
        layers: Sequence[MatrixLayer],
        done: Callable[[MatrixLayer, Pass], None],
        restart: Callable[[MatrixLayer], None],
    ) -> None:
        self.layers = layers
        self.done = done
        self.restart = restart
        self._handles: list[Any] = []

    def start(self) -> None:
        if not self._handles:
            for layer in self.layers:
                self._watch(layer)

    def stop(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _watch(self, layer: MatrixLayer) -> None:
        learning: list[Tensor] = []
        handles: list[Any] = []
        calls: list[_Call] = []
        before: list[Tensor] = []
        arrived: set[int] = set()

        def watch_parameters() -> None:
            """Those that learn now: parameters may be frozen and set free between passes."""
            now = [parameter for parameter in layer.parameters if parameter.requires_grad]
            if list(map(id, now)) == list(map(id, learning)):
                return
            for handle in handles:
                handle.remove()
                self._handles.remove(handle)
            learning[:] = now
            handles[:] = [p.register_post_accumulate_grad_hook(accumulated) for p in now]
            self._handles.extend(handles)

        def forward(module: Any, arguments: tuple, keywords: dict, output: Tensor) -> None:
            # A copy of the model has copies of its hooks.
            if not (module is layer.module and module.training and output.requires_grad):
                return
            watch_parameters()
            if not layer.weight.requires_grad:
                return
            if torch._C._current_graph_task_id() == -1:
                # No backward pass is under way: what is left is of one that met no parameter.
                calls.clear()
            x = (arguments[0] if arguments else keywords["input"]).detach()
            call = _Call(x.unsqueeze(0) if x.ndim < layer.weight.ndim else x)
            output.register_hook(lambda gradient: backward(call, gradient.detach()))

        def backward(call: _Call, gradient: Tensor) -> None:
            if not calls:
                arrived.clear()
                before.clear()
                if any(p.grad is not None and p.grad.any() for p in learning):
                    before.append(layer.gradient().clone())
            call.gradient = gradient.unsqueeze(0) if gradient.ndim < call.input.ndim else gradient
            if call not in calls:
                calls.append(call)

        def accumulated(parameter: Tensor) -> None:
            arrived.add(id(parameter))
            if len(arrived) < len(learning) or not layer.weight.requires_grad:
                return
            gradient = layer.gradient().detach()
            if before:
                gradient = gradient - before[0]
            else:
                self.restart(layer)
            found = Pass(
                [call.input for call in calls], [call.gradient for call in calls], gradient
            )
            for kept in (calls, before, arrived):
                kept.clear()
            with torch.no_grad(), torch.autocast(gradient.device.type, enabled=False):
                self.done(layer, found)

        self._handles.append(layer.module.register_forward_hook(forward, with_kwargs=True))
        watch_parameters()


class _Call:
    """A call of a layer: its input and, once it has come, the gradient of its output."""

    def __init__(self, x: Tensor) -> None:
        self.input = x
        self.gradient = x
