"""Train a normalizing flow, test it, sample from it.

  python train.py                                       two moons, the default
  python train.py --config configs/images/digits.yaml   another experiment
  python train.py --model.lr=1e-3                       override any key
  python train.py --print_config                        the config with all keys
  python train.py --model.flow.help flows.recipes.Glow  keys of a model
  python train.py --ckpt_path runs/.../last.ckpt        resume a run
  python train.py --model.optimizer=NGPlus              another optimizer
  python train.py --trainer.logger=WandbLogger          Weights & Biases as well
  python train.py test --ckpt_path runs/.../best.ckpt
  python train.py audit --ckpt_path runs/.../best.ckpt  check its claims
  python train.py sample --ckpt_path runs/.../best.ckpt --temperature 0.8

Without a subcommand it fits. Each has --help of its own; that of fit lists all
keys.
"""

import argparse
import sys
from pathlib import Path
from typing import NoReturn

DEFAULT_CONFIG = str(Path(__file__).parent / "configs/toy/two_moons.yaml")


class Parser(argparse.ArgumentParser):
    """Raises what argparse would print in many lines."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message}; see {self.prog} --help")


def fit(args: list[str]) -> None:
    from flows.training.cli import RunCLI, one_line_errors

    with one_line_errors():
        cli = RunCLI(args, default_config=DEFAULT_CONFIG)
        cli.open_run()
    summary = cli.train()
    if cli.trainer.is_global_zero:
        print_metrics(summary)
        for path in sorted(cli.folder.iterdir()):
            print(f"  {path}")


def test(args: list[str]) -> None:
    from flows.training.cli import RunCLI, one_line_errors

    with one_line_errors():
        cli = RunCLI(args)
        cli.datamodule.setup("test")
        cli.model.initialize(cli.datamodule)
    metrics = cli.test()
    if cli.trainer.is_global_zero:
        print_metrics(metrics)


def audit(args: list[str]) -> None:
    from flows.training.cli import RunCLI, one_line_errors

    with one_line_errors():
        found = RunCLI(args).audit()
    print(found)
    sys.exit(0 if found.ok else 1)


def sample(args: list[str]) -> None:
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


def main(args: list[str]) -> None:
    commands = {"fit": fit, "test": test, "audit": audit, "sample": sample}
    if args and args[0] in ("-h", "--help"):
        print(__doc__.strip())
    elif args and args[0] in commands:
        commands[args[0]](args[1:])
    elif args and not args[0].startswith("-"):
        print(f"error: unknown command {args[0]}: expected {', '.join(commands)}", file=sys.stderr)
        sys.exit(2)
    else:
        fit(args)


if __name__ == "__main__":
    main(sys.argv[1:])
