"""ProxProp: implicit steps on the weights of layers."""

from collections.abc import Collection, Sequence
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from flows.checks import check_at_least, check_positive
from flows.optim.capture import Pass
from flows.optim.layers import MatrixLayer
from flows.optim.preconditioned import Preconditioned
from flows.optim.statistics import damped_inverse, gram_of_inputs

__all__ = ["ProxProp"]


class ProxProp(Preconditioned):
    r"""Proximal steps: :math:`D = G\,(A A^T + I / \tau_\theta)^{-1}`, followed by SGD or Adam.

    G (o, i + 1) is the gradient of a linear or convolution layer's weight and bias, the columns
    of A (i + 1, B) what they multiply in the batch, a row of ones included; for a convolution
    every position is a column. That is the step which minimizes
    :math:`\tfrac12 |W A - Z|^2 + |W - W_0|^2 / (2 \tau_\theta)`, Z being the outputs after a
    gradient step of their own: directions of small inputs, in which a gradient hardly moves, take
    part in it. The gradients of the parameters stay as they are, so that clipping and gradients
    accumulated over passes or processes mean what they always do; :math:`A A^T` is summed
    over all of them.

    A A^T is a sum and G the gradient of a mean, so D becomes shorter as the batch grows. With
    ``normalize`` it is :math:`G\,(A A^T / B + I / \tau_\theta)^{-1}`, whatever the batch.

    Everything else is left to AdamW, as in :class:`~flows.optim.NGPlus`. The loss may see a
    weight through the layer's outputs only: one that also sees its log-det is refused at the
    first step.

    Args:
        module: The model, for example a Flow; its layers are observed in training mode.
        lr: Learning rate of the matrices, :math:`\tau`.
        tau_theta: :math:`\tau_\theta`; small for steps like a gradient's.
        solver: ``"exact"``, by Cholesky; or ``"cg"``, of conjugate gradients, a descent
            direction after any number of iterations.
        iterations: Of ``"cg"``.
        normalize: Whether A A^T is divided by the number of samples.
        follow: ``"sgd"`` or ``"adam"``, what follows the directions.
        momentum: Of SGD, in [0, 1).
        nesterov: Nesterov's momentum.
        weight_decay: Decoupled weight decay of the matrices; biases have none.
        adamw_lr: Learning rate of the other parameters; None for 1e-3, or for the ``lr`` of the
            ``DensityEstimator`` that this optimizer is made for.
        adamw_betas: Betas of AdamW, and of Adam where it follows.
        adamw_eps: Epsilon of both.
        adamw_weight_decay: Weight decay of the other parameters.
        max_dim: Largest o; layers with more outputs are AdamW's.
        exclude: Names of layers to leave to AdamW, or patterns such as ``"*.last"``.
        scaler: The ``torch.amp.GradScaler`` of the loss, for float16.
        process_group: Processes that train together; None for all.

    Raises:
        ValueError: If an option is out of range or the module has no such layer; at the first
            step, if the loss sees a weight itself.

    Reference:
        Frerix et al. (2018), Proximal Backpropagation, arXiv 1706.04638

    Example:
        >>> import torch
        >>> from flows.nets import MLP
        >>> from flows.optim import ProxProp
        >>> net = MLP(2, 1)
        >>> optimizer = ProxProp(net, lr=1.0, tau_theta=0.05)
        >>> net(torch.randn(64, 2)).square().mean().backward()
        >>> optimizer.step()
    """

    def __init__(
        self,
        module: nn.Module,
        lr: float = 1.0,
        *,
        tau_theta: float = 0.05,
        solver: Literal["exact", "cg"] = "exact",
        iterations: int = 3,
        normalize: bool = False,
        follow: Literal["sgd", "adam"] = "sgd",
        momentum: float = 0.95,
        nesterov: bool = True,
        weight_decay: float = 0.0,
        adamw_lr: float | None = None,
        adamw_betas: tuple[float, float] = (0.9, 0.999),
        adamw_eps: float = 1e-8,
        adamw_weight_decay: float = 0.0,
        max_dim: int = 1024,
        exclude: Collection[str] = (),
        scaler: "torch.amp.GradScaler | None" = None,
        process_group: "dist.ProcessGroup | None" = None,
    ) -> None:
        check_positive(tau_theta=tau_theta)
        check_at_least(1, iterations=iterations)
        if solver not in ("exact", "cg"):
            raise ValueError(f"solver must be 'exact' or 'cg', got {solver!r}.")
        self._solver = solver
        self._iterations = iterations
        self._normalize = normalize
        self._grams: dict[MatrixLayer, Tensor] = {}
        self._samples: dict[MatrixLayer, int] = {}
        matrices = {
            "lr": lr,
            "momentum": momentum,
            "nesterov": nesterov,
            "weight_decay": weight_decay,
            "tau_theta": tau_theta,
        }
        adamw = {
            "lr": adamw_lr,
            "betas": adamw_betas,
            "eps": adamw_eps,
            "weight_decay": adamw_weight_decay,
        }
        super().__init__(
            module,
            matrices,
            adamw=adamw,
            samples=False,
            follow=follow,
            max_dim=max_dim,
            exclude=exclude,
            scaler=scaler,
            process_group=process_group,
        )

    def _due(self, step: int) -> bool:
        return True

    def _forget(self, layer: MatrixLayer) -> None:
        self._grams.pop(layer, None)
        self._samples.pop(layer, None)

    def _observe(self, layer: MatrixLayer, found: Pass) -> None:
        if self.param_groups[0]["steps"] == 0:
            self._refuse_direct_terms(layer, found.divided_by(self._scale()))
        if found.samples:
            gram = gram_of_inputs(layer, found.inputs, found.gradients)
            self._grams[layer] = self._grams.get(layer, 0.0) + gram
            self._samples[layer] = self._samples.get(layer, 0) + found.samples

    def _refresh(self, layers: Sequence[MatrixLayer]) -> None:
        self._tell_unseen(layers, self._grams, "follows tau_theta times their gradients")
        grams = [
            self._grams.get(layer, layer.weight.new_zeros(layer.columns, layer.columns))
            for layer in layers
        ]
        counts = [
            gram.new_tensor([self._samples.get(layer, 0)])
            for layer, gram in zip(layers, grams, strict=True)
        ]
        # The gradients are means over all samples of all processes.
        totals = self._totals(grams + counts)
        self._grams.clear()
        self._samples.clear()
        for layer, gram, count in zip(
            layers, totals[: len(layers)], totals[len(layers) :], strict=True
        ):
            if not gram.isfinite().all():
                self._tell_non_finite(layer, "inputs", "follows tau_theta times its gradient")
                gram = torch.zeros_like(gram)
            self._grams[layer] = gram / count.clamp_min(1) if self._normalize else gram

    def _directions(self, gradients: dict[MatrixLayer, Tensor]) -> dict[MatrixLayer, Tensor]:
        directions = {}
        damping = 1 / self.param_groups[0]["tau_theta"]
        for layer, gradient in gradients.items():
            gram = self._grams.pop(layer)
            if self._solver == "exact":
                direction = gradient.to(gram.dtype) @ damped_inverse(gram, damping)
            else:
                direction = _conjugate_gradients(gram, damping, gradient, self._iterations)
            directions[layer] = direction if layer.mask is None else direction * layer.mask
        return directions


def _conjugate_gradients(
    gram: Tensor, damping: float, gradient: Tensor, iterations: int
) -> Tensor:
    """X of X (gram + damping I) = gradient, row by row, after so many iterations from zero."""
    rest = gradient.to(gram.dtype)
    found, ahead = torch.zeros_like(rest), rest
    size = rest.square().sum(1, keepdim=True)
    tiny = torch.finfo(rest.dtype).tiny
    for _ in range(iterations):
        image = ahead @ gram + damping * ahead
        step = size / (ahead * image).sum(1, keepdim=True).clamp_min(tiny)
        found = found + step * ahead
        rest = rest - step * image
        before, size = size, rest.square().sum(1, keepdim=True)
        ahead = rest + size / before.clamp_min(tiny) * ahead
    return found
