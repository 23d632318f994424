"""flows.load: trained flows come back, and damaged or hostile files are refused."""

import io
import os
import pickle
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from torch import nn

import flows
from flows import Flow
from flows.distributions import Normal
from flows.recipes import RotationSplineFlow
from flows.transforms import ActNorm, Composite, Rotation

OPTIONS = {"features": 3, "layers": 1, "hidden_features": 4, "blocks": 0, "bins": 3}
CONFIG = {"class_path": "flows.recipes.RotationSplineFlow", "init_args": OPTIONS}


def trained(**options) -> RotationSplineFlow:
    flow = RotationSplineFlow(**{**OPTIONS, **options})
    flow(torch.randn(20, flow.distribution.shape[0]))  # initializes ActNorm
    for parameter in flow.parameters():
        nn.init.normal_(parameter, std=0.3)
    return flow


def checkpoint(flow: nn.Module, **changes) -> dict:
    """What DensityEstimator leaves in a file, with entries changed or, if None, left out."""
    contents = {
        "epoch": 3,
        "state_dict": {f"flow.{name}": value for name, value in flow.state_dict().items()},
        "flow_config": CONFIG,
        **changes,
    }
    return {name: value for name, value in contents.items() if value is not None}


def written(folder: Path, contents: object, name: str = "last.ckpt") -> Path:
    torch.save(contents, folder / name)
    return folder / name


def assert_same_density(loaded: Flow, flow: Flow) -> None:
    x = torch.randn(10, flow.distribution.shape[0])
    assert torch.equal(loaded(x), flow.eval()(x))


def test_a_checkpoint_gives_back_the_flow_in_eval_mode(tmp_path):
    flow = trained()
    loaded = flows.load(written(tmp_path, checkpoint(flow)))
    assert type(loaded) is RotationSplineFlow
    assert not any(module.training for module in loaded.modules())
    assert_same_density(loaded, flow)
    assert_same_density(flows.load(str(tmp_path / "last.ckpt")), flow)


def test_a_run_folder_gives_its_best_flow_else_its_last(tmp_path):
    best, last = trained(), trained()
    written(tmp_path, checkpoint(last))
    assert_same_density(flows.load(tmp_path), last)
    written(tmp_path, checkpoint(best), "best.ckpt")
    assert_same_density(flows.load(str(tmp_path)), best)


def test_home_sign_is_understood(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    flow = trained()
    written(tmp_path, checkpoint(flow))
    assert_same_density(flows.load("~/last.ckpt"), flow)
    assert_same_density(flows.load("~"), flow)


def test_nested_configs_are_built(tmp_path):
    flow = Flow(Composite([ActNorm(2), Rotation(2, init="haar")]), Normal(2))
    rotation = {"class_path": "flows.Rotation", "init_args": {"features": 2}}
    actnorm = {"class_path": "flows.transforms.ActNorm", "init_args": {"features": 2}}
    chain = {"class_path": "flows.Composite", "init_args": {"transforms": [actnorm, rotation]}}
    normal = {"class_path": "flows.distributions.Normal", "init_args": {"shape": 2}}
    config = {
        "class_path": "flows.Flow",
        "init_args": {"transform": chain, "distribution": normal},
    }
    loaded = flows.load(written(tmp_path, checkpoint(flow, flow_config=config)))
    assert_same_density(loaded, flow)


def test_weights_go_into_a_flow_that_is_handed_in(tmp_path):
    flow, mine = trained(), trained().train()
    path = written(tmp_path, checkpoint(flow, flow_config=None))
    with pytest.raises(ValueError, match=r"does not say how its flow was built: pass one"):
        flows.load(path)
    assert flows.load(path, mine) is mine
    assert not mine.training
    assert_same_density(mine, flow)


def test_what_is_missing_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="expected best.ckpt or last.ckpt in .*neither"):
        flows.load(tmp_path)
    with pytest.raises(FileNotFoundError, match="found no file .*gone.ckpt"):
        flows.load(tmp_path / "gone.ckpt")


