"""SENG: natural gradient by the Gram matrix of the samples' gradients."""

import math
from collections.abc import Collection, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from flows.checks import check_at_least, check_positive
from flows.optim.capture import Pass
from flows.optim.layers import MatrixLayer
from flows.optim.preconditioned import Preconditioned
from flows.optim.statistics import per_sample

__all__ = ["SENG"]


class SENG(Preconditioned):
    r"""Natural gradient: :math:`D = (\lambda I + U^T U)^{-1} g`, then SGD.

    g holds the d numbers of the gradient of a layer's weight and bias, and row b of U
    (B, d) those of sample b, over :math:`\sqrt B`. By Woodbury's identity only a system of the
    size of the batch is solved,

    .. math:: D = \frac1\lambda \left(g - U^T (\lambda I + U U^T)^{-1} U g\right),

    whose factor is kept for ``refresh_every`` steps, and U with it: B d numbers for every layer,
    or B (i + 1 + o) for a linear layer that is called once per sample. With ``sketch``,
    products over more columns than that are estimated from so many, drawn without
    replacement at every refresh: both :math:`U U^T` and :math:`U g` are multiplied by d over
    their number, which makes them unbiased.

    Refreshes, samples, accumulated passes and what is left to AdamW are as in
    :class:`~flows.optim.NGPlus`, but a loss that sees a weight itself is not supported: its part
    of the samples' gradients is missing in U. Between processes each has the U of its own
    samples, and the directions are averaged at every step.

    Args:
        module: The model, for example a Flow; its layers are observed in training mode.
        lr: Learning rate of the matrices. Its scale is not that of Adam's.
        momentum: Of SGD, in [0, 1).
        nesterov: Nesterov's momentum.
        weight_decay: Decoupled weight decay of the matrices.
        damping: :math:`\lambda`, in units of a squared gradient.
        refresh_every: Steps for which U is kept.
        sketch: Columns to estimate products over d from; None for all.
        adamw_lr: Learning rate of the other parameters.
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
        Yang et al. (2022), Sketch-Based Empirical Natural Gradient Methods for Deep Learning,
        arXiv 2006.05924

    Example:
        >>> import torch
        >>> from flows.nets import MLP
        >>> net = MLP(2, 1)
        >>> optimizer = SENG(net, lr=0.1, damping=1.0)
        >>> net(torch.randn(64, 2)).square().mean().backward()
        >>> optimizer.step()
    """

    def __init__(
        self,
        module: nn.Module,
        lr: float = 0.05,
        *,
        momentum: float = 0.9,
        nesterov: bool = False,
        weight_decay: float = 0.0,
        damping: float = 1.0,
        refresh_every: int = 100,
        sketch: int | None = None,
        adamw_lr: float = 1e-3,
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
        self._sketch = sketch
        self._found: dict[MatrixLayer, list[Pass]] = {}
        self._factors: dict[MatrixLayer, Tensor] = {}
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
