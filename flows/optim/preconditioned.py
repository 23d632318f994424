"""What these optimizers have in common: matrices are preconditioned, the rest is left to AdamW."""

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Container, Sequence
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

from flows.checks import check_at_least, check_positive
from flows.nets.randomized import RandomizedConv2d, RandomizedLinear, RandomizedMaskedLinear
from flows.optim.capture import Capture, Pass
from flows.optim.layers import MatrixLayer, matrix_layers, param_groups_for
from flows.optim.statistics import total

__all__ = ["Preconditioned", "refreshes"]

RANDOMIZED = RandomizedConv2d, RandomizedLinear, RandomizedMaskedLinear


class Preconditioned(Optimizer, ABC):
    """One optimizer for a whole model: linear and convolution layers, and everything else.

    The gradients of the first, as matrices with the bias as a column, become directions, which
    SGD or Adam then follows; the gradients themselves are left as they are. All other
    parameters are AdamW's. A subclass says what it observes of the backward passes of a step and
    how gradients become directions.

    The first of ``param_groups`` has the matrices, the second, if there is one, the rest;
    learning rates are scheduled as in any optimizer.

    Args:
        module: The model, whose layers get hooks for the steps that observe them.
        matrices: Options of the first group: ``lr``, ``momentum``, ``nesterov``,
            ``weight_decay`` (decoupled, of weights only) and those of the subclass.
        adamw: Options of AdamW for the other parameters.
        samples: Whether gradients of single samples are taken, so that none may interact.
        follow: What follows the directions.
        max_dim: Largest number of outputs of a layer of the first group.
        exclude: Names of layers to leave to AdamW, or patterns such as ``"*.last"``.
        scaler: Of the loss, in float16: what is observed is scaled as well.
        process_group: Processes that train together; None for all of them.

    Attributes:
        kept: Names of the tensors of a layer's state that keep their dtype when loaded.
    """

    kept: tuple[str, ...] = ()

    def __init__(
        self,
        module: nn.Module,
        matrices: dict[str, Any],
        *,
        adamw: dict[str, Any],
        samples: bool,
        follow: Literal["sgd", "adam"] = "sgd",
        max_dim: int = 1024,
        exclude: Collection[str] = (),
        scaler: "torch.amp.GradScaler | None" = None,
        process_group: "dist.ProcessGroup | None" = None,
    ) -> None:
        if not isinstance(module, nn.Module):
            raise ValueError(
                f"{type(self).__name__} needs the model, an nn.Module, not its parameters: it "
                f"observes layers; got {type(module).__name__}."
            )
        #: Whether no rate was given for the other parameters.
        self.default_adamw_lr = adamw["lr"] is None
        adamw = {**adamw, "lr": 1e-3 if self.default_adamw_lr else adamw["lr"]}
        check_positive(lr=matrices["lr"], adamw_lr=adamw["lr"])
        check_at_least(0, momentum=matrices["momentum"], weight_decay=matrices["weight_decay"])
        check_at_least(0, adamw_weight_decay=adamw["weight_decay"])
        if not matrices["momentum"] < 1:
            raise ValueError(f"momentum must lie in [0, 1), got {matrices['momentum']}.")
        if matrices["nesterov"] and not matrices["momentum"]:
            raise ValueError("nesterov needs a momentum above 0, got 0.")
        if follow not in ("sgd", "adam"):
            raise ValueError(f"follow must be 'sgd' or 'adam', got {follow!r}.")
        for name, part in module.named_modules():
            if isinstance(part, RANDOMIZED):
                raise ValueError(
                    f"{type(self).__name__} needs the inputs of layers, which it would keep where "
                    f"randomized ones drop them: got {name} ({type(part).__name__})."
                )
        if samples:
            _check_samples_apart(self, module)
        self.layers = matrix_layers(module, max_dim=max_dim, exclude=exclude)
        if not self.layers:
            raise ValueError(
                f"{type(self).__name__} needs linear or convolution layers with at most "
                f"{max_dim} outputs, got a {type(module).__name__} without any."
            )
        first, rest = param_groups_for(module, max_dim=max_dim, exclude=exclude)
        fused = _fusable(first["params"])
        # Of a state that is loaded torch moves ``step`` to where a fused step needs it.
        groups = [{**first, **matrices, "fused": fused, "steps": 0}]
        if rest["params"]:
            # AdamW's own group, checked and completed by itself.
            self._adamw = AdamW(rest["params"], **adamw, fused=_fusable(rest["params"]))
            groups.append({**self._adamw.param_groups[0], "method": rest["method"]})
        make = {"sgd": SGD, "adam": AdamW}[follow]
        options = {} if follow == "sgd" else {"betas": adamw["betas"], "eps": adamw["eps"]}
        self._follower = make(
            first["params"], lr=matrices["lr"], weight_decay=0.0, fused=fused, **options
        )
        self.scaler = scaler
        self.process_group = process_group
        self._told: set[str] = set()
        # Schedulers that change the momentum look for its name here.
        super().__init__(groups, {name: matrices[name] for name in ("lr", "momentum")})
        self._capture = Capture(self.layers, self._observe, self._forget)
        self._arm()

    @abstractmethod
    def _due(self, step: int) -> bool:
        """Whether the backward passes of a step, 0, 1, ..., are to be observed."""

    @abstractmethod
    def _observe(self, layer: MatrixLayer, found: Pass) -> None:
        """Take what a backward pass brought a layer."""

    @abstractmethod
    def _forget(self, layer: MatrixLayer) -> None:
        """Drop what was observed of a layer: a step begins."""

    @abstractmethod
    def _refresh(self, layers: Sequence[MatrixLayer]) -> None:
        """Turn what was observed of these layers into preconditioners, where that is due."""

    @abstractmethod
    def _directions(self, gradients: dict[MatrixLayer, Tensor]) -> dict[MatrixLayer, Tensor]:
        """Directions for gradients (o, columns); a layer that has none waits."""

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:
        """One step; the closure, if there is one, computes loss and gradients first."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        layers = [
            layer
            for layer in self.layers
            if layer.weight.grad is not None and layer.weight.requires_grad
        ]
        self._refresh(layers)
        self._follow(self._directions({layer: layer.gradient() for layer in layers}))
        if len(self.param_groups) > 1:
            self._adamw.state = self.state
            self._adamw.param_groups = self.param_groups[1:]
            self._adamw.step()
        self.param_groups[0]["steps"] += 1
        self._arm()
        return loss

    def close(self) -> None:
        """Take the hooks off the model; the optimizer is not to be used again."""
        self._capture.stop()

    def _follow(self, directions: dict[MatrixLayer, Tensor]) -> None:
        group = self.param_groups[0]
        if not directions:
            return
        if group["weight_decay"]:
            weights = [layer.weight for layer in directions]
            torch._foreach_mul_(weights, 1 - group["lr"] * group["weight_decay"])
        pieces = {
            parameter: piece
            for layer, direction in directions.items()
            for parameter, piece in zip(layer.parameters, layer.split(direction), strict=True)
            if parameter.grad is not None and parameter.requires_grad
        }
        parameters = list(pieces)
        gradients = [parameter.grad for parameter in parameters]
        for parameter, piece in pieces.items():
            parameter.grad = piece.to(parameter.dtype)
        follower = self._follower
        follower.state = self.state
        own = {name: group[name] for name in ("lr", "momentum", "nesterov")}
        follower.param_groups = [{**follower.defaults, **own, "params": parameters}]
        follower.step()
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient

    def _arm(self) -> None:
        """Observe the next step, or not."""
        if self._due(self.param_groups[0]["steps"]):
            self._capture.start()
        else:
            self._capture.stop()

    def _scale(self) -> float:
        """By what gradients of outputs are too large."""
        return 1.0 if self.scaler is None else self.scaler.get_scale()

    @property
    def _processes(self) -> int:
        if dist.is_available() and dist.is_initialized():
            return dist.get_world_size(self.process_group)
        return 1

    def _totals(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Sums over the processes, in one message."""
        if self._processes == 1 or not tensors:
            return list(tensors)
        flat = torch.cat([tensor.flatten() for tensor in tensors])
        dist.all_reduce(flat, group=self.process_group)
        pieces = flat.split([tensor.numel() for tensor in tensors])
        return [piece.view_as(tensor) for piece, tensor in zip(pieces, tensors, strict=True)]

    def _refuse_direct_terms(self, layer: MatrixLayer, found: Pass) -> None:
        products = total(layer, found.inputs, found.gradients) if found.samples else 0.0
        # Half precision rounds one of the two by a per cent.
        if (found.gradient - products).norm() > 0.1 * found.gradient.norm():
            raise ValueError(
                f"{type(self).__name__} needs a loss that sees the weight of {layer.name} through "
                "the layer's outputs only, in training mode; got a gradient that is not theirs "
                f"alone: exclude {layer.name!r}."
            )

    def _tell_unseen(
        self, layers: Sequence[MatrixLayer], seen: Container[MatrixLayer], instead: str
    ) -> None:
        unseen = [layer.name for layer in layers if layer not in seen]
        if unseen:
            self._warn(
                "unseen",
                f"{type(self).__name__} saw no call in training mode of {', '.join(unseen[:5])}, "
                "whose weights have gradients (was the model compiled before its optimizer was "
                f"made?): it {instead}.",
            )

    def _tell_non_finite(
        self,
        layer: MatrixLayer,
        what: str = "gradients of samples",
        instead: str = "keeps what it knew and goes on",
    ) -> None:
        self._warn(
            "not finite",
            f"{type(self).__name__} met {what} of {layer.name} that are not finite, at step "
            f"{self.param_groups[0]['steps']}: it {instead}.",
        )

    def _warn(self, kind: str, message: str) -> None:
        """Said once for each kind."""
        if kind not in self._told:
            self._told.add(kind)
            warnings.warn(message, stacklevel=5)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        if hasattr(self, "_capture"):
            raise ValueError(
                f"{type(self).__name__} has the parameters of its model and takes no more groups."
            )
        super().add_param_group(param_group)

    def __getstate__(self) -> dict[str, Any]:
        raise TypeError(
            f"{type(self).__name__} belongs to its model and cannot be copied or pickled: make "
            "another one for the copy, and load_state_dict into it."
        )

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        # Torch has cast these to the dtype of the weights.
        parameters = [p for group in self.param_groups for p in group["params"]]
        numbers = [n for group in state_dict["param_groups"] for n in group["params"]]
        for number, parameter in zip(numbers, parameters, strict=True):
            for name in self.kept:
                if name in state_dict["state"].get(number, {}):
                    value = state_dict["state"][number][name]
                    self.state[parameter][name] = value.to(parameter.device)
        for layer in self.layers:
            self._forget(layer)
        self._arm()


def refreshes(step: int, every: int) -> bool:
    """Whether a step, 0, 1, ..., measures anew: every so many, and before those 1, 2, 3, 4, 6, 9,
    13, 19, ..., each half as far again. With powers of two flows on digits diverged.
    """
    if step % every == 0:
        return True
    early = 1
    while early < step < every:
        early += max(1, early // 2)
    return early == step


def _check_samples_apart(optimizer: Preconditioned, module: nn.Module) -> None:
    for name, part in module.named_modules():
        if "BatchNorm" in type(part).__name__:
            raise ValueError(
                f"{type(optimizer).__name__} needs the gradients of single samples, which a batch "
                f"norm mixes: got {name} ({type(part).__name__})."
            )


def _fusable(parameters: list[nn.Parameter]) -> bool | None:
    """One pass over all parameters, where torch has it."""
    kinds = ("cpu", "cuda")
    return all(p.is_floating_point() and p.device.type in kinds for p in parameters) or None
