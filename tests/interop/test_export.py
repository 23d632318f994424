"""Flows as exported programs: they say what the flow says, for any number of rows."""

import io
import subprocess
import sys

import pytest
import torch
from nflows.distributions import StandardNormal
from torch import Tensor, nn

from flows import Flow, Rotation, Sylvester, export, givens, orthogonal
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
from flows.transforms import Composite, Householder1x1, HouseholderRotation, LULinear, SVDLinear

SMALL = {"layers": 1, "hidden_features": 4, "blocks": 1}
GLOW = {"grey_levels": 16, "levels": 1, "steps": 2, "hidden_features": 4}
IMAGE = (1, 8, 8)

CASES = {
    "rotation spline": lambda: RotationSplineFlow(3, bins=4, **SMALL),
    "spline coupling": lambda: SplineCouplingFlow(3, bins=4, **SMALL),
    "masked spline": lambda: MaskedSplineFlow(3, bins=4, **SMALL),
    "gaussianization": lambda: GaussianizationFlow(3, layers=2, bins=4),
    "volume preserving": lambda: VolumePreservingFlow(3, components=3, **SMALL),
    "glow": lambda: Glow(IMAGE, **GLOW),
    "glow, splines of histograms": lambda: Glow(
        IMAGE, coupling="spline", marginals="empirical", dequantize="variational", **GLOW
    ),
    "volume preserving glow": lambda: VolumePreservingGlow(IMAGE, **GLOW),
    "rotation spline, householder": lambda: RotationSplineFlow(3, mixing="householder", **SMALL),
    "spline coupling, lu": lambda: SplineCouplingFlow(3, mixing="lu", **SMALL),
    "glow, lu": lambda: Glow(IMAGE, mixing="lu", **GLOW),
    "given columns": lambda: RotationSplineFlow(3, context_features=2, **SMALL),
    "given labels": lambda: Glow(IMAGE, classes=3, **GLOW),
}


def inputs_of(flow: Flow, rows: int) -> Tensor:
    if isinstance(flow, Glow | VolumePreservingGlow):
        return torch.randint(0, 16, (rows, *IMAGE)) / 16
    return torch.randn(rows, 3)


def context_of(name: str, rows: int) -> tuple[Tensor, ...]:
    if name == "given columns":
        return (torch.randn(rows, 2),)
    return (torch.randint(0, 3, (rows,)),) if name == "given labels" else ()


@pytest.fixture(params=CASES)
def case(request) -> tuple[str, Flow]:
    """A flow that has seen data, and whose layers are not the identity."""
    flow = CASES[request.param]()
    flow(inputs_of(flow, 50), *context_of(request.param, 50))
    for parameter in flow.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return request.param, flow.eval()


def assert_equal_to_rounding(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=2e-5, atol=2e-4)


def targets(program: torch.export.ExportedProgram) -> set[str]:
    modules = program.graph_module.modules()
    graphs = [m.graph for m in modules if isinstance(m, torch.fx.GraphModule)]
    return {str(node.target) for graph in graphs for node in graph.nodes}


@torch.no_grad()
def test_log_prob_is_that_of_the_flow_for_any_number_of_rows(case):
    name, flow = case
    examples = inputs_of(flow, 1), *context_of(name, 1)
    state = torch.get_rng_state()
    program = export.log_prob(flow, *examples)
    assert torch.equal(torch.get_rng_state(), state)
    assert not any("givens_flows" in target for target in targets(program))
    module = program.module()
    for rows in (0, 1, 2, 9):
        given = inputs_of(flow, rows), *context_of(name, rows)
        torch.manual_seed(rows)  # of those that draw noise between the grey levels
        found = module(*given)
        torch.manual_seed(rows)
        assert_equal_to_rounding(found, flow.log_prob(*given))


