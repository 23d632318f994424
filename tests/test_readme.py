"""What the README shows runs as it stands."""

import re
from pathlib import Path

import pytest
import torch

from flows.recipes import RotationSplineFlow

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


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
    assert len(BLOCKS) == 8


@pytest.mark.parametrize("index", range(1, len(BLOCKS)))
def test_python_blocks_run(index, trained):
    code = BLOCKS[index].replace("runs/two_moons/<time>", str(trained))
    exec(compile(code, f"README block {index}", "exec"), {})


def test_the_first_block_runs_and_learns(capsys):
    exec(compile(BLOCKS[0], "README block 0", "exec"), {})
    nats = float(capsys.readouterr().out.split()[0])
    assert nats < 3.0  # the entropy of the data is 2.84


def test_files_and_configs_it_names_exist():
    for name in re.findall(r"(?:configs|docs|flows|notebooks)/[\w/.]+\.\w+", README):
        assert (ROOT / name).exists(), name
