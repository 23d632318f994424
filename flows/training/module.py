"""Maximum likelihood training of a flow."""

import math
from collections.abc import Callable
from typing import Any

import torch
from pytorch_lightning import Callback, LightningDataModule, LightningModule
from pytorch_lightning.callbacks import Timer
from torch import Tensor, nn

from flows.checks import check_at_least, check_positive
from flows.flow import DensityModel
from flows.nets import randomize
from flows.objectives import bits_per_dim
from flows.optim.preconditioned import Preconditioned
from flows.training.averaging import ParameterAverage
from flows.training.checks import check_splits, show_rows
from flows.training.guard import guarded_log_prob, non_finite_gradient
from flows.training.inversion import InversionError, reversible_chains
from flows.training.recenter import Recenter, recentered_layers
from flows.training.stopping import Patience
from flows.training.totals import Totals
from flows.training.variational import BOUNDS, Objective, check_target, guarded_bound

__all__ = ["DensityEstimator"]


class DensityEstimator(LightningModule):
    """Fits a flow to data by maximum likelihood, with Adam, warm-up and a cosine to zero.

    The cosine reaches zero where the run ends: at ``trainer.max_epochs``, ``max_steps`` or
    ``max_time``, whichever comes first.

    Logs ``train/nll``, ``val/nll`` and ``test/nll`` in nats per sample, and, where the data
    module knows its ``density`` or ``grey_levels``, ``.../kl`` (nats) or
    ``.../bits_per_dim``; ``test/kl_error`` is the standard error of ``test/kl``. Where the flow
    recovers inputs (``memory="reversible"``), ``train/inversion_error`` says how well.

    With an ``objective`` training maximizes that bound of log Z instead, which makes the flow
    learn the ``density`` of the data module, known up to a constant, by reverse KL:
    ``train/<objective>`` is logged in place of ``train/nll``, and of training batches only the
    number of rows counts. Validation and test stay what they are.

    Args:
        flow: A Flow, or another module with its forward, ``log_prob`` and ``sample``.
        lr: Peak learning rate of AdamW.
        warmup_steps: Steps in which the learning rate rises from zero.
        weight_decay: Decoupled weight decay of the conditioners' weight matrices; angles,
            scales, splines and biases have none. Not with an ``optimizer``, which has its own.
        optimizer: Makes the optimizer of the flow, one of :mod:`flows.optim`, which has its own
            learning rate for the conditioners' matrices and leaves all other parameters to
            AdamW; None for AdamW alone. As an option: ``--model.optimizer NGPlus``.
        keep: Part of their inputs that the conditioners' layers keep for the gradients of their
            weights, in (0, 1]: below 1 as :func:`flows.nets.randomize` does it, for less memory.
        ema_decay: Decay per step of a moving average of the parameters, for example 0.999;
            validation, test and checkpoints then use the average. 0 for none.
        early_stopping_patience: Validations in a row without a better val/nll after which
            the run ends; None to use all epochs.
        recenter_every_n_epochs: Epochs after which rotations take what they learned into
            their base, which keeps angles small; None for never.
        initial_rows: Training rows from which data-dependent layers (ActNorm, EmpiricalCDF)
            are initialized before the first step; 0 leaves them as they are.
        objective: ``"elbo"``, ``"iwae"``, ``"selbo"`` or ``"siwae"``, the bound of
            :mod:`flows.objectives` to maximize, one for every row of a training batch; None
            for maximum likelihood.
        objective_samples: Draws of each bound, or, for ``"selbo"`` and ``"siwae"``, of each
            component of the base.

    Shape:
        inputs (batch, ...), context (batch, ...) to log_prob (batch,) in nats

    Raises:
        ValueError: If the flow has no ``forward``, ``log_prob`` and ``sample``, or an option is
            out of range or does not fit the flow.

    Example:
        >>> from datasets.toy import TwoMoons
        >>> from pytorch_lightning import Trainer
        >>> from flows.recipes import RotationSplineFlow
        >>> from flows.training import DensityEstimator
        >>> model = DensityEstimator(RotationSplineFlow(features=2, layers=1), lr=5e-3)
        >>> data = TwoMoons(batches_per_epoch=2, val_size=100, test_size=100)
        >>> quiet = dict(enable_progress_bar=False, enable_model_summary=False, logger=False)
        >>> trainer = Trainer(max_epochs=1, enable_checkpointing=False, accelerator="cpu", **quiet)
        >>> trainer.fit(model, data)
        >>> trainer.global_step, sorted(trainer.logged_metrics)
        (2, ['train/nll', 'val/kl', 'val/nll'])
    """

    def __init__(
        self,
        flow: DensityModel,
        *,
        lr: float = 1e-3,
        warmup_steps: int = 100,
        weight_decay: float = 0.0,
        optimizer: Callable[[nn.Module], Preconditioned] | None = None,
        keep: float = 1.0,
        ema_decay: float = 0.0,
        early_stopping_patience: int | None = None,
        recenter_every_n_epochs: int | None = None,
        initial_rows: int = 2048,
        objective: Objective | None = None,
        objective_samples: int = 1,
    ) -> None:
        super().__init__()
        if not isinstance(flow, DensityModel):
            raise ValueError(
                "flow must be a Flow, or a module with its forward, log_prob and sample, "
                f"got {type(flow).__name__}."
            )
        check_positive(lr=lr)
        check_at_least(
            0, warmup_steps=warmup_steps, weight_decay=weight_decay, initial_rows=initial_rows
        )
        if objective is not None and objective not in BOUNDS:
            raise ValueError(
                f"objective must be None or one of {', '.join(BOUNDS)}, got {objective!r}."
            )
        check_at_least(1, objective_samples=objective_samples)
        if not 0 <= ema_decay < 1:
            raise ValueError(f"ema_decay must lie in [0, 1), got {ema_decay}.")
        if keep != 1.0:
            randomize(flow, keep)
        if optimizer is not None:
            if weight_decay:
                raise ValueError(
                    "weight_decay belongs to the optimizer where there is one, as its init_args, "
                    f"got model.weight_decay {weight_decay}."
                )
            optimizer(flow).close()  # says now what is wrong with its options
        if early_stopping_patience is not None:
            check_at_least(1, early_stopping_patience=early_stopping_patience)
        if recenter_every_n_epochs is not None:
            check_at_least(1, recenter_every_n_epochs=recenter_every_n_epochs)
            if not recentered_layers(flow):
                raise ValueError(
                    "recenter_every_n_epochs must be None for a flow without a layer that has "
                    f"recenter(), got {recenter_every_n_epochs}."
                )
        self.flow = flow
        self.lr = lr
        self.warmup_steps = warmup_steps
        self.weight_decay = weight_decay
        self.optimizer = optimizer
        self.keep = keep
        self.ema_decay = ema_decay
        self.early_stopping_patience = early_stopping_patience
        self.recenter_every_n_epochs = recenter_every_n_epochs
        self.initial_rows = initial_rows
        self.objective = objective
        self.objective_samples = objective_samples
        # Nested {class_path, init_args} of the flow, set by train.py: with it `flows.load`
        # builds the flow anew.
        self.flow_config: dict[str, Any] | None = None
        self._initialized = False
        self._totals = {split: Totals() for split in ("train", "val", "test")}
        self._diverged: str | None = None

    def forward(self, inputs: Tensor, context: Tensor | None = None) -> Tensor:
        return self.flow(inputs, context)

    def initialize(self, data: LightningDataModule) -> None:
        """Show the flow training rows once: layers that depend on data initialize themselves.

        Raises:
            ValueError: If data and flow do not fit, with what to change.
        """
        check_splits(self.flow, data)
        self.flow.train()
        show_rows(self.flow, data, self.initial_rows)
        if self.objective is not None:
            check_target(self.flow, data, self.objective)
        self._initialized = True

    def setup(self, stage: str) -> None:
        data = self.trainer.datamodule
        if stage == "fit" and data is None and self.objective is not None:
            raise ValueError(
                f"model.objective {self.objective} needs a data module with a density, got none."
            )
        if stage == "fit" and data is not None and not self._initialized:
            self.initialize(data)
        # Lightning (2.6) would load a checkpoint first and round its float64 to float32.
        self.trainer.precision_plugin.convert_module(self)

    def training_step(self, batch: tuple[Tensor, ...], batch_idx: int) -> Tensor:
        """Mean of -log_prob over the batch, or of minus the bound of the objective, in nats."""
        what = f"training diverged in epoch {self.current_epoch}, step {self.global_step}"
        if self.objective is not None:
            return self._variational_loss(len(batch[0]), what)
        log_prob = self._guarded_log_prob(batch, what)
        nll = -log_prob.mean()
        self._totals["train"].add("nll", -log_prob)
        name, value = "nll", nll.detach()
        if self._grey_levels:
            name, value = "bits/dim", self._bits(log_prob.detach(), batch[0]).mean()
        self.log(name, value, prog_bar=True, logger=False, batch_size=len(log_prob))
        return nll

    def _variational_loss(self, rows: int, what: str) -> Tensor:
        name, data = self.objective, self.trainer.datamodule
        try:
            bounds = guarded_bound(name, self.flow, data, self.objective_samples, rows, what)
        except FloatingPointError as error:
            if self.trainer.world_size == 1:
                raise
            self._diverged = f"process {self.global_rank}: {error}"
            return sum(parameter.sum() for parameter in self.flow.parameters()) * math.nan
        self._totals["train"].add(name, bounds)
        value = bounds.detach().mean()
        self.log(name, value, prog_bar=True, logger=False, batch_size=rows)
        return -bounds.mean()

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """End the run where a gradient is not finite, with the name of its parameter."""
        # In float16 a scaler finds such gradients itself and leaves the step out.
        if self.trainer.precision == "16-mixed":
            if self._diverged:
                raise FloatingPointError(self._diverged)
            return
        name = non_finite_gradient(self.flow)
        if name is not None:
            raise FloatingPointError(
                self._diverged
                or f"training diverged in epoch {self.current_epoch}, step {self.global_step}: "
                f"the loss is finite{self._here}, but the gradient of {name} is not; "
                "lower model.lr."
            )

    def validation_step(self, batch: tuple[Tensor, ...], batch_idx: int) -> None:
        """Add the batch to the means that the epoch logs as ``val/...``."""
        self._evaluate("val", batch)

    def test_step(self, batch: tuple[Tensor, ...], batch_idx: int) -> None:
        """Add the batch to the means that the epoch logs as ``test/...``."""
        self._evaluate("test", batch)

    def _evaluate(self, split: str, batch: tuple[Tensor, ...]) -> None:
        inputs, totals = batch[0], self._totals[split]
        log_prob = self._guarded_log_prob(batch, self._not_finite(split))
        totals.add("nll", -log_prob)
        density = getattr(self.trainer.datamodule, "density", None)
        if density is not None:
            totals.add("kl", density.log_prob(inputs) - log_prob)
        if self._grey_levels:
            totals.add("bits_per_dim", self._bits(log_prob, inputs))

    def on_train_epoch_start(self) -> None:
        # Not called where a run goes on within an epoch.
        self._totals["train"] = Totals()

    def on_train_epoch_end(self) -> None:
        self._report("train")

    def on_validation_epoch_end(self) -> None:
        self._report("val")

    def on_test_epoch_end(self) -> None:
        self._report("test")

    def _report(self, split: str) -> None:
        totals = self._totals[split].over_processes(self.trainer.strategy)
        if split != "train":
            self._totals[split] = Totals()
        for name, (rows, total, squares) in totals.items():
            mean = total / rows
            if not mean.isfinite():
                message = f"{self._not_finite(split)}: {name} is {mean.item()}{self._here}"
                raise FloatingPointError(self._diverged or message)
            shown = split == "val" and name == list(totals)[-1]
            self.log(f"{split}/{name}", mean, prog_bar=shown, batch_size=1, sync_dist=True)
            if (split, name) == ("test", "kl") and rows > 1:
                variance = (squares - total * mean).clamp_min(0) / (rows - 1)
                self.log("test/kl_error", (variance / rows).sqrt(), batch_size=1, sync_dist=True)

    def _guarded_log_prob(self, batch: tuple[Tensor, ...], what: str) -> Tensor:
        try:
            return guarded_log_prob(self.flow, batch, what)
        except FloatingPointError as error:
            if self.trainer.world_size == 1:
                raise
            # The other processes wait for this one: they all end at its NaN.
            self._diverged = f"process {self.global_rank}: {error}"
            return self.flow(*batch) * math.nan

    def _not_finite(self, split: str) -> str:
        return f"{split}/nll is not finite after epoch {self.current_epoch}"

    @property
    def _here(self) -> str:
        return "" if self.trainer.world_size == 1 else f" in process {self.global_rank}"

    @property
    def _grey_levels(self) -> int | None:
        return getattr(self.trainer.datamodule, "grey_levels", None)

    def _bits(self, log_prob: Tensor, inputs: Tensor) -> Tensor:
        return bits_per_dim(log_prob, inputs[0].numel(), bits=math.log2(self._grey_levels))

    def configure_callbacks(self) -> list[Callback]:
        """The callbacks that the options ask for: averages, recentring, patience."""
        options = {
            ParameterAverage: self.ema_decay or None,
            Recenter: self.recenter_every_n_epochs,
            Patience: self.early_stopping_patience,
        }
        callbacks = [make(value) for make, value in options.items() if value is not None]
        return callbacks + [InversionError()] if reversible_chains(self.flow) else callbacks

    def configure_optimizers(self) -> dict[str, Any]:
        """The optimizer, and for each of its steps the warm-up or the cosine to zero."""
        if self.optimizer is None:
            optimizer = self._adamw()
        else:
            optimizer = self.optimizer(self.flow)
            optimizer.scaler = getattr(self.trainer.precision_plugin, "scaler", None)
            if optimizer.default_adamw_lr:
                for group in optimizer.param_groups[1:]:
                    group["lr"] = self.lr
        total = self.trainer.estimated_stepping_batches

        def factor(step: int) -> float:
            if step < self.warmup_steps:
                return (step + 1) / self.warmup_steps
            progress = (step - self.warmup_steps) / max(1, total - self.warmup_steps)
            progress = min(1.0, max(progress, self._part_of_max_time()))
            return 0.5 * (1 + math.cos(math.pi * progress))

        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step"},
        }

    def teardown(self, stage: str) -> None:
        if stage == "fit":
            for optimizer in self.trainer.optimizers:
                if isinstance(optimizer, Preconditioned):
                    optimizer.close()

    def _adamw(self) -> torch.optim.AdamW:
        conditioners = [
            parameter
            for name, parameter in self.flow.named_parameters()
            if name.endswith("weight") and parameter.ndim > 1
        ]
        chosen = set(map(id, conditioners))
        others = [p for p in self.flow.parameters() if id(p) not in chosen]
        groups = [
            {"params": conditioners, "weight_decay": self.weight_decay},
            {"params": others, "weight_decay": 0.0},
        ]
        groups = [group for group in groups if group["params"]]
        # One pass over all parameters, seven times faster for small flows on a CPU; in mixed
        # precision Lightning does not clip for a step that could unscale gradients itself.
        fused = not self.trainer.precision.endswith("-mixed")
        return torch.optim.AdamW(groups, lr=self.lr, fused=fused)

    def _part_of_max_time(self) -> float:
        """How much of ``trainer.max_time`` is over; 0 without one."""
        timer = next((c for c in self.trainer.callbacks if isinstance(c, Timer)), None)
        left = None if timer is None else timer.time_remaining()
        if left is None:
            return 0.0
        part = 1.0 if left <= 0 else (over := timer.time_elapsed()) / (over + left)
        # All processes go by the clock of the first.
        return self.trainer.strategy.broadcast(part)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["flow_config"] = self.flow_config
        # Samples of a table bear its names.
        checkpoint["columns"] = getattr(self.trainer.datamodule, "columns", None)
        totals = self._totals["train"].of_processes(self.trainer.strategy)
        checkpoint["train_totals"] = {name: sums.cpu() for name, sums in totals.items()}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        # Of a mean over an epoch that a run goes on with. All processes must know its names.
        for name, sums in checkpoint.get("train_totals", {}).items():
            here = sums[self.global_rank] if self.global_rank < len(sums) else 0 * sums[0]
            self._totals["train"].sums[name] = here.to(self.device)
