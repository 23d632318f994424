"""Weights as safetensors files: written, read, and refused if damaged."""

import builtins
import json
import struct
from pathlib import Path

import pytest
import torch
from torch import nn

import flows
from flows import AffineCoupling, Composite, Flow
from flows.distributions import Normal
from flows.nets import MLP

pytest.importorskip("safetensors")
from safetensors.torch import load_file, save_file  # noqa: E402

SMALL = {"layers": 2, "hidden_features": 8}
CONFIGS = {
    "RotationSplineFlow": {"features": 3, **SMALL},
    "MaskedSplineFlow": {"features": 3, **SMALL},
    "GaussianizationFlow": {"features": 3, "layers": 2, "context_features": 2},
    "VolumePreservingFlow": {"features": 3, **SMALL},
    "Glow": {"shape": [1, 4, 4], "levels": 1, "steps": 1, "hidden_features": 4, "classes": 3},
    "SylvesterVAE": {"shape": [1, 8, 8], "latent_features": 4},
}


def config_of(name: str) -> dict:
    return {"class_path": f"flows.recipes.{name}", "init_args": CONFIGS[name]}


def made(name: str) -> nn.Module:
    arguments = dict(CONFIGS[name])
    if "shape" in arguments:
        arguments["shape"] = tuple(arguments["shape"])
    flow = getattr(flows.recipes, name)(**arguments)
    for parameter in flow.parameters():
        nn.init.normal_(parameter, std=0.3)
    return flow


def assert_same_state(a: nn.Module, b: nn.Module) -> None:
    a, b = a.state_dict(), b.state_dict()
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]) and a[name].dtype == b[name].dtype, name


@pytest.mark.parametrize("name", CONFIGS)
def test_a_flow_comes_back_bit_for_bit(tmp_path, name):
    flow, path = made(name), tmp_path / "flow.safetensors"
    flows.save(flow, path, config_of(name))
    loaded = flows.load(path)
    assert type(loaded) is type(flow) and not loaded.training
    assert_same_state(loaded, flow)
    # What was loaded knows its description, and can be written again.
    flows.save(loaded, tmp_path / "again.safetensors")
    assert_same_state(flows.load(tmp_path / "again.safetensors"), flow)


