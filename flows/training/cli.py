"""LightningCLI that keeps every run in a folder of its own and answers mistakes in one line."""

import json
import logging
import os
import re
import sys
import warnings
from argparse import ArgumentError, ArgumentParser
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn, Union

import torch
import yaml
from jsonargparse.typing import NonNegativeInt, PositiveInt
from lightning_fabric.plugins import TorchCheckpointIO
from pytorch_lightning import LightningDataModule, Trainer
from pytorch_lightning.cli import LightningArgumentParser, LightningCLI
from pytorch_lightning.loggers import WandbLogger
from pytorch_lightning.utilities.exceptions import MisconfigurationException, SIGTERMException

from flows.checkpoint import read_checkpoint
from flows.diagnostics import Audit, audit
from flows.flow import load
from flows.training.callbacks import BatchSeed, BestAndLast, Interrupted, Recorder
from flows.training.configs import check_config
from flows.training.files import AtomicCheckpointIO, write_atomically
from flows.training.module import DensityEstimator
from flows.training.pictures import Pictures
from flows.training.report import write_report
from flows.training.resume import (
    barely_begun,
    check_architecture,
    check_data,
    check_resumable,
    checkpoint_at,
)
from flows.training.run import finish, new_folder, write_summary
from flows.training.sampling import precise
from flows.transforms.base import InputOutsideDomain

__all__ = ["RunCLI", "one_line_errors"]

# Rows of the test split that an audit looks at.
AUDITED = 1000


