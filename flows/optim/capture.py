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
    that a pass that is repeated in the backward pass counts once.

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

    @property
    def running(self) -> bool:
        return bool(self._handles)

    def start(self) -> None:
        if self.running:
            return
        for layer in self.layers:
            self._watch(layer)

    def stop(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _watch(self, layer: MatrixLayer) -> None:
        inputs: list[Tensor] = []
        gradients: list[Tensor] = []
        before: list[Tensor] = []
        arrived: set[int] = set()

        def forward(module: Any, arguments: tuple, keywords: dict, output: Tensor) -> None:
            # A copy of the model has copies of its hooks.
            if module is layer.module and module.training and output.requires_grad:
                x = (arguments[0] if arguments else keywords["input"]).detach()
                output.register_hook(lambda gradient: backward(x, gradient.detach()))

        def backward(x: Tensor, gradient: Tensor) -> None:
            if not inputs:
                arrived.clear()
                if layer.weight.grad is not None and layer.weight.grad.any():
                    before.append(layer.gradient().clone())
            unbatched = x.ndim < layer.weight.ndim
            inputs.append(x.unsqueeze(0) if unbatched else x)
            gradients.append(gradient.unsqueeze(0) if unbatched else gradient)

        def accumulated(parameter: Tensor) -> None:
            arrived.add(id(parameter))
            if len(arrived) < len(layer.parameters):
                return
            gradient = layer.gradient().detach()
            if before:
                gradient = gradient - before[0]
            else:
                self.restart(layer)
            found = Pass(list(inputs), list(gradients), gradient)
            for kept in (inputs, gradients, before, arrived):
                kept.clear()
            with torch.no_grad(), torch.autocast(gradient.device.type, enabled=False):
                self.done(layer, found)

        self._handles.append(layer.module.register_forward_hook(forward, with_kwargs=True))
        for parameter in layer.parameters:
            self._handles.append(parameter.register_post_accumulate_grad_hook(accumulated))
