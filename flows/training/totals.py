"""Means over all samples of an epoch, whichever process saw them."""

import torch
from pytorch_lightning.strategies import Strategy
from torch import Tensor

__all__ = ["Totals"]


class Totals:
    """Number, sum and sum of squares of each metric's values, in float64.

    Lightning's own mean over several processes truncates numbers of rows that differ (2.6).
    """

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}

    def add(self, name: str, values: Tensor) -> None:
        """Values of single samples, shape (rows,); there may be none."""
        values = values.detach()
        # Apple's GPUs have no float64.
        values = values.float() if values.device.type == "mps" else values.double()
        sums = torch.stack((values.new_tensor(len(values)), values.sum(), values.square().sum()))
        self.sums[name] = self.sums[name] + sums if name in self.sums else sums

    def of_processes(self, strategy: Strategy) -> dict[str, Tensor]:
        """The sums of each process, shape (processes, 3), for which all must ask."""
        if not self.sums:
            return {}
        sums = strategy.all_gather(torch.stack(list(self.sums.values())))
        sums = sums.view(-1, len(self.sums), 3).unbind(1)
        return dict(zip(self.sums, sums, strict=True))

    def over_processes(self, strategy: Strategy) -> dict[str, Tensor]:
        """The sums over all processes, which must all ask for them."""
        if not self.sums:
            return {}
        sums = strategy.reduce(torch.stack(list(self.sums.values())), reduce_op="sum")
        return dict(zip(self.sums, sums, strict=True))