class RunCLI(LightningCLI):
    """Model, data and trainer from a config, and the folder ``<root>/<experiment>/<time>``.

    The root is ``--trainer.default_root_dir``, ``runs`` if none is given; the experiment is
    the name of the config file. With ``--ckpt_path`` the config, unless another one is given,
    and the folder are those of the run that the checkpoint, or the run folder, belongs to. A
    run folder without a checkpoint, of a run that was killed early, is begun anew.

    Where several processes train together, the first one has the folder and writes.

    Args:
        args: Command line, without the subcommand.
        default_config: Config used if the command line names neither config nor checkpoint.
            None makes ``--ckpt_path`` required.
    """

    def __init__(self, args: list[str], *, default_config: str | None = None) -> None:
        _quiet()
        checkpoint, configs = _named_files(args)
        for path in configs:
            check_config(Path(path))
        config = configs[-1] if configs else None
        self._names_checkpoint = checkpoint is not None
        self.resumed_from: Path | None = None
        self.beside: Path | None = None
        if checkpoint is not None:
            fits = default_config is not None
            path = checkpoint_at(Path(checkpoint), resume=fits)
            beside = path.parent / "config.yaml"
            self.beside = beside if beside.is_file() else None
            check_config(beside)
            begun = path.exists() or not (fits and self.beside and barely_begun(path.parent))
            if begun:
                self.resumed_from = path
                read_checkpoint(path)
            if config is None and self.beside is None:
                raise FileNotFoundError(
                    f"expected the run's config beside {checkpoint}, found no {beside}; "
                    "name one with --config."
                )
        elif default_config is None and not _asks_for_help(args):
            raise ValueError("expected --ckpt_path PATH, the checkpoint to use, got none.")
        if config is None:
            config = self.beside or default_config
            args = args if config is None else ["--config", str(config), *args]
        super().__init__(
            DensityEstimator,
            LightningDataModule,
            subclass_mode_data=True,
            run=False,
            args=args,
            seed_everything_default=0,
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
            save_config_callback=None,
            trainer_defaults={
                "logger": False,
                "num_sanity_val_steps": 0,
                "log_every_n_steps": 1,
                "enable_model_summary": False,
            },
            parser_kwargs={"exit_on_error": False, "allow_abbrev": False},
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        # Of Union[int, float] and Union[float, int] typing keeps the one that any library wrote
        # first. It decides whether limit_train_batches=1 is one batch or all of them.
        for action in parser._actions:
            if getattr(action, "_typehint", None) == Union[int, float, None]:  # noqa: UP007
                action._typehint = int | float | None
        parser.add_argument(
            "--ckpt_path", type=str | None, help="Checkpoint to resume from, or to test."
        )
        parser.add_argument(
            "--threads", type=PositiveInt | None, help="CPU threads; one is best for small flows."
        )
        parser.add_argument(
            "--pictures_every_n_epochs",
            type=NonNegativeInt | None,
            help="Epochs between pictures of what the flow has learned; 0 for none; null for "
            "pictures after 1, 2, 4, 8, ... epochs, for at most a tenth of the time.",
        )

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        self.config = parser.parse_args(args)

    def before_instantiate_classes(self) -> None:
        if self.config.threads is not None:
            torch.set_num_threads(self.config.threads)
        if self.config.ckpt_path is not None and not self._names_checkpoint:
            raise ValueError("ckpt_path belongs on the command line, got it in a config.")
        if self.config.trainer.fast_dev_run:
            raise ValueError(
                "fast_dev_run leaves no run; for a short one use "
                "--trainer.max_epochs=1 --trainer.limit_train_batches=1."
            )
        if self.config.trainer.limit_test_batches == 0:
            raise ValueError("limit_test_batches must not be 0: a run ends with a test.")
        if self.resumed_from is not None:
            check_architecture(self.resumed_from, self._flow_config)
        if self.beside is not None:
            self.folder = self.beside.parent
            self.experiment = self.folder.parent.name
            if self.resumed_from is not None:
                saved, asked = (
                    yaml.safe_load(text).get("data")
                    for text in (self.beside.read_text(), self.parser.dump(self.config))
                )
                check_data(self.resumed_from, saved, asked)
        else:
            config = Path(str(self.config.config[-1])).resolve()
            # The config of an earlier run stands in <experiment>/<time>/config.yaml.
            earlier = config.name == "config.yaml"
            self.experiment = config.parent.parent.name if earlier else config.stem
            root = self.config.trainer.default_root_dir or "runs"
            self.folder = new_folder(root, self.experiment)
        # The resolved config is saved as given: another run keeps its logs in its own folder.
        self.given = self.config.clone()
        self.given.ckpt_path = None
        loggers = self.config.trainer.logger
        for logger in loggers if isinstance(loggers, list) else [loggers]:
            arguments = getattr(logger, "init_args", None)
            if arguments is not None and arguments.get("save_dir", "") in (".", None):
                arguments.save_dir = str(self.folder)

    @property
    def _flow_config(self) -> dict[str, Any]:
        return self.config.model.flow.as_dict()

    @property
    def _seed(self) -> int | None:
        seed = self.config.seed_everything
        return None if isinstance(seed, bool) else seed

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        recorder = Recorder(self.folder)
        pictures = Pictures(recorder, self.config.pictures_every_n_epochs)
        callbacks = [recorder, BestAndLast(self.folder), pictures]
        if self._seed is not None:
            callbacks.append(BatchSeed(self._seed))
        self.trainer_defaults["callbacks"] = callbacks
        self.model.flow_config = self._flow_config
        trainer = super().instantiate_trainer(default_root_dir=str(self.folder), **kwargs)
        if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
            trainer.strategy.checkpoint_io = AtomicCheckpointIO()
        return trainer

    def open_run(self) -> None:
        """Try data and flow together, which shows mistakes; only then create the folder."""
        if self.resumed_from is not None:
            check_resumable(
                self.resumed_from,
                max_epochs=self.trainer.max_epochs,
                ema_decay=self.model.ema_decay,
            )
        if self.model.early_stopping_patience and self.trainer.limit_val_batches == 0:
            raise ValueError(
                "early_stopping_patience needs validation, got trainer.limit_val_batches 0."
            )
        self.datamodule.setup("fit")
        self.model.initialize(self.datamodule)
        if self.trainer.is_global_zero:
            try:
                self.folder.mkdir(parents=True, exist_ok=self.beside is not None)
            except FileExistsError:
                raise ValueError(
                    f"{self.folder} is there already: another run began in the same second; "
                    "start this one again."
                ) from None
            for partial in self.folder.glob("*.partial"):
                partial.unlink()  # of a run that was killed while it wrote
            with write_atomically(self.folder / "config.yaml") as file:
                file.write(self.parser.dump(self.given))

    def train(self) -> dict[str, Any]:
        """Fit, then test and draw the best checkpoint. Returns the summary."""
        try:
            self.trainer.fit(
                self.model,
                datamodule=self.datamodule,
                ckpt_path=None if self.resumed_from is None else str(self.resumed_from),
                weights_only=True,
            )
            return finish(
                self._folder,
                self.trainer,
                self.model,
                self.datamodule,
                experiment=self.experiment,
                seed=self._seed,
            )
        except (FloatingPointError, InputOutsideDomain) as error:
            if self.trainer.is_global_zero:
                recorder = next(c for c in self.trainer.callbacks if isinstance(c, Recorder))
                write_report(self._folder, recorder.rows, failure=str(error))
            self._stop(f"error: {error}", 1)
        except OSError as error:
            self._stop(f"error: {error}", 1)
        except Interrupted as interruption:
            name = interruption.signal.name
            if self.trainer.is_global_zero:
                write_summary(
                    self._folder,
                    self.trainer,
                    self.model,
                    {"interrupted": True, "stopped_by": name},
                    experiment=self.experiment,
                    seed=self._seed,
                    checkpoint=self._folder / "last.ckpt",
                )
            self._stop(f"interrupted by {name}", 128 + interruption.signal)
        except SIGTERMException:
            self._stop("terminated", 143)
        except (KeyboardInterrupt, SystemExit):
            self._stop("interrupted", 130)
        finally:
            for logger in self.trainer.loggers:
                if isinstance(logger, WandbLogger):
                    logger.experiment.finish()  # or the next run of this process goes on with it

    @property
    def _folder(self) -> Path:
        """The run folder, which the first process has chosen."""
        return next(c for c in self.trainer.callbacks if isinstance(c, Recorder)).folder

    def _stop(self, what: str, status: int) -> NoReturn:
        if not self.trainer.is_global_zero:
            # The first process says how to go on; only a failure must end the others.
            if status == 1:
                print(what, file=sys.stderr)
            sys.exit(1 if status == 1 else 0)
        last = self._folder / "last.ckpt"
        hint = f"resume with: python train.py --ckpt_path {last}"
        hint = hint if last.exists() else "before the first checkpoint"
        print(f"{what}; {hint}", file=sys.stderr if status == 1 else sys.stdout)
        sys.exit(status)

    def test(self) -> dict[str, float]:
        """Metrics of the checkpoint on the test split."""
        try:
            return self.trainer.test(
                self.model,
                datamodule=self.datamodule,
                ckpt_path=str(self.resumed_from),
                weights_only=True,
                verbose=False,
            )[0]
        except (FloatingPointError, InputOutsideDomain) as error:
            sys.exit(f"error: {error}")

    def write_metrics(self, metrics: dict[str, float]) -> Path:
        """Write what :meth:`test` returned beside the checkpoint, of best.ckpt test-best.json."""
        path = self.resumed_from.with_name(f"test-{self.resumed_from.stem}.json")
        found = {"checkpoint": str(self.resumed_from), **metrics}
        with write_atomically(path) as file:
            json.dump(found, file, indent=2, allow_nan=False)
        return path

    def audit(self) -> Audit:
        """What :func:`flows.diagnostics.audit` says of the checkpoint on the test split."""
        self.datamodule.setup("test")
        inputs, *context = (tensor[:AUDITED] for tensor in self.datamodule.splits["test"])
        flow = load(self.resumed_from, self.model.flow)
        return audit(precise(flow), inputs, *context)


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Turn a user's mistake, or a missing extra, into one line on stderr and exit status 2."""
    try:
        yield
    except (ArgumentError, ValueError, OSError, ImportError, MisconfigurationException) as error:
        message = " ".join(str(error).split())
        # What jsonargparse says of the alternatives to the type that was meant.
        message = re.sub(r"Does not validate against any .*? Errors: - ", "", message)
        message = re.sub(r"- Expected a path but .*? accessible or invalid - ", "", message)
        message = re.sub(r" - Expected a <class '[\w.]+'>.*", "", message)
        print(f"error: {message}", file=sys.stderr)
        sys.exit(2)


def _quiet() -> None:
    """Only warnings from Lightning; offline unless the user says otherwise, never a prompt."""
    for name in ("pytorch_lightning", "lightning_fabric", "lightning.pytorch"):
        logging.getLogger(name).setLevel(logging.WARNING)
    # The run folder holds its config before the first checkpoint; the second is Lightning's own.
    warnings.filterwarnings("ignore", "Checkpoint directory .* exists and is not empty")
    warnings.filterwarnings("ignore", ".*isinstance\\(treespec, LeafSpec\\)")
    # An epoch that max_steps cuts short is not validated: the best one stays what it was.
    warnings.filterwarnings("ignore", ".*could not find the monitored key")
    # Lightning 2.6 still calls jsonargparse's old names.
    os.environ.setdefault("JSONARGPARSE_DEPRECATION_WARNINGS", "off")
    os.environ.setdefault("WANDB_MODE", "offline")


def _asks_for_help(args: list[str]) -> bool:
    return any(arg in ("-h", "--help", "--print_config") for arg in args)


def _named_files(args: list[str]) -> tuple[str | None, list[str]]:
    """The values of --ckpt_path and of every --config, needed before the rest can be parsed."""
    parser = ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--ckpt_path")
    parser.add_argument("-c", "--config", action="append", default=[])
    known, _ = parser.parse_known_args(args)
    return known.ckpt_path, known.config
