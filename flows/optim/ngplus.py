"""NG+: a one-sided generalized Fisher matrix of per-sample gradients, kept for many steps."""

from collections.abc import Collection, Sequence
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from flows.checks import check_at_least, check_positive
from flows.optim.capture import Pass
from flows.optim.layers import MatrixLayer
from flows.optim.preconditioned import Preconditioned, refreshes
from flows.optim.statistics import damped_inverse, second_moment

__all__ = ["NGPlus"]


class NGPlus(Preconditioned):
    r"""Natural gradient of matrices: :math:`D = (L + \sqrt{\lambda} I)^{-1} G`, then SGD.

    G (o, i + 1) is the gradient of a linear or convolution layer's weight and bias, and

    .. math:: L = \frac1B \sum_b G_b G_b^T

    the second moment of the gradients of single samples, an (o, o) matrix. It is measured at
    the steps 0, 1, 2, 3, 4, 6, 9, 13, ... and then every ``refresh_every`` steps, averaged as
    :math:`L \leftarrow \beta L + (1 - \beta) L_{new}`, and kept in between, so that most steps
    cost one more product of an (o, o) matrix per layer. The early refreshes are there because
    conditioners of flows start at zero outputs, where the first gradients say nothing of later
    ones. The published code divides L of a convolution by the root of its positions in
    addition; here L is the same for both.

    Everything else, angles and splines included, is left to AdamW, and so are convolutions in
    groups, layers that share a weight, and ``exclude``. A layer whose weight is frozen later
    waits. A term of the loss that sees a weight itself, such as its own log-det, counts as a
    part of every sample's gradient. Between processes L is averaged, at refreshes only.

    The loss is a mean over samples that do not interact: a batch norm is refused. Calls of a
    layer in one backward pass are of the same samples. Backward passes before one step are of
    different samples, each with its loss divided by their number, and L is that of all samples.
    A model is compiled, if at all, after its optimizer is made, for the hooks to be seen.

    Args:
        module: The model, for example a Flow; its layers are observed in training mode.
        lr: Learning rate of the matrices. Its scale is not that of Adam's.
        momentum: Of SGD, in [0, 1).
        nesterov: Nesterov's momentum.
        weight_decay: Decoupled weight decay of the matrices; biases have none.
        damping: :math:`\lambda`, in units of the fourth power of a gradient.
        curvature_decay: :math:`\beta`, the weight of the old L, in [0, 1).
        refresh_every: Steps for which L is kept.
        statistic: ``"per_sample"``, or ``"mean_grad"`` for :math:`L = G G^T` of the step's own
            gradient, which needs no hooks.
        adamw_lr: Learning rate of the other parameters; None for 1e-3, or for the ``lr`` of the
            ``DensityEstimator`` that this optimizer is made for.
        adamw_betas: Betas of AdamW.
        adamw_eps: Epsilon of AdamW.
        adamw_weight_decay: Weight decay of the other parameters.
        max_dim: Largest o; layers with more outputs are AdamW's.
        exclude: Names of layers to leave to AdamW, or patterns such as ``"*.last"``.
        scaler: The ``torch.amp.GradScaler`` of the loss, for float16.
        process_group: Processes that train together; None for all.

    Raises:
        ValueError: If an option is out of range, the module has no such layer, or samples
            interact.

    Reference:
        Yang et al. (2021), arXiv 2106.07454

    Example:
        >>> import torch
        >>> from flows.optim import NGPlus
        >>> from flows.recipes import RotationSplineFlow
        >>> flow = RotationSplineFlow(features=2, layers=2)
        >>> optimizer = NGPlus(flow, lr=0.1)
        >>> (-flow.log_prob(torch.randn(64, 2)).mean()).backward()
        >>> optimizer.step()
    """

    kept = ("curvature",)

    def __init__(
        self,
        module: nn.Module,
        lr: float = 0.1,
        *,
        momentum: float = 0.9,
        nesterov: bool = False,
        weight_decay: float = 0.0,
        damping: float = 1.0,
        curvature_decay: float = 0.1,
        refresh_every: int = 100,
        statistic: Literal["per_sample", "mean_grad"] = "per_sample",
        adamw_lr: float | None = None,
        adamw_betas: tuple[float, float] = (0.9, 0.999),
        adamw_eps: float = 1e-8,
        adamw_weight_decay: float = 0.0,
        max_dim: int = 1024,
        exclude: Collection[str] = (),
        scaler: "torch.amp.GradScaler | None" = None,
        process_group: "dist.ProcessGroup | None" = None,
    ) -> None:
        check_positive(damping=damping)
        check_at_least(1, refresh_every=refresh_every)
        if not 0 <= curvature_decay < 1:
            raise ValueError(f"curvature_decay must lie in [0, 1), got {curvature_decay}.")
        if statistic not in ("per_sample", "mean_grad"):
            raise ValueError(f"statistic must be 'per_sample' or 'mean_grad', got {statistic!r}.")
        self._per_sample = statistic == "per_sample"
        self._sums: dict[MatrixLayer, _Sums] = {}
        self._inverses: dict[MatrixLayer, Tensor] = {}
        matrices = {
            "lr": lr,
            "momentum": momentum,
            "nesterov": nesterov,
            "weight_decay": weight_decay,
            "damping": damping,
            "curvature_decay": curvature_decay,
            "refresh_every": refresh_every,
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
            samples=self._per_sample,
            max_dim=max_dim,
            exclude=exclude,
            scaler=scaler,
            process_group=process_group,
        )

    def curvature(self) -> dict[str, Tensor]:
        """L by layer, (o, o), of the layers that have one by now."""
        found = {layer.name: self.state[layer.weight].get("curvature") for layer in self.layers}
        return {name: moment for name, moment in found.items() if moment is not None}

    def _due(self, step: int) -> bool:
        return self._per_sample and refreshes(step, self.param_groups[0]["refresh_every"])

    def _forget(self, layer: MatrixLayer) -> None:
        self._sums.pop(layer, None)

    def _observe(self, layer: MatrixLayer, found: Pass) -> None:
        sums = self._sums.setdefault(layer, _Sums())
        sums.add(layer, found, self._scale())

    def _refresh(self, layers: Sequence[MatrixLayer]) -> None:
        group = self.param_groups[0]
        if not refreshes(group["steps"], group["refresh_every"]):
            return
        if self._per_sample:
            seen = [layer for layer, sums in self._sums.items() if sums.samples]
            self._tell_unseen(layers, seen, "takes the mean gradient instead of those of samples")
        totals = self._totals([self._moment(layer) for layer in layers])
        decay = group["curvature_decay"]
        for layer, moment in zip(layers, totals, strict=True):
            if not moment.isfinite().all():
                self._tell_non_finite(layer)
                continue
            state, moment = self.state[layer.weight], moment / self._processes
            if "curvature" in state:
                moment = decay * state["curvature"] + (1 - decay) * moment
            state["curvature"], state["damping"] = moment, group["damping"]
            self._inverses.pop(layer, None)
        self._sums.clear()

    def _moment(self, layer: MatrixLayer) -> Tensor:
        """L of this step and process."""
        if layer in self._sums and self._sums[layer].samples:
            return self._sums[layer].moment()
        gradient = layer.gradient()
        gradient = gradient.to(torch.promote_types(gradient.dtype, torch.float32))
        return gradient @ gradient.mT

    def _directions(self, gradients: dict[MatrixLayer, Tensor]) -> dict[MatrixLayer, Tensor]:
        directions = {}
        for layer, gradient in gradients.items():
            inverse = self._inverse(layer)
            if inverse is not None:
                direction = inverse @ gradient
                directions[layer] = direction if layer.mask is None else direction * layer.mask
        return directions

    def _inverse(self, layer: MatrixLayer) -> Tensor | None:
        """(L + sqrt(damping) I)^-1, in the weight's dtype."""
        state = self.state[layer.weight]
        if layer not in self._inverses and "curvature" in state:
            inverse = damped_inverse(state["curvature"], state["damping"] ** 0.5)
            self._inverses[layer] = inverse.to(layer.weight.dtype)
        return self._inverses.get(layer)

    def load_state_dict(self, state_dict: dict) -> None:
        super().load_state_dict(state_dict)
        self._inverses.clear()


class _Sums:
    """Sums over the samples of a step, one backward pass after the other.

    A pass of B samples brings gradients of its mean loss; times B and the number of passes
    they are those of the samples' own losses, h_b. What the gradient holds besides, d, is a
    term of the loss that every sample has: G_b = h_b + d.
    """

    def __init__(self) -> None:
        self.passes = self.samples = 0
        self.moments = self.totals = self.seen = self.gradient = 0.0

    def add(self, layer: MatrixLayer, found: Pass, scale: float) -> None:
        self.passes += 1
        self.gradient = self.gradient + found.gradient / scale
        if not found.samples:
            return
        moment, total = second_moment(layer, found.inputs, found.gradients)
        self.samples += found.samples
        self.moments = self.moments + moment * (found.samples / scale) ** 2
        self.totals = self.totals + total * (found.samples / scale)
        self.seen = self.seen + total / scale

    def moment(self) -> Tensor:
        """Mean of G_b G_b^T."""
        direct = self.gradient - self.seen
        mean = self.totals * (self.passes / self.samples)
        moment = self.moments * (self.passes**2 / self.samples)
        cross = direct @ mean.mT
        return moment + cross + cross.mT + direct @ direct.mT
