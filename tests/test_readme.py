"""What the README, CONTRIBUTING and the pages of the site show runs as it stands."""

import re
from pathlib import Path

import pytest
import torch

from flows.recipes import RotationSplineFlow

ROOT = Path(__file__).parents[1]
PAGES = {
    str(path.relative_to(ROOT)): path.read_text()
    for path in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(ROOT.glob("docs/*.md")))
}
# A block that stands on several pages runs once.
BLOCKS: dict[str, str] = {}
for name, text in PAGES.items():
    for number, code in enumerate(re.findall(r"```python\n(.*?)```", text, re.DOTALL)):
        BLOCKS.setdefault(code, f"{name}, block {number}")


@pytest.fixture
def trained(tmp_path) -> Path:
    """A run folder as train.py leaves it, of an untrained flow."""
    flow = RotationSplineFlow(2, layers=1)
    config = {
        "class_path": "flows.recipes.RotationSplineFlow",
        "init_args": {"features": 2, "layers": 1},
    }
    weights = {f"flow.{name}": value for name, value in flow.state_dict().items()}
    torch.save({"state_dict": weights, "flow_config": config}, tmp_path / "best.ckpt")
    return tmp_path


def test_there_are_blocks_to_run():
    assert len(BLOCKS) >= 12


@pytest.mark.parametrize("code", list(BLOCKS)[1:], ids=list(BLOCKS.values())[1:])
def test_python_blocks_run(code, trained):
    for library in re.findall(r"^import (normflows|zuko)", code, re.MULTILINE):
        pytest.importorskip(library)  # of the extra `bench`
    code = code.replace("runs/two_moons/<time>", str(trained))
    exec(compile(code, "block", "exec"), {})


def test_the_first_block_runs_and_learns(capsys):
    code, name = next(iter(BLOCKS.items()))
    exec(compile(code, name, "exec"), {})
    nats = float(capsys.readouterr().out.split()[0])
    assert nats < 3.0  # the entropy of the data is 2.84


@pytest.mark.parametrize("page", PAGES)
def test_files_and_configs_it_names_exist(page):
    folders = "benchmarks|configs|datasets|docs|flows|notebooks|tests"
    for name in re.findall(rf"(?:{folders})/[\w/.-]+\.\w+", PAGES[page]):
        assert (ROOT / name).exists(), name
