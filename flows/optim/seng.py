"""SENG: natural gradient by the Gram matrix of the samples' gradients."""

import math
from collections.abc import Collection, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from flows.checks import check_at_least, check_positive
from flows.optim.capture import Pass
from flows.optim.layers import MatrixLayer
from flows.optim.preconditioned import Preconditioned, refreshes
from flows.optim.statistics import damped_inverse, per_sample

__all__ = ["SENG"]


class SENG(Preconditioned):
    r"""Natural gradient: :math:`D = (\lambda I + U^T U)^{-1} g`, then SGD.

    g holds the d numbers of the gradient of a layer's weight and bias, and row b of U
    (B, d) those of sample b, over :math:`\sqrt B`. By Woodbury's identity only a system of the
    size of the batch is solved,

    .. math:: D = \frac1\lambda \left(g - U^T (\lambda I + U U^T)^{-1} U g\right),

    whose inverse is kept for ``refresh_every`` steps, and U with it: B d numbers for every layer,
    or B (i + 1 + o), as factors, for a linear layer that is called once per sample. With
    ``sketch`` products over more columns than that, of all other layers, are estimated from so
    many, drawn without replacement at every refresh: both :math:`U U^T` and :math:`U g` are
    multiplied by d over their number, which makes them unbiased.

    Refreshes, samples, accumulated passes and what is left to AdamW are as in
    :class:`~flows.optim.NGPlus`, but a loss that sees a weight itself, and not only through the
    outputs of the layer, is refused at the first step. Of several processes each has the U of
    its own samples, and the directions are averaged at every step.

    Args:
        module: The model, for example a Flow; its layers are observed in training mode.
        lr: Learning rate of the matrices. Its scale is not that of Adam's.
        momentum: Of SGD, in [0, 1).
        nesterov: Nesterov's momentum.
        weight_decay: Decoupled weight decay of the matrices; biases have none.
        damping: :math:`\lambda`, in units of a squared gradient.
        refresh_every: Steps for which U is kept.
        sketch: Columns to estimate products over d from, where U is not kept as factors; None
            for all.
        max_samples: Samples of a backward pass that U is made of, the first ones; None for all.
            The inverse takes the third power of their number, for every layer.
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
            interact; at the first step, if the loss sees a weight itself.

    Reference:
        Yang et al. (2022), Sketch-Based Empirical Natural Gradient Methods for Deep Learning,
        arXiv 2006.05924

    Example:
        >>> import torch
        >>> from flows.nets import MLP
        >>> from flows.optim import SENG
        >>> net = MLP(2, 1)
        >>> optimizer = SENG(net, lr=0.1, damping=1.0)
        >>> net(torch.randn(64, 2)).square().mean().backward()
        >>> optimizer.step()
    """

    kept = ("inputs", "gradients", "rows", "columns")

    def __init__(
        self,
        module: nn.Module,
        lr: float = 0.03,
        *,
        momentum: float = 0.9,
        nesterov: bool = False,
        weight_decay: float = 0.0,
        damping: float = 1.0,
        refresh_every: int = 100,
        sketch: int | None = None,
        max_samples: int | None = None,
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
        if sketch is not None:
            check_at_least(1, sketch=sketch)
        if max_samples is not None:
            check_at_least(1, max_samples=max_samples)
        self._sketch = sketch
        self._max_samples = max_samples
        self._found: dict[MatrixLayer, list[Pass]] = {}
        self._inverses: dict[MatrixLayer, Tensor] = {}
        matrices = {
            "lr": lr,
            "momentum": momentum,
            "nesterov": nesterov,
            "weight_decay": weight_decay,
            "damping": damping,
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
            samples=True,
            max_dim=max_dim,
            exclude=exclude,
            scaler=scaler,
            process_group=process_group,
        )

    def _due(self, step: int) -> bool:
        return refreshes(step, self.param_groups[0]["refresh_every"])

    def _forget(self, layer: MatrixLayer) -> None:
        self._found.pop(layer, None)

    def _observe(self, layer: MatrixLayer, found: Pass) -> None:
        if self.param_groups[0]["steps"] == 0:
            self._refuse_direct_terms(layer, found)
        if found.samples:
            self._found.setdefault(layer, []).append(found.divided_by(self._scale()))

    def _refresh(self, layers: Sequence[MatrixLayer]) -> None:
        group = self.param_groups[0]
        if not self._due(group["steps"]):
            return
        self._tell_unseen(layers, self._found, "does not move them")
        for layer in layers:
            if layer not in self._found:
                continue
            state = {"damping": group["damping"], **self._rows(layer, self._found.pop(layer))}
            gram = _samples(state, layer).gram()
            if not gram.isfinite().all():
                self._tell_non_finite(layer)
                continue
            self.state[layer.weight].update(state)
            self._inverses[layer] = damped_inverse(gram, group["damping"])

    def _rows(self, layer: MatrixLayer, found: list[Pass]) -> dict[str, Tensor]:
        """U, as factors where a sample's gradient is one outer product; and the columns."""
        sizes = [one.samples for one in found]
        if self._max_samples is not None:
            found = [one.first(self._max_samples) for one in found]
        samples = sum(one.samples for one in found)
        # The losses of the samples themselves, not their mean over passes and batches.
        weights = [len(found) * size / math.sqrt(samples) for size in sizes]
        single = all(layer.positions(one.gradients) == 1 for one in found)
        if single and layer.mask is None:
            parts = [next(layer.parts(one.inputs, one.gradients, one.samples)) for one in found]
            return {
                "inputs": torch.cat([a.squeeze(1) for a, _ in parts]),
                "gradients": torch.cat(
                    [g.squeeze(1) * weight for (_, g), weight in zip(parts, weights, strict=True)]
                ),
            }
        pieces = [
            matrices.flatten(1) * weight
            for one, weight in zip(found, weights, strict=True)
            for matrices in per_sample(layer, one.inputs, one.gradients)
        ]
        rows = {"rows": torch.cat(pieces)}
        size = rows["rows"].shape[1]
        if self._sketch is not None and self._sketch < size:
            rows["columns"] = torch.randperm(size, device=layer.weight.device)[: self._sketch]
        return rows

    def _directions(self, gradients: dict[MatrixLayer, Tensor]) -> dict[MatrixLayer, Tensor]:
        directions = [self._direction(layer, gradient) for layer, gradient in gradients.items()]
        totals = self._totals(directions)
        return {
            layer: total / self._processes for layer, total in zip(gradients, totals, strict=True)
        }

    def _direction(self, layer: MatrixLayer, gradient: Tensor) -> Tensor:
        state = self.state[layer.weight]
        if "damping" not in state:
            return torch.zeros_like(gradient)
        samples = _samples(state, layer)
        if layer not in self._inverses:
            self._inverses[layer] = damped_inverse(samples.gram(), state["damping"])
        weights = self._inverses[layer] @ samples.times(gradient)
        return (gradient - samples.combine(weights)) / state["damping"]

    def load_state_dict(self, state_dict: dict) -> None:
        super().load_state_dict(state_dict)
        self._inverses.clear()


def _samples(state: dict[str, Tensor], layer: MatrixLayer) -> "_Rows | _Factors":
    if "inputs" in state:
        return _Factors(state)
    return _Rows(state, (layer.rows, layer.columns))


class _Rows:
    """U (samples, d) as it is; products over d from some columns, where they are named."""

    def __init__(self, state: dict[str, Tensor], shape: tuple[int, int]) -> None:
        self.rows, self.shape = state["rows"], shape
        self.columns = state.get("columns")
        self.some = self.rows if self.columns is None else self.rows[:, self.columns]
        self.factor = self.rows.shape[1] / self.some.shape[1]

    def gram(self) -> Tensor:
        return self.factor * self.some @ self.some.mT

    def times(self, gradient: Tensor) -> Tensor:
        flat = gradient.flatten()
        return self.factor * self.some @ (flat if self.columns is None else flat[self.columns])

    def combine(self, weights: Tensor) -> Tensor:
        return (weights @ self.rows).view(self.shape)


class _Factors:
    """U whose rows are outer products of a gradient (o,) and an input (i + 1,)."""

    def __init__(self, state: dict[str, Tensor]) -> None:
        self.inputs, self.gradients = state["inputs"], state["gradients"]

    def gram(self) -> Tensor:
        return (self.inputs @ self.inputs.mT) * (self.gradients @ self.gradients.mT)

    def times(self, gradient: Tensor) -> Tensor:
        return ((self.gradients @ gradient) * self.inputs).sum(1)

    def combine(self, weights: Tensor) -> Tensor:
        return (self.gradients * weights.unsqueeze(1)).mT @ self.inputs