@torch.no_grad()
def test_the_sampler_makes_the_samples_of_the_flow_for_any_number_of_rows(case):
    name, flow = case
    program = export.sampler(flow, *context_of(name, 1))
    assert not any("givens_flows" in target for target in targets(program))
    module = program.module()
    for rows in (0, 1, 2, 9):
        context = context_of(name, rows)
        noise = torch.randn(rows, *flow.distribution.shape)
        embedded = (flow.embedding_net(*context),) if context else ()
        expected = flow.transform.inverse(noise, *embedded)[0]
        assert_equal_to_rounding(module(noise, *context), expected)


@torch.no_grad()
def test_the_sampler_with_the_flows_noise_is_sample():
    flow = VolumePreservingFlow(3, **SMALL).eval()
    module = export.sampler(flow).module()
    torch.manual_seed(1)
    expected = flow.sample(20)
    torch.manual_seed(1)
    assert_equal_to_rounding(module(flow.distribution.sample(20)), expected)


def test_a_saved_program_runs_without_this_library(tmp_path):
    flow = RotationSplineFlow(3, **SMALL).eval()
    torch.export.save(export.log_prob(flow, torch.zeros(1, 3)), tmp_path / "flow.pt2")
    x = torch.randn(4, 3)
    torch.save(x, tmp_path / "x.pt")
    code = (
        "import sys, torch\n"
        "program = torch.export.load('flow.pt2')\n"
        "torch.save(program.module()(torch.load('x.pt')), 'y.pt')\n"
        "assert 'flows' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)
    assert_equal_to_rounding(torch.load(tmp_path / "y.pt"), flow(x).detach())


@pytest.mark.parametrize("memory", ["checkpoint", "reversible"])
def test_memory_makes_no_difference(memory):
    flow = RotationSplineFlow(3, memory=memory, **SMALL).eval()
    x = torch.randn(4, 3)
    program = export.log_prob(flow, x)
    assert_equal_to_rounding(program.module()(x), flow(x).detach())


@torch.no_grad()
@pytest.mark.parametrize("features", [6, 64])
def test_a_flow_itself_can_be_exported_with_its_angles(features):
    # Of more than a few features the matrix is built by products.
    flow = Flow(Rotation(features, givens.crossing(features), init="haar"), Normal(features))
    nn.init.normal_(flow.transform.raw_angles)
    flow.eval()
    x = torch.randn(5, features)
    program = torch.export.export(flow, (x,), dynamic_shapes=({0: torch.export.Dim("rows")},))
    assert not any("givens_flows" in target for target in targets(program))
    assert_equal_to_rounding(program.module()(x[:2]), flow(x[:2]))
    # What the schedule remembers from then on is made of numbers.
    angles = flow.transform.raw_angles
    u = givens.matrix(angles, flow.transform.schedule, impl="rounds")
    assert_equal_to_rounding(u, givens.matrix(angles, flow.transform.schedule, impl="reference"))


@torch.no_grad()
def test_numeric_inverses_become_programs():
    flow = Flow(Sylvester(3), Normal(3))
    nn.init.normal_(flow.transform.raw)
    flow.eval()
    noise = torch.randn(5, 3)
    module = export.sampler(flow).module()
    assert_equal_to_rounding(module(noise), flow.transform.inverse(noise)[0])


def test_values_out_of_the_domain_are_refused_by_the_program():
    flow = Glow(IMAGE, classes=3, **GLOW).eval()
    module = export.log_prob(flow, torch.zeros(1, *IMAGE), torch.tensor([0])).module()
    module(torch.zeros(2, *IMAGE), torch.tensor([0, 2]))
    with pytest.raises(RuntimeError, match=r"inputs must lie in \[0, 1\]"):
        module(torch.full((2, *IMAGE), 1.5), torch.tensor([0, 2]))
    with pytest.raises(RuntimeError, match="labels must be 0 to 2"):
        module(torch.zeros(2, *IMAGE), torch.tensor([0, 3]))


LAYERS = {
    "rotation": lambda: Rotation(4, init="haar"),
    "rotation, limited": lambda: Rotation(4, angle_limit=0.5),
    "householder": lambda: HouseholderRotation(4),
    "householder, thin": lambda: HouseholderRotation(6, 2),
    "householder 1x1": lambda: Householder1x1(4),
    "lu": lambda: LULinear(4, init="haar"),
    "svd": lambda: SVDLinear(4, init="haar"),
}


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS.keys())
def test_a_frozen_layer_is_the_layer(make, dtype):
    layer = make().to(dtype)
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    frozen = export.freeze(layer)
    features = getattr(layer, "features", 4)
    shapes = [(5, features)]
    if isinstance(layer, LULinear | Householder1x1):
        shapes = [(5, features, 2, 3)]
    eps = torch.finfo(dtype).eps
    for shape in shapes:
        x = torch.randn(shape, dtype=dtype)
        for one, other in ((frozen, layer), (frozen.inverse, layer.inverse)):
            found, expected = one(x), other(x)
            size = expected[0].abs().max().item()
            torch.testing.assert_close(found[0], expected[0], rtol=0, atol=200 * eps * size)
            torch.testing.assert_close(found[1], expected[1], rtol=20 * eps, atol=20 * eps)
    assert not list(frozen.parameters()) or isinstance(layer, SVDLinear)


