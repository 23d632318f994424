"""What keeps angles meaningful: the schedule's name in the state, an orthogonal base matrix."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from flows.givens import Schedule

__all__ = [
    "NamedAngles",
    "OrthogonalBase",
    "check_orthogonal",
    "nearest_orthogonal",
    "starts_at_random",
]


class NamedAngles(nn.Module):
    """A module whose state carries the name of what its angles mean; abstract.

    Weights of another name are refused.
    """

    schedule: Schedule | None

    @property
    def _identity(self) -> str:
        """What the angles mean: the schedule, and whatever else changes the map."""
        return str(self.schedule)

    def get_extra_state(self) -> Tensor:
        """The identity as bytes: a tensor, so that every weight format can hold it."""
        return torch.tensor(list(self._identity.encode()), dtype=torch.uint8)

    def set_extra_state(self, state: Tensor) -> None:
        name = bytes(state.tolist()).decode(errors="replace")
        if name != self._identity:
            raise ValueError(
                f"these weights belong to the schedule {name}, the layer has {self._identity}."
            )

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args: Any) -> None:
        # Torch copies the parameters first: weights of another schedule must not get that far.
        if f"{prefix}_extra_state" in state_dict:
            self.set_extra_state(state_dict[f"{prefix}_extra_state"])
        super()._load_from_state_dict(state_dict, prefix, *args)


class OrthogonalBase(NamedAngles):
    """A module of named angles whose buffer ``base`` is orthogonal in any dtype; abstract."""

    base: Tensor

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "OrthogonalBase":
        before = self.base.dtype
        super()._apply(fn, recurse)
        if self.base.dtype != before:
            self._sharpen_base()
        return self

    @torch.no_grad()
    def _sharpen_base(self) -> None:
        """Orthogonalize a base that came from a coarser dtype; leave others bit for bit."""
        if self.base.is_meta:
            return
        identity = torch.eye(len(self.base), dtype=self.base.dtype, device=self.base.device)
        error = (self.base @ self.base.mT - identity).abs().max()
        if error > 100 * torch.finfo(self.base.dtype).eps:
            self.base.copy_(nearest_orthogonal(self.base))

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        self._sharpen_base()


def check_orthogonal(name: str, matrix: Tensor) -> None:
    """Refuse a matrix whose columns, or rows if they are fewer, are not orthonormal."""
    q = matrix.detach().cpu().double()
    rows, columns = q.shape
    gram = q @ q.mT if rows <= columns else q.mT @ q
    error = (gram - torch.eye(len(gram), dtype=torch.float64)).abs().max()
    # Half precision cannot hold a matrix that is closer to orthogonal.
    if not error <= max(1e-4, 4 * torch.finfo(matrix.dtype).eps):
        equation = "Q Q^T = I" if rows <= columns else "Q^T Q = I"
        raise ValueError(
            f"{name} must be orthogonal, {equation}; its largest error is {error:.2g}."
        )


def nearest_orthogonal(matrix: Tensor) -> Tensor:
    """The orthogonal factor of a nearly orthogonal matrix, by Newton's iteration in float64."""
    q = matrix.double()
    for _ in range(8):
        q = 1.5 * q - 0.5 * q @ (q.mT @ q)
    return q.to(matrix.dtype)


def starts_at_random(schedule: Schedule) -> bool:
    """Whether angles of zero are no start, since the map is degenerate there."""
    return schedule.name.startswith("cosine_sine")
