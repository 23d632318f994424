"""The audit finds what is wrong, and nothing where nothing is."""

import copy
import math

import pytest
import torch
from torch import Tensor, nn

from flows import (
    ActNorm,
    Composite,
    Flow,
    Rotation,
    SplineCoupling,
    diagnostics,
    orthogonal,
)
from flows.diagnostics import audit
from flows.distributions import Normal
from flows.nets import MLP
from flows.recipes import Glow, RotationSplineFlow, SylvesterVAE
from flows.transforms.base import InverseNotAvailable, Transform

SMALL = {"layers": 2, "hidden_features": 8, "blocks": 0, "bins": 4}


@pytest.fixture(autouse=True)
def small_grid(monkeypatch):
    monkeypatch.setattr(diagnostics, "GRID", 257)


def trained(features: int = 2, **options) -> RotationSplineFlow:
    flow = RotationSplineFlow(features=features, **{**SMALL, **options})
    context = options.get("context_features")
    flow(torch.randn(100, features), None if context is None else torch.randn(100, context))
    for parameter in flow.parameters():
        nn.init.normal_(parameter, std=0.2)
    return flow


def with_layer(layer: Transform, features: int = 2) -> Flow:
    return Flow(Composite([ActNorm(features), layer]), Normal(features)).eval()


def test_a_good_flow_is_in_bounds():
    found = audit(trained(), torch.randn(50, 2))
    assert found.ok, found
    names = [finding.name for finding in found.findings]
    assert names == [
        "finite", "inverse", "log-det", "precision", "orthogonality", "integral"
    ]  # fmt: skip
    assert found["orthogonality"].words.endswith("of 2 rotations")
    assert str(found).endswith("Everything is in bounds.")


def test_float64_is_held_to_more():
    found = audit(trained(3).double(), torch.randn(50, 3, dtype=torch.float64))
    assert found.ok, found
    assert found["inverse"].bound < 1e-7 and found["inverse"].value < 1e-9
    assert not any(finding.name in ("precision", "integral") for finding in found.findings)


@pytest.mark.parametrize("given", [{"context_features": 2}, {"classes": 3}], ids=str)
def test_a_context_is_passed_on(given):
    context = torch.randn(40, 2) if "context_features" in given else torch.arange(40) % 3
    flow = RotationSplineFlow(features=2, **SMALL, **given)
    flow(torch.randn(40, 2), context)
    found = audit(flow, torch.randn(40, 2), context)
    assert found.ok and found["integral"].value is not None, found


def test_noise_is_drawn_once_for_images():
    flow = Glow((1, 4, 4), grey_levels=8, levels=1, steps=1, hidden_features=4)
    images = torch.randint(0, 8, (30, 1, 4, 4)) / 8
    flow(images)
    found = audit(flow, images)
    assert found.ok and found["log-det"].value < 1e-9, found


def test_other_models_are_audited_as_far_as_it_goes():
    flow = SylvesterVAE((1, 4, 4), grey_levels=8, latent_features=2, hidden_features=4)
    found = audit(flow, torch.randint(0, 8, (20, 1, 4, 4)) / 8)
    assert found.ok and found["inverse"].value is None
    assert "SylvesterVAE has no transform" in str(found)


def test_nothing_in_the_flow_changes():
    flow = trained().train()
    before = copy.deepcopy(flow.state_dict())
    state = torch.get_rng_state()
    inputs = torch.randn(10, 2)
    torch.set_rng_state(state)
    audit(flow, inputs)
    assert all(module.training for module in flow.modules())
    assert torch.equal(torch.get_rng_state(), state)
    for name, value in flow.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert all(parameter.grad is None for parameter in flow.parameters())


class Faulty(Transform):
    """y = 2 x, with one thing wrong."""

    def __init__(self, fault: str) -> None:
        super().__init__()
        self.fault = fault

    def forward(self, inputs: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        log_det = inputs.shape[1] * math.log(1.0 if self.fault == "log-det" else 2.0)
        outputs = 2 * inputs + (math.nan if self.fault == "finite" else 0.0)
        if self.fault == "precision" and inputs.dtype == torch.float32:
            log_det += 0.01
        return outputs, torch.full((len(inputs),), log_det, dtype=inputs.dtype)

    def inverse(self, inputs: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        outputs = inputs / (3 if self.fault == "inverse" else 2)
        return outputs, -self.forward(inputs)[1]


@pytest.mark.parametrize(
    ("fault", "seen"),
    {
        "inverse": {"inverse"},
        "log-det": {"log-det", "integral"},
        "precision": {"precision", "integral"},
        "finite": {"finite", "inverse", "precision", "integral"},
    }.items(),
)
def test_a_fault_is_found_and_named(fault, seen):
    found = audit(with_layer(Faulty(fault)), torch.randn(50, 2))
    failed = {finding.name for finding in found.findings if finding.ok is False}
    assert failed == seen and not found.ok
    assert f"Out of bounds: {', '.join(f.name for f in found.findings if f.name in seen)}." in str(
        found
    )
    if fault == "inverse":
        assert "layer 1, Faulty" in found["inverse"].words


def test_a_layer_without_an_inverse_is_said_to_have_none():
    class OneWay(Faulty):
        def inverse(self, inputs: Tensor, context: Tensor | None = None) -> None:
            raise InverseNotAvailable

    found = audit(with_layer(OneWay("none")), torch.randn(50, 2))
    assert found.ok and found["inverse"].ok is None and found["integral"].ok is None
    assert "a layer has none" in str(found) and found["log-det"].value < 1e-9


def test_a_rotation_that_is_none_is_found():
    layer = Rotation(4)
    layer.base[0, 0] += 1e-3
    found = audit(with_layer(layer, 4), torch.randn(20, 4))
    assert found["orthogonality"].ok is False and found["orthogonality"].value > 5e-4


def test_orthogonal_weights_of_conditioners_count():
    net = MLP(1, 11, hidden_features=4, blocks=0)
    linear = next(module for module in net.modules() if isinstance(module, nn.Linear))
    orthogonal(linear)
    flow = with_layer(SplineCoupling(2, lambda i, o: net, bins=4, tail_bound=3.0))
    found = audit(flow, torch.randn(20, 2))
    assert found["orthogonality"].words.endswith("of 1 rotations"), found
    assert found["orthogonality"].value < 1e-6


def test_a_grid_too_coarse_says_so(monkeypatch):
    monkeypatch.setattr(diagnostics, "GRID", 9)
    found = audit(trained(), torch.randn(20, 2))
    assert found["integral"].ok is None and "too coarse" in found["integral"].words


def test_many_features_need_asking():
    flow = with_layer(Rotation(1030), 1030)
    inputs = torch.randn(2, 1030)
    assert "not measured: 1030 features" in audit(flow, inputs)["log-det"].words
    assert audit(flow, inputs, jacobian_rows=1)["log-det"].value < 1e-9


def test_no_inputs_are_refused():
    with pytest.raises(ValueError, match="at least 1, got 0"):
        audit(trained(), torch.empty(0, 2))
    with pytest.raises(ValueError, match="jacobian_rows must be at least 0, got -1"):
        audit(trained(), torch.randn(3, 2), jacobian_rows=-1)