def test_freezing_leaves_the_flow_and_keeps_what_is_shared():
    shared = Rotation(4)
    flow = Flow(Composite([shared, SVDLinear(4), shared]), Normal(4))
    frozen = export.freeze(flow)
    assert flow.training and all(p.requires_grad for p in flow.parameters())
    assert flow.transform.transforms[0] is shared
    one, _, other = frozen.transform.transforms
    assert one is other and not isinstance(one, Rotation)
    assert not any(module.training for module in frozen.modules())
    assert not frozen.training and not any(p.requires_grad for p in frozen.parameters())


def test_orthogonal_weights_of_a_plain_network_become_plain():
    network = nn.Sequential(orthogonal(nn.Linear(3, 3)), nn.Tanh(), nn.Linear(3, 2))
    frozen = export.freeze(network)
    x = torch.randn(5, 3)
    torch.testing.assert_close(frozen(x), network(x).detach())
    assert frozen.state_dict().keys() == {"0.weight", "0.bias", "2.weight", "2.bias"}
    program = torch.export.export(frozen, (x,))
    torch.testing.assert_close(program.module()(x), network(x).detach())


def test_a_plain_network_with_a_rotation_is_exported():
    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rotation = Rotation(4, init="haar")

        def forward(self, x: Tensor) -> Tensor:
            return torch.tanh(x @ self.rotation.matrix().mT)

    network, x = Network().eval(), torch.randn(5, 4)
    program = torch.export.export(network, (x,))
    torch.testing.assert_close(program.module()(x), network(x).detach())


def test_what_cannot_be_exported_is_named():
    with pytest.raises(ValueError, match="a sampler needs a Flow .* got SylvesterVAE"):
        export.sampler(SylvesterVAE((1, 8, 8), latent_features=2))
    with pytest.raises(ValueError, match="a sampler needs a Flow .* got StandardNormal"):
        export.sampler(Flow(Rotation(2), StandardNormal([2])))
    with pytest.raises(ValueError, match=r"inputs must hold at least one row, got \(0, 2\)"):
        export.log_prob(Flow(Rotation(2), Normal(2)), torch.zeros(0, 2))


def test_a_program_is_a_file_like_any_other():
    flow = GaussianizationFlow(2, layers=1, bins=3).eval()
    buffer = io.BytesIO()
    torch.export.save(export.sampler(flow), buffer)
    buffer.seek(0)
    noise = torch.randn(4, 2)
    with torch.no_grad():
        expected = flow.transform.inverse(noise)[0]
    assert_equal_to_rounding(torch.export.load(buffer).module()(noise), expected)


def test_a_layer_that_does_more_than_ours_is_left_as_it_is():
    class Further(Rotation):
        def forward(self, inputs, context=None):
            outputs, logabsdet = super().forward(inputs, context)
            return outputs + 5, logabsdet

    layer, x = Further(3, init="haar"), torch.randn(4, 3)
    assert torch.equal(export.freeze(layer)(x)[0], layer(x)[0])