@pytest.mark.parametrize("new_format", [True, False], ids=["zip", "legacy"])
def test_a_truncated_file_is_refused(tmp_path, new_format):
    buffer = io.BytesIO()
    torch.save(checkpoint(trained()), buffer, _use_new_zipfile_serialization=new_format)
    data, path = buffer.getvalue(), tmp_path / "last.ckpt"
    wrong = {}
    for size in [*range(0, 40), *range(40, len(data), len(data) // 150), len(data) - 1]:
        path.write_bytes(data[:size])
        try:
            flows.load(path)
        except ValueError as error:
            assert str(path) in str(error)
        except Exception as error:
            wrong[size] = repr(error)
        else:
            wrong[size] = "loaded"
    assert not wrong


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\n",
        b"# a comment\n",
        b"seed_everything: 0\ntrainer: {max_epochs: 50}\n",
        b"version https://git-lfs.github.com/spec/v1\n",
        b"<!DOCTYPE html>",
        b"PK\x03\x04",
        bytes(100),
        bytes(range(256)),
        pickle.dumps({"state_dict": {}}),
    ],
    ids=lambda data: repr(data[:12]),
)
def test_garbage_is_refused(tmp_path, data):
    path = tmp_path / "last.ckpt"
    path.write_bytes(data)
    with pytest.raises(ValueError, match="last.ckpt is not a readable checkpoint") as error:
        flows.load(path)
    assert "weights_only" not in str(error.value) and "\x1b" not in str(error.value)


@pytest.mark.parametrize(
    "contents", [[1, 2], {"weights": {}}, {"state_dict": 3}, torch.zeros(2)], ids=str
)
def test_files_that_are_no_checkpoints_are_refused(tmp_path, contents):
    with pytest.raises(ValueError, match="is no training checkpoint: it holds no state_dict"):
        flows.load(written(tmp_path, contents))


@pytest.mark.parametrize("change", ["more", "fewer", "renamed", "reshaped", "no tensor"])
def test_weights_that_do_not_fit_are_refused(tmp_path, change):
    weights = checkpoint(trained())["state_dict"]
    name = next(name for name in weights if name.endswith("log_scale"))
    value = weights[name]
    if change == "more":
        weights["flow.extra"] = value
    elif change == "no tensor":
        weights[name] = "x"
    elif change == "reshaped":
        weights[name] = value[:2]
    else:
        del weights[name]
        if change == "renamed":
            weights[name + "s"] = value
    path = written(tmp_path, checkpoint(trained(), state_dict=weights))
    with pytest.raises(ValueError, match=r"last.ckpt does not fit this flow: .*(extra|log_scale)"):
        flows.load(path)


@pytest.mark.parametrize(
    "options", [{"features": 4}, {"layers": 2}, {"hidden_features": 5}, {"bins": 4}], ids=str
)
def test_weights_of_another_architecture_are_refused(tmp_path, options):
    config = {**CONFIG, "init_args": {**OPTIONS, **options}}
    with pytest.raises(ValueError, match="does not fit this flow|belong to the schedule"):
        flows.load(written(tmp_path, checkpoint(trained(), flow_config=config)))
    with pytest.raises(ValueError, match="does not fit this flow|belong to the schedule"):
        flows.load(written(tmp_path, checkpoint(trained())), trained(**options))


@pytest.mark.parametrize("options", [{"featurez": 3}, {"layers": "two"}, {"features": 1}], ids=str)
def test_arguments_that_the_class_does_not_take_are_refused(tmp_path, options):
    # As another version of this library may have written them.
    config = {**CONFIG, "init_args": {**OPTIONS, **options}}
    with pytest.raises(ValueError, match="RotationSplineFlow cannot be built from ") as error:
        flows.load(written(tmp_path, checkpoint(trained(), flow_config=config)))
    assert "\n" not in str(error.value)


