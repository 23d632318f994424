"""Train a normalizing flow, test it, sample from it.

  python train.py                                       two moons, the default
  python train.py list                                  all experiments
  python train.py --config configs/images/digits.yaml   one of them
  python train.py --model.lr=1e-3                       override any key
  python train.py --print_config                        the config with all keys
  python train.py --model.flow.help flows.recipes.Glow  keys of a model
  python train.py --ckpt_path runs/.../last.ckpt        resume a run
  python train.py --model.optimizer=NGPlus              another optimizer
  python train.py --trainer.logger=WandbLogger          Weights & Biases as well
  python train.py test --ckpt_path runs/.../best.ckpt   metrics, as JSON as well
  python train.py audit --ckpt_path runs/.../best.ckpt  check its claims
  python train.py sample --ckpt_path runs/.../best.ckpt --temperature 0.8

Without a subcommand (fit, list, test, audit, sample) it fits. Each has --help
of its own; fit --help lists all keys. Experiments in configs/:
"""

import argparse
import os
import sys
import textwrap
from contextlib import AbstractContextManager
from pathlib import Path
from typing import NoReturn

CONFIGS = Path(__file__).parent / "configs"
DEFAULT_CONFIG = str(CONFIGS / "toy/two_moons.yaml")


class Parser(argparse.ArgumentParser):
    """Takes whole names only, and raises what argparse would print in many lines."""

    def __init__(self, prog: str, description: str) -> None:
        super().__init__(prog, description=description, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message}; see {self.prog} --help")


def fit(args: list[str]) -> None:
    with waiting("loading"):
        from flows.training.cli import RunCLI, one_line_errors

    with one_line_errors(), waiting("trying data and flow together"):
        cli = RunCLI(args, default_config=DEFAULT_CONFIG)
        cli.open_run()
    summary = cli.train()
    if cli.trainer.is_global_zero:
        print_metrics(summary)
        print(f"open {cli.folder / 'report.html'}; beside it are")
        print(f"  {', '.join(sorted(path.name for path in cli.folder.iterdir()))}")


def list_experiments(args: list[str]) -> None:
    description = "Show the experiments in configs/, and what came out of them on one CPU core."
    try:
        Parser("train.py list", description=description).parse_args(args)
    except ValueError as error:
        fail(str(error))
    print("python train.py --config configs/NAME.yaml, where NAME is")
    for path in sorted(CONFIGS.glob("*/*.yaml")):
        name = path.relative_to(CONFIGS).with_suffix("").as_posix()
        # The first comment is the command, the second one says what it is.
        print(f"  {name:32}{path.read_text().splitlines()[1].removeprefix('# ')}")


def test(args: list[str]) -> None:
    with waiting("loading"):
        from flows.training.cli import RunCLI, one_line_errors

    with one_line_errors(), waiting("trying data and flow together"):
        cli = RunCLI(args)
        cli.datamodule.setup("test")
        cli.model.initialize(cli.datamodule)
    metrics = cli.test()
    if cli.trainer.is_global_zero:
        print_metrics(metrics)
        with one_line_errors():
            print(cli.write_metrics(metrics))


def audit(args: list[str]) -> None:
    with waiting("loading"):
        from flows.training.cli import RunCLI, one_line_errors

    with one_line_errors(), waiting("auditing"):
        found = RunCLI(args).audit()
    print(found)
    sys.exit(0 if found.ok else 1)


def sample(args: list[str]) -> None:
    with waiting("loading"):
        from flows.training.cli import one_line_errors
        from flows.training.sampling import read_context, write_samples

    parser = Parser("train.py sample", description="Draw samples from a flow.")
    parser.add_argument("--ckpt_path", required=True, help="run folder or checkpoint")
    parser.add_argument(
        "--num_samples", type=int, help="64, or 8 for each label or row of context"
    )
    parser.add_argument("--labels", help="classes to draw from, as in 3 or 0,1,2")
    parser.add_argument(
        "--context", help="rows to draw given: .npy, or .csv with or without a header"
    )
    parser.add_argument(
        "--temperature", type=float, default=1.0, help="times the noise's standard deviation"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the noise")
    parser.add_argument(
        "--output",
        help="file ending in .npy: (num_samples, ...), or (rows, num_samples, ...) given "
        "labels or context; .csv: a line per sample; .png: a line or panel per label or row",
    )
    with one_line_errors():
        given = parser.parse_args(args)
        labels = context = None
        if given.labels is not None:
            try:
                labels = [int(label) for label in given.labels.split(",")]
            except ValueError:
                raise ValueError(
                    f"labels must be whole numbers with commas between, got {given.labels!r}."
                ) from None
        if given.context is not None:
            context = read_context(given.context)
        path = write_samples(
            given.ckpt_path,
            given.num_samples,
            labels=labels,
            context=context,
            temperature=given.temperature,
            seed=given.seed,
            output=given.output,
        )
    print(path)


def print_metrics(metrics: dict) -> None:
    for name, value in metrics.items():
        if name.startswith("test/"):
            print(f"{name:20} {value:.4f}")


def print_help() -> None:
    print(__doc__.strip())
    for folder in sorted(path for path in CONFIGS.iterdir() if path.is_dir()):
        names = ", ".join(sorted(path.stem for path in folder.glob("*.yaml")))
        print(
            textwrap.fill(
                names, 80, initial_indent=f"  {folder.name:9}", subsequent_indent=" " * 11
            )
        )


def fail(message: str) -> NoReturn:
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


def waiting(what: str) -> AbstractContextManager:
    """Says on a terminal, and only there, that something takes its time."""
    from rich.console import Console

    # Of processes that train together the first one speaks.
    return Console(stderr=True, quiet=os.environ.get("LOCAL_RANK", "0") != "0").status(what)


def main(args: list[str]) -> None:
    commands = {
        "fit": fit,
        "list": list_experiments,
        "test": test,
        "audit": audit,
        "sample": sample,
    }
    if args and args[0] in ("-h", "--help"):
        print_help()
    elif args and args[0] in commands:
        commands[args[0]](args[1:])
    elif args and not args[0].startswith("-"):
        fail(f"unknown command {args[0]}: expected {', '.join(commands)}")
    else:
        fit(args)


if __name__ == "__main__":
    main(sys.argv[1:])
