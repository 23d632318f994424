"""What the README, CONTRIBUTING and the pages of the site show runs as it stands."""

import re
from importlib.util import find_spec
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


@pytest.mark.parametrize("code", BLOCKS, ids=list(BLOCKS.values()))
def test_python_blocks_run(code, trained, capsys, request):
    for library in re.findall(r"^import (normflows|zuko|onnxruntime)", code, re.MULTILINE):
        if not find_spec(library):
            pytest.skip(f"needs {library}")
    if "import zuko" in code:
        request.getfixturevalue("zuko")
    exec(compile(code.replace("runs/two_moons/<time>", str(trained)), "block", "exec"), {})
    if "a banana" in code:
        nats = float(capsys.readouterr().out.split()[0])
        assert nats < 3.0  # the entropy of the data is 2.84


@pytest.mark.parametrize("page", PAGES)
def test_files_and_configs_it_names_exist(page):
    folders = "benchmarks|configs|datasets|docs|flows|notebooks|tests"
    for name in re.findall(rf"(?:{folders})/[\w/.-]+\.\w+", PAGES[page]):
        assert (ROOT / name).exists(), name