def test_a_bad_argument_beside_built_parts_is_refused_in_one_line(tmp_path):
    rotation = {"class_path": "flows.Rotation", "init_args": {"features": 2}}
    chain = {"class_path": "flows.Composite", "init_args": {"transforms": [rotation]}}
    config = {"class_path": "flows.Flow", "init_args": {"transform": chain, "scale": 2}}
    with pytest.raises(ValueError, match="scale") as error:
        flows.load(written(tmp_path, checkpoint(trained(), flow_config=config)))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("class_path", "message"),
    [
        ("flows.recipes.Gone", "this version of flows has no flows.recipes.Gone"),
        ("flows.gone.Flow", "this version of flows has no flows.gone.Flow"),
        ("flows.flow.load", "expected the name of a layer or flow, got flows.flow.load"),
        ("flows.checkpoint.importlib", "expected the name of a layer or flow"),
        ("flows.checkpoint.importlib.import_module", "this version of flows has no"),
        ("os.system", "may name only classes of flows, got os.system"),
        ("torch.nn.Linear", "may name only classes of flows, got torch.nn.Linear"),
        ("builtins.eval", "may name only classes of flows"),
        ("eval", "may name only classes of flows"),
        ("", "may name only classes of flows"),
    ],
)
def test_only_layers_and_flows_of_this_library_are_built(tmp_path, class_path, message):
    arguments = {"features": 2, "in_features": 2, "out_features": 2}
    outer = {"class_path": class_path, "init_args": arguments}
    inner = {"class_path": "flows.Composite", "init_args": {"transforms": [outer]}}
    for config in (outer, inner):
        with pytest.raises(ValueError, match=message):
            flows.load(written(tmp_path, checkpoint(trained(), flow_config=config)))


@pytest.mark.parametrize("class_path", ["flows.distributions.Normal", "flows.transforms.ActNorm"])
def test_a_config_of_something_else_than_a_flow_is_refused(tmp_path, class_path):
    arguments = {"shape": 2} if class_path.endswith("Normal") else {"features": 2}
    config = {"class_path": class_path, "init_args": arguments}
    with pytest.raises(
        ValueError,
        match="must describe a Flow, or a module with .*, got ",
    ):
        flows.load(written(tmp_path, checkpoint(trained(), flow_config=config)))