def test_a_training_checkpoint_becomes_a_safetensors_file(tmp_path):
    flow = made("RotationSplineFlow")
    weights = {f"flow.{name}": value for name, value in flow.state_dict().items()}
    torch.save(
        {"state_dict": weights, "flow_config": config_of("RotationSplineFlow")},
        tmp_path / "best.ckpt",
    )
    flows.save(flows.load(tmp_path), tmp_path / "flow.safetensors")
    loaded = flows.load(str(tmp_path / "flow.safetensors"))
    x = torch.randn(5, 3)
    assert torch.equal(loaded(x), flow.eval()(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_weights_without_a_description_go_into_a_flow_that_is_handed_in(tmp_path, dtype):
    flow, other = made("RotationSplineFlow").to(dtype), made("RotationSplineFlow").to(dtype)
    path = tmp_path / "flow.safetensors"
    flows.save(flow, path)
    with pytest.raises(ValueError, match="does not say how its flow was built: pass one"):
        flows.load(path)
    assert flows.load(path, other) is other
    assert_same_state(other, flow)


def test_the_plain_functions_of_safetensors_read_and_write_the_same_files(tmp_path):
    flow, other = made("RotationSplineFlow"), made("RotationSplineFlow")
    save_file(flow.state_dict(), tmp_path / "theirs.safetensors")
    assert_same_state(flows.load(tmp_path / "theirs.safetensors", other), flow)
    flows.save(flow, tmp_path / "ours.safetensors", config_of("RotationSplineFlow"))
    other = made("RotationSplineFlow")
    other.load_state_dict(load_file(tmp_path / "ours.safetensors"))
    assert_same_state(other, flow)


def test_the_schedule_is_in_the_file_and_another_one_is_refused(tmp_path):
    path = tmp_path / "flow.safetensors"

    def rotation(schedule) -> Flow:
        return Flow(flows.Rotation(4, schedule), Normal(4))

    flows.save(rotation(flows.givens.crossing(4)), path)
    with pytest.raises(ValueError, match="belong to the schedule crossing"):
        flows.load(path, rotation(flows.givens.odd_even(4)))


def test_layers_that_share_a_conditioner_are_written(tmp_path):
    def flow() -> Flow:
        shared = MLP(2, 4, hidden_features=4)
        layers = [AffineCoupling(4, lambda i, o: shared, flip=flip) for flip in (False, True)]
        return Flow(Composite(layers), Normal(4))

    path, one, other = tmp_path / "flow.safetensors", flow(), flow()
    nn.init.normal_(one.transform.transforms[0].net.last.weight)
    flows.save(one, path)
    assert_same_state(flows.load(path, other), one)
    assert other.transform.transforms[0].net is other.transform.transforms[1].net


def test_writing_draws_no_random_numbers(tmp_path):
    flow = made("RotationSplineFlow")
    before = torch.get_rng_state()
    flows.save(flow, tmp_path / "flow.safetensors", config_of("RotationSplineFlow"))
    assert torch.equal(torch.get_rng_state(), before)


def test_a_config_of_another_flow_is_refused_and_nothing_written(tmp_path):
    path = tmp_path / "flow.safetensors"
    wrong = {"class_path": "flows.recipes.RotationSplineFlow", "init_args": {"features": 4}}
    with pytest.raises(ValueError, match="config does not describe this flow"):
        flows.save(made("RotationSplineFlow"), path, wrong)
    with pytest.raises(ValueError, match="may name only classes of flows, got torch.nn.Linear"):
        flows.save(made("RotationSplineFlow"), path, {"class_path": "torch.nn.Linear"})
    with pytest.raises(ValueError, match=r"path must end in .safetensors, got .*flow.ckpt"):
        flows.save(made("RotationSplineFlow"), tmp_path / "flow.ckpt")
    assert not list(tmp_path.iterdir())


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="found no file .*gone.safetensors"):
        flows.load(tmp_path / "gone.safetensors")


@pytest.fixture
def written(tmp_path) -> Path:
    path = tmp_path / "flow.safetensors"
    flows.save(made("RotationSplineFlow"), path, config_of("RotationSplineFlow"))
    return path


def test_truncated_files_are_refused(written):
    data, wrong = written.read_bytes(), {}
    for size in [*range(0, 40), *range(40, len(data), len(data) // 60), len(data) - 1]:
        written.write_bytes(data[:size])
        try:
            flows.load(written)
        except ValueError as error:
            assert str(written) in str(error) and "\n" not in str(error)
        except Exception as error:
            wrong[size] = repr(error)
        else:
            wrong[size] = "loaded"
    assert not wrong


def test_changed_bytes_of_the_header_are_refused_or_change_nothing(written):
    data, wrong, flow = bytearray(written.read_bytes()), {}, flows.load(written)
    (length,) = struct.unpack("<Q", data[:8])
    for place in range(0, 8 + length, 29):
        changed = bytearray(data)
        changed[place] ^= 0x15
        written.write_bytes(changed)
        try:
            assert_same_state(flows.load(written), flow)
        except ValueError as error:
            assert "\n" not in str(error)
        except Exception as error:
            wrong[place] = repr(error)
    assert not wrong


def packed(path: Path, header: object, data: bytes = b"") -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def described(text: str) -> dict:
    return {"__metadata__": {"flow_config": text}}


HOSTILE = {
    "an endless header": lambda path: path.write_bytes(struct.pack("<Q", 2**62)),
    "a huge header": lambda path: packed(path, b" " * (2**23 + 1)),
    "a tensor larger than the file": lambda path: packed(
        path, {"x": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}
    ),
    "a tensor stored in part": lambda path: packed(
        path, {"x": {"dtype": "F32", "shape": [2**20], "data_offsets": [0, 4]}}, bytes(4)
    ),
    "a deep description": lambda path: packed(path, described("[" * 100_000)),
    "a long description": lambda path: packed(path, described("[" + "0," * 2**20 + "0]")),
    "no json": lambda path: packed(path, described("{")),
    "a zip": lambda path: path.write_bytes(b"PK\x03\x04" + bytes(100)),
    "nothing": lambda path: path.write_bytes(b""),
}


@pytest.mark.parametrize("write", HOSTILE.values(), ids=HOSTILE.keys())
def test_what_is_no_safetensors_file_is_refused(tmp_path, write):
    path = tmp_path / "flow.safetensors"
    write(path)
    with pytest.raises(ValueError, match="flow.safetensors is not a readable safetensors file"):
        flows.load(path)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"class_path": "os.system"}, "may name only classes of flows, got os.system"),
        ({"class_path": "flows.Rotation", "init_args": {"features": 4}}, "must describe a Flow"),
        (
            {"class_path": "flows.recipes.RotationSplineFlow", "init_args": {"features": 10**6}},
            "does not belong",
        ),
        ([1], "must describe a Flow"),
        (3, "must describe a Flow"),
    ],
    ids=str,
)
def test_a_description_of_something_else_is_refused(tmp_path, config, message):
    path = packed(tmp_path / "flow.safetensors", described(json.dumps(config)))
    with pytest.raises(ValueError, match=message):
        flows.load(path)


def test_without_the_package_one_line_says_what_to_install(tmp_path, monkeypatch):
    real = builtins.__import__

    def without(name, *rest):
        if name.startswith("safetensors"):
            raise ImportError(name)
        return real(name, *rest)

    (tmp_path / "flow.safetensors").touch()
    monkeypatch.setattr(builtins, "__import__", without)
    message = r"need the safetensors package: pip install 'givens-flows\[export\]'"
    with pytest.raises(ImportError, match=message):
        flows.save(made("RotationSplineFlow"), tmp_path / "flow.safetensors")
    with pytest.raises(ImportError, match=message):
        flows.load(tmp_path / "flow.safetensors")
