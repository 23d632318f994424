"""Samplers as ONNX files, run by onnxruntime."""

import importlib.util

import pytest
import torch
from torch import nn

from flows import Flow, Rotation, Sylvester, export
from flows.distributions import Normal
from flows.recipes import (
    GaussianizationFlow,
    Glow,
    MaskedSplineFlow,
    RotationSplineFlow,
    SplineCouplingFlow,
    SylvesterVAE,
    VolumePreservingFlow,
    VolumePreservingGlow,
)

pytest.importorskip("onnxscript")
onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")

SMALL = {"layers": 1, "hidden_features": 4, "blocks": 1}
GLOW = {"grey_levels": 16, "levels": 1, "steps": 1, "hidden_features": 4}

CASES = {
    "rotation spline": lambda: RotationSplineFlow(3, bins=4, **SMALL),
    "spline coupling, lu": lambda: SplineCouplingFlow(3, bins=4, mixing="lu", **SMALL),
    "gaussianization": lambda: GaussianizationFlow(3, layers=1, bins=4),
    "volume preserving": lambda: VolumePreservingFlow(4, components=3, **SMALL),
    "masked spline": lambda: MaskedSplineFlow(2, bins=3, **SMALL),
    "glow": lambda: Glow((1, 8, 8), **GLOW),
    "glow given labels": lambda: Glow((1, 8, 8), classes=3, **GLOW),
    "volume preserving glow": lambda: VolumePreservingGlow((1, 4, 4), **GLOW),
}


def away_from_the_identity(flow: Flow) -> Flow:
    for parameter in flow.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return flow.eval()


@torch.no_grad()
@pytest.mark.parametrize("name", CASES)
def test_onnxruntime_makes_the_samples_of_the_flow(tmp_path, name):
    flow, path = away_from_the_identity(CASES[name]()), tmp_path / "sampler.onnx"
    given = (torch.zeros(1, dtype=torch.int64),) if name.endswith("labels") else ()
    export.save_onnx(flow, path, *given)
    assert [entry.name for entry in tmp_path.iterdir()] == ["sampler.onnx"]
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for rows in (1, 2, 9):
        feed = {"noise": torch.randn(rows, *flow.distribution.shape)}
        embedded = ()
        if given:
            feed["context"] = torch.randint(0, 3, (rows,))
            embedded = (flow.embedding_net(feed["context"]),)
        expected = flow.transform.inverse(feed["noise"], *embedded)[0]
        (found,) = session.run(["samples"], {key: value.numpy() for key, value in feed.items()})
        torch.testing.assert_close(torch.from_numpy(found), expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_a_rotation_is_one_constant_matrix(tmp_path):
    flow = away_from_the_identity(GaussianizationFlow(5, layers=1, bins=3))
    export.save_onnx(flow, tmp_path / "sampler.onnx")
    graph = onnx.load(tmp_path / "sampler.onnx").graph
    operations = [node.op_type for node in graph.node]
    assert operations.count("MatMul") + operations.count("Gemm") == 1
    assert not {"Sin", "Cos"} & set(operations)


def test_what_has_no_sampler_is_refused_and_nothing_written(tmp_path):
    with pytest.raises(ValueError, match="a sampler needs a Flow .* got SylvesterVAE"):
        export.save_onnx(SylvesterVAE((1, 8, 8), latent_features=2), tmp_path / "x.onnx")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("mixing", "operator"), [("angles", "signbit"), ("householder", "solve_triangular")]
)
def test_an_operator_that_onnx_lacks_is_named_and_nothing_written(tmp_path, mixing, operator):
    flow = Flow(Sylvester(3, rank=2, mixing=mixing), Normal(3))
    with pytest.raises(ValueError, match=f"this flow has no ONNX form: .*{operator}") as error:
        export.save_onnx(flow, tmp_path / "x.onnx")
    assert "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("missing", ["onnx", "onnxscript"])
def test_without_the_packages_one_line_says_what_to_install(tmp_path, monkeypatch, missing):
    real = importlib.util.find_spec
    monkeypatch.setattr(export, "find_spec", lambda name: None if name == missing else real(name))
    with pytest.raises(ImportError, match=r"pip install 'givens-flows\[export\]'"):
        export.save_onnx(GaussianizationFlow(2, layers=1), tmp_path / "x.onnx")


@torch.no_grad()
def test_a_plain_network_with_a_rotation_needs_torch_alone(tmp_path):
    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rotation = Rotation(4, init="haar")

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.tanh(self.rotation(x)[0])

    network, x, path = export.freeze(Network()), torch.randn(3, 4), tmp_path / "network.onnx"
    torch.onnx.export(network, (x,), path, verbose=False)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), network(x), rtol=1e-5, atol=1e-5)