@pytest.mark.parametrize("module", ["hostile", "flows_hostile", "flowshostile"])
def test_foreign_modules_are_not_even_imported(tmp_path, monkeypatch, module):
    (tmp_path / f"{module}.py").write_text("import pathlib\npathlib.Path('ran').touch()\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    config = {"class_path": f"{module}.Flow", "init_args": {}}
    with pytest.raises(ValueError, match="may name only classes of flows"):
        flows.load(written(tmp_path, checkpoint(trained(), flow_config=config)))
    assert module not in sys.modules and not (tmp_path / "ran").exists()


class Bomb:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("place", ["state_dict", "flow_config", "callbacks"])
def test_code_in_a_file_is_refused_and_does_not_run(tmp_path, place):
    bomb = tmp_path / "boom"
    path = written(tmp_path, checkpoint(trained(), **{place: {"flow.x": Bomb(bomb)}}))
    torch.load(path, weights_only=False)  # it is armed
    bomb.rmdir()
    with pytest.raises(ValueError, match="last.ckpt is not a readable checkpoint"):
        flows.load(path)
    assert not bomb.exists()


def test_loading_needs_no_lightning(tmp_path):
    path = written(tmp_path, checkpoint(trained()))
    code = (
        "import sys, flows\n"
        f"print(flows.load({str(path)!r}).sample(2).shape)\n"
        "print(sorted({'pytorch_lightning', 'lightning', 'torchmetrics', 'matplotlib'}"
        " & set(sys.modules)))\n"
    )
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout == "torch.Size([2, 3])\n[]\n"


def archive(path: Path, data: bytes, name: str = "data.pkl", **options) -> Path:
    """A pickle packed as torch packs them."""
    with zipfile.ZipFile(path, "w", **options) as packed:
        packed.writestr(f"archive/{name}", data)
        packed.writestr("archive/byteorder", "little")
        packed.writestr("archive/version", "3\n")
    return path


def holding(body: bytes) -> bytes:
    """The pickle of {"state_dict": {}, "x": body}."""
    return b"\x80\x02}(X\n\x00\x00\x00state_dict}X\x01\x00\x00\x00x" + body + b"u."


LIST = b"]q\x01(" + b"K\x07" * 1000 + b"e"
GREEDY = {
    "bytearray": b"cbuiltins\nbytearray\nJ\x00\xca\x9a;\x85R",
    "tensor": b"ctorch\nTensor\nJ\x00\xca\x9a;\x85R",
    "sets": b"c__builtin__\nset\nq\x020](" + LIST + b"h\x02h\x01\x85R" * 1000 + b"e",
    "ordered": b"ccollections\nOrderedDict\nq\x020](" + LIST + b"h\x02h\x01\x85R" * 1000 + b"e",
    "text": b"c_codecs\nencode\nq\x020X\x04\x00\x00\x00abcdq\x01X\x06\x00\x00\x00utf-32\x86R",
    "braces": b"](" + b"}" * 2_000_001 + b"e",
}


@pytest.mark.parametrize("name", ["data.pkl", "DATA.PKL"])
@pytest.mark.parametrize("body", GREEDY.values(), ids=GREEDY)
def test_files_that_ask_for_memory_are_refused(tmp_path, body, name):
    path = archive(tmp_path / "last.ckpt", holding(body), name)
    with pytest.raises(ValueError, match="last.ckpt is not a readable .*(asks|calls|operations)"):
        flows.load(path)


def test_archives_that_two_readers_read_differently_are_refused(tmp_path):
    path = tmp_path / "last.ckpt"
    archive(path, holding(b"K\x01"), compression=zipfile.ZIP_DEFLATED)
    with pytest.raises(ValueError, match="its contents are compressed"):
        flows.load(path)
    good = archive(path, holding(b"K\x01")).read_bytes()
    path.write_bytes(b"x" * 10 + good)
    with pytest.raises(ValueError, match="its directory is not where it should be"):
        flows.load(path)
    path.write_bytes(good[:-2] + b"\x05\x00hello")
    with pytest.raises(ValueError, match="does not end as an archive does"):
        flows.load(path)
    with pytest.warns(UserWarning, match="Duplicate"), zipfile.ZipFile(path, "w") as packed:
        packed.writestr("archive/data.pkl", holding(b"K\x01"))
        packed.writestr("archive/data.pkl", holding(b"K\x02"))
    with pytest.raises(ValueError, match="two files of one name"):
        flows.load(path)


def test_tensors_that_are_larger_than_what_is_stored_are_refused(tmp_path):
    wide = torch.zeros(1).expand(10**12)
    path = written(tmp_path, checkpoint(trained(), state_dict={"flow.x": wide}))
    with pytest.raises(ValueError, match=r"shape \(1000000000000,\) is stored in part only"):
        flows.load(path)


def nested(levels: int) -> list:
    value = [1]
    for _ in range(levels):
        value = [value] * 10
    return value


DEEP: list = [1]
for _ in range(200):
    DEEP = [DEEP]
RECIPE = "flows.recipes.RotationSplineFlow"
IMAGES = {"shape": [1, 4, 4], "levels": 1, "steps": 1, "hidden_features": 4}


@pytest.mark.parametrize(
    ("class_path", "options"),
    {
        "features": ("flows.Rotation", {"features": 10**8}),
        "hidden": (RECIPE, OPTIONS | {"hidden_features": 10**7}),
        "layers": (RECIPE, OPTIONS | {"layers": 2000, "blocks": 2000}),
        "levels": (
            "flows.recipes.Glow",
            IMAGES | {"grey_levels": 10**8, "marginals": "empirical"},
        ),
        "shape": ("flows.EmpiricalCDF", {"shape": [1000, 1000], "bins": 1000}),
        "aliases": (RECIPE, OPTIONS | {"x": nested(12)}),
        "depth": (RECIPE, OPTIONS | {"x": DEEP}),
    }.values(),
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_flows_far_larger_than_their_file_are_not_built(tmp_path, class_path, options):
    config = {"class_path": class_path, "init_args": options}
    path = written(tmp_path, checkpoint(trained(), flow_config=config))
    with pytest.raises(ValueError, match="does not belong to|too large or too deep"):
        flows.load(path)
