"""Marginals made Gaussian by the training data's own distribution function."""

import math

import torch
from torch import Tensor

from flows.checks import check_at_least, check_positive
from flows.transforms.base import (
    Transform,
    any_rows,
    check_unit_interval,
    sum_features,
    sum_over_processes,
)

__all__ = ["EmpiricalCDF"]


class EmpiricalCDF(Transform):
    r"""Each feature through its training CDF, then the normal quantile: :math:`\Phi^{-1}(F(x))`.

    F is piecewise linear on [0, 1] with equal bins. With one bin per grey level, followed by
    a standard normal, the layer is exactly the model of independent pixel histograms. F is
    fitted to what the first training-mode ``forward`` sees and then stays fixed; it is no
    parameter. Before that F is the identity.

    Args:
        shape: Shape of one sample; an int for vectors.
        bins: Bins per feature, at least 2; for images the number of grey levels.
        smoothing: Pseudo-counts per bin, greater than 0; a half is Jeffreys' prior. Where F is
            flat its inverse magnifies rounding, by at most
            0.4 (rows + smoothing * bins) / (smoothing * bins).

    Shape:
        inputs ``(batch, *shape)`` in [0, 1] to outputs of the same shape, logabsdet (batch,) in
        nats.

    Raises:
        ValueError: If ``bins`` is below 2, ``smoothing`` is not positive, or inputs have another
            shape.
        InputOutsideDomain: In ``forward``, for inputs outside [0, 1].

    Example:
        >>> import torch
        >>> from flows import EmpiricalCDF
        >>> layer = EmpiricalCDF(1, bins=2, smoothing=1e-3)
        >>> _ = layer(torch.tensor([[0.1], [0.2], [0.4], [0.9]]))  # three quarters below 0.5
        >>> layer(torch.tensor([[0.5]]))[0].round(decimals=2)  # the quantile of 0.75
        tensor([[0.6700]])
    """

    def __init__(
        self, shape: int | tuple[int, ...], *, bins: int = 256, smoothing: float = 0.5
    ) -> None:
        super().__init__()
        check_at_least(2, bins=bins)
        check_positive(smoothing=smoothing)
        self.shape = (shape,) if isinstance(shape, int) else tuple(shape)
        self.bins = bins
        self.smoothing = smoothing
        features = math.prod(self.shape)
        self.register_buffer("mass", torch.full((features, bins), 1 / bins))
        self.register_buffer("initialized", torch.tensor(False))

    def forward(self, inputs: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        x = self._flat(inputs)
        check_unit_interval(x)
        if self.training and not self.initialized:
            self._initialize(x)
        index = (x * self.bins).long().clamp_max(self.bins - 1)
        below, mass = self._at(index)
        # The quantile of 0 and 1 is infinite; the margin is far below one count.
        tiny = torch.finfo(x.dtype).eps
        u = (below + (x * self.bins - index) * mass).clamp(tiny, 1 - tiny)
        outputs = torch.special.ndtri(u)
        return outputs.view(inputs.shape), self._logabsdet(outputs, mass)

    def inverse(self, inputs: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        z = self._flat(inputs)
        u = torch.special.ndtr(z)
        inner = self._edges()[:, 1:-1]
        if torch.compiler.is_exporting():
            # By counting, which takes more memory, but ONNX knows no search.
            index = (inner < u.unsqueeze(-1)).sum(-1)
        else:
            index = torch.searchsorted(inner.contiguous(), u.mT.contiguous()).mT
        below, mass = self._at(index)
        fraction = ((u - below) / mass).clamp(0, 1)
        outputs = (index + fraction) / self.bins
        return outputs.view(inputs.shape), -self._logabsdet(z, mass)

    def _flat(self, inputs: Tensor) -> Tensor:
        if tuple(inputs.shape[1:]) != self.shape:
            raise ValueError(
                f"inputs must have shape (batch, {', '.join(map(str, self.shape))}), "
                f"got {tuple(inputs.shape)}."
            )
        return inputs.flatten(1)

    def _edges(self) -> Tensor:
        """F at the edges of the bins, shape (features, bins + 1)."""
        return torch.nn.functional.pad(self.mass.cumsum(1), (1, 0))

    def _at(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """F at the left edge of the chosen bins and their mass, each (batch, features)."""
        rows = torch.arange(len(self.mass), device=index.device)
        return self._edges()[rows, index], self.mass[rows, index]

    def _logabsdet(self, z: Tensor, mass: Tensor) -> Tensor:
        # log F'(x) minus the log density of the standard normal at the quantile.
        log_normal = -0.5 * z.square() - 0.5 * math.log(2 * math.pi)
        return sum_features((mass * self.bins).log() - log_normal)

    @torch.no_grad()
    def _initialize(self, x: Tensor) -> None:
        if not any_rows(x):
            return
        index = (x * self.bins).long().clamp_max(self.bins - 1)
        counts = torch.zeros_like(self.mass, dtype=torch.float64)
        counts.scatter_add_(1, index.mT, torch.ones_like(index.mT, dtype=torch.float64))
        counts = sum_over_processes(counts) + self.smoothing
        self.mass.copy_(counts / counts.sum(1, keepdim=True))
        self.initialized.fill_(True)

    def extra_repr(self) -> str:
        return f"shape={self.shape}, bins={self.bins}"
