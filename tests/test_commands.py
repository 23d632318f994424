"""Every command that the README, CONTRIBUTING, the site and --help show is one that works.

What trains or samples runs here, for one step. Benchmarks take minutes: here their options are
read, and tests/test_*benchmark*.py run them in short. ``make test`` and its like are what runs
these tests.
"""

import argparse
import importlib
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import train

pytestmark = pytest.mark.usefixtures("undrawn")

ROOT = Path(__file__).parents[1]
PAGES = ["README.md", "CONTRIBUTING.md", "docs/*.md", "flows/*/README.md"]
SHORT = [
    "--trainer.max_epochs=2",
    "--trainer.limit_train_batches=1",
    "--trainer.limit_val_batches=1",
    "--trainer.limit_test_batches=1",
    "--trainer.enable_progress_bar=false",
    "--pictures_every_n_epochs=0",
]
# Run by tests/training/test_processes.py.
PROCESSES = ("torchrun", "--trainer.strategy=ddp")


def shown() -> list[str]:
    """All commands: in shell blocks, in inline code, and in what train.py --help prints."""
    found = []
    for page in (path for pattern in PAGES for path in sorted(ROOT.glob(pattern))):
        text = page.read_text()
        for block in re.findall(r"```sh\n(.*?)```", text, re.DOTALL):
            found += block.replace("\\\n", " ").splitlines()
        plain = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
        found += re.findall(r"`((?:python|make|jupyter|pip)\s[^`]+)`", plain)
    found += re.findall(r"^  (python train\.py(?: \S+)*)", train.__doc__, re.MULTILINE)
    lines = (" ".join(re.sub(r"\s#.*", "", line).split()) for line in found)
    return list(dict.fromkeys(line for line in lines if line))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Where a user would stand, after some training."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in ("configs", "data", "docs"):
        (folder / name).symlink_to(ROOT / name)
    (folder / "file.csv").write_text(
        "a,b,hour\n" + "".join(f"{i},{i % 7},{i % 24}\n" for i in range(90))
    )
    (folder / "rows.csv").write_text("hour\n3\n12\n")
    return folder


@pytest.fixture(scope="module")
def run_of(folder):
    """The folder of a short run of an experiment, trained once."""
    runs = {}
    options = {
        "two_moons": [],
        "digits_by_class": ["--config=configs/images/digits_by_class.yaml"],
        "<table>": [
            *("--config=configs/tabular/breast_cancer.yaml", "--data=datasets.tabular.Table"),
            *("--data.path=file.csv", "--data.context=[hour]"),
            *("--model.flow.init_args.features=2", "--model.flow.init_args.context_features=1"),
        ],
    }

    def run_of(experiment: str) -> str:
        if experiment not in runs:
            root = folder / f"trained-{len(runs)}"
            train.main([*options[experiment], *SHORT, f"--trainer.default_root_dir={root}"])
            (runs[experiment],) = map(str, root.glob("*/*"))
        return runs[experiment]

    return run_of


def call(script, *arguments: str) -> None:
    """A script's main; what prints help ends by SystemExit."""
    try:
        script(list(arguments))
    except SystemExit as end:
        assert not end.code, end.code


def run_train(words: list[str], run_of) -> None:
    fits = not words or words[0] not in ("list", "test", "audit", "sample")
    asks = any("help" in word or word == "--print_config" for word in words)
    words = [re.sub(r"^runs/\.\.\.", "runs/two_moons/<time>", word) for word in words]
    words = ["runs/two_moons/<time>" if word == "..." else word for word in words]
    named = re.compile(r"runs/(two_moons|digits_by_class|<table>|<experiment>)/<time>")
    words = [
        named.sub(lambda found: run_of(found[1].replace("<experiment>", "two_moons")), word)
        for word in words
    ]
    words = [word.replace("<file>", "file") for word in words]
    call(train.main, *words, *(SHORT if fits and not asks else []))


def read_options(module: str, words: list[str], monkeypatch) -> None:
    """Have a script read its options, no more."""

    class Read(Exception):
        pass

    parse = argparse.ArgumentParser.parse_args

    def stop(parser, *rest):
        parse(parser, *rest)
        raise Read

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", stop)
    monkeypatch.setattr(sys, "argv", [module, *words])
    with pytest.raises(Read):
        importlib.import_module(module).main()


def test_there_are_commands_of_every_kind():
    kinds = {" ".join(command.split()[:2]) for command in shown()}
    assert {"python train.py", "python -m", "make train", "pip install"} <= kinds
    assert len(shown()) > 40


@pytest.mark.parametrize("command", shown())
def test_commands_work(command, folder, run_of, monkeypatch):
    monkeypatch.chdir(folder)
    monkeypatch.setenv("WANDB_MODE", "offline")
    if any(word in command for word in PROCESSES):
        pytest.skip("run by tests/training/test_processes.py")
    match shlex.split(command):
        case ["make", "train", *arguments]:
            for words in arguments or [""]:
                run_train(shlex.split(words.removeprefix("ARGS=")), run_of)
        case ["make", *targets]:
            subprocess.run(["make", "-n", *targets], cwd=ROOT, check=True, capture_output=True)
        case ["python", "train.py", *words]:
            run_train(words, run_of)
        case ["python", "-m", module, *words] if module.startswith("benchmarks."):
            read_options(module, words, monkeypatch)
        case ["python", "-m", "pytest", *_, path]:
            assert (ROOT / path).exists()
        case ["pip", "install", "-c", constraints, "-e", project]:
            assert (ROOT / constraints).is_file()
            known = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
            extras = set(re.search(r"\[(.*)\]", project)[1].split(","))
            assert extras <= set(known["optional-dependencies"])
        case ["pip", "install", project]:
            known = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
            name, extra = re.fullmatch(r"([\w-]+)\[(\w+)\]", project).groups()
            assert name == known["name"] and extra in known["optional-dependencies"]
        case ["jupyter", "lab"]:
            subprocess.run([sys.executable, "-m", "jupyterlab", "--version"], check=True)
        case [".", ".venv/bin/activate"]:
            pass  # of every virtual environment
        case _:
            pytest.fail(f"no test runs {command}")
