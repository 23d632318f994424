"""Randomized layers: exact but for weight gradients, which are unbiased and keep little."""

import copy
import json
import pickle
import sys

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parametrize

from benchmarks import randomized_autodiff, timing
from benchmarks.randomized_autodiff import accounted_mb, paper_rows, saved_bytes
from flows import Composite, orthogonal
from flows.nets import MADE, MLP, ConvNet, randomize
from flows.nets.made import MaskedLinear
from flows.nets.randomized import BitReLU
from flows.recipes import Glow, MaskedSplineFlow, RotationSplineFlow

METHODS = {
    "shared": {"per_sample": False},
    "per sample": {"per_sample": True},
    "with replacement": {"method": "with_replacement", "per_sample": False},
    "with replacement, per sample": {"method": "with_replacement", "per_sample": True},
    "rademacher": {"method": "rademacher", "per_sample": False},
}
LAYERS = {
    "linear": (lambda: nn.Linear(21, 5), (7, 21)),
    "linear, no bias": (lambda: nn.Linear(21, 5, bias=False), (7, 21)),
    "linear, more axes": (lambda: nn.Linear(21, 5), (2, 3, 21)),
    "linear, one vector": (lambda: nn.Linear(21, 5), (21,)),
    "linear, no rows": (lambda: nn.Linear(21, 5), (0, 21)),
    "masked": (lambda: MaskedLinear(torch.arange(21), torch.arange(5) * 4), (7, 21)),
    "orthogonal": (lambda: orthogonal(nn.Linear(21, 5)), (7, 21)),
    "convolution": (lambda: nn.Conv2d(3, 4, 3, padding=1), (2, 3, 5, 7)),
    "convolution, 1x1": (lambda: nn.Conv2d(3, 4, 1, bias=False), (2, 3, 5, 7)),
    "convolution, all options": (
        lambda: nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=(2, 1), dilation=2, groups=2),
        (2, 4, 9, 8),
    ),
    "convolution, same": (lambda: nn.Conv2d(3, 4, (3, 2), padding="same"), (2, 3, 5, 7)),
    "convolution, valid": (lambda: nn.Conv2d(3, 4, 3, padding="valid"), (2, 3, 5, 7)),
    "convolution, circular": (
        lambda: nn.Conv2d(3, 4, 3, padding=1, padding_mode="circular"),
        (2, 3, 5, 7),
    ),
    "convolution, orthogonal": (lambda: orthogonal(nn.Conv2d(3, 4, 2)), (2, 3, 5, 7)),
    "convolution, one image": (lambda: nn.Conv2d(3, 4, 3), (3, 5, 7)),
    "convolution, no images": (lambda: nn.Conv2d(3, 4, 3), (0, 3, 5, 7)),
}
each_method = pytest.mark.parametrize("options", METHODS.values(), ids=METHODS.keys())
each_layer = pytest.mark.parametrize(("make", "shape"), LAYERS.values(), ids=LAYERS.keys())


def gradients(module: nn.Module, inputs: Tensor, cotangent: Tensor) -> tuple[Tensor, dict]:
    """Outputs, and gradients by name, "inputs" among them."""
    inputs = inputs.detach().requires_grad_()
    parameters = dict(module.named_parameters())
    outputs = module(inputs)
    found = torch.autograd.grad(outputs, [inputs, *parameters.values()], cotangent)
    return outputs.detach(), dict(zip(["inputs", *parameters], found, strict=True))


def pair(make, shape, dtype=torch.float64, **options) -> tuple[nn.Module, nn.Module, tuple]:
    """A layer as it is, the same randomized, and what ``gradients`` takes."""
    exact = make().to(dtype)
    inputs = torch.randn(shape, dtype=dtype)
    cotangent = torch.randn_like(exact(inputs))
    return exact, randomize(copy.deepcopy(exact), **options), (inputs, cotangent)


def is_exact(name: str) -> bool:
    return "weight" not in name


# Torch's own, of an even kernel.
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning")
@each_method
@each_layer
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_all_but_weight_gradients_are_exact_to_the_bit(make, shape, dtype, options):
    exact, layer, given = pair(make, shape, dtype, keep=0.2, **options)
    (outputs, expected), (found_outputs, found) = (gradients(m, *given) for m in (exact, layer))
    assert torch.equal(found_outputs, outputs)
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        if is_exact(name):
            assert torch.equal(gradient, expected[name]), name
        elif given[0].numel():
            assert gradient.shape == expected[name].shape and gradient.dtype == dtype
            assert gradient.any() and not torch.equal(gradient, expected[name])
        else:
            assert not gradient.any()


def draws(layer: nn.Module, given: tuple, count: int) -> Tensor:
    """So many of its weight gradients."""
    outputs = layer(given[0])
    found = [torch.autograd.grad(outputs, layer.weight, given[1])[0]]
    for _ in range(count - 1):
        found.append(torch.autograd.grad(layer(given[0]), layer.weight, given[1])[0])
    return torch.stack(found)


@each_method
@pytest.mark.parametrize(
    "name", ["linear", "linear, more axes", "masked", "convolution", "convolution, all options"]
)
def test_the_mean_over_seeds_is_the_exact_gradient(name, options):
    exact, layer, given = pair(*LAYERS[name], keep=0.2, **options)
    expected = gradients(exact, *given)[1]["weight"]
    found = draws(layer, given, 400)
    error, deviation = found.mean(0) - expected, found.std(0) / 400**0.5
    # In norm, and each number: of some hundred a few lie beyond three standard errors, and with
    # them their column, whose picks are the same.
    assert error.norm() <= 3 * deviation.norm()
    assert (error.abs() <= 3 * deviation + 1e-12).double().mean() > 0.9


@pytest.mark.parametrize("keep", [0.1, 0.5])
@each_method
def test_the_variance_is_that_of_the_formula(keep, options):
    d, rows = 20, 6
    exact, layer, given = pair(lambda: nn.Linear(d, 3), (rows, d), keep=keep, **options)
    expected = gradients(exact, *given)[1]["weight"]
    inputs, cotangent = given
    if options["per_sample"]:
        unit = (inputs.square().sum(1) * cotangent.square().sum(1)).sum()
    else:
        unit = expected.square().sum()
    k = round(keep * d)
    ratio = (d - k if "method" not in options else d - 1) / k
    found = (draws(layer, given, 1500) - expected).square().sum((1, 2)) / unit
    # Within three standard errors, which are below a tenth of it.
    error = found.std() / 1500**0.5
    assert error < 0.1 * ratio
    assert abs(found.mean() - ratio) <= 3 * error


def test_every_layer_and_call_draws_anew_and_a_seed_repeats_it():
    _, net, given = pair(lambda: MLP(6, 4, hidden_features=16), (5, 6), keep=0.3)
    nn.init.normal_(net.last.weight)
    torch.manual_seed(1)
    first, second = (gradients(net, *given)[1] for _ in range(2))
    torch.manual_seed(1)
    again = gradients(net, *given)[1]
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["first.weight"], second["first.weight"])


def test_a_call_draws_one_seed_in_training_and_none_in_eval():
    layer = randomize(nn.Linear(20, 3), keep=0.5)
    inputs = torch.randn(4, 20)
    torch.manual_seed(5)
    torch.randint(2**62, ())
    expected = torch.get_rng_state()
    torch.manual_seed(5)
    layer(inputs).sum().backward()
    assert torch.equal(torch.get_rng_state(), expected)
    layer.eval()(inputs).sum().backward()
    assert torch.equal(torch.get_rng_state(), expected)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning")
@each_layer
def test_in_eval_mode_and_with_everything_kept_gradients_are_exact(make, shape):
    exact, layer, given = pair(make, shape, keep=0.2)
    expected = gradients(exact, *given)[1]
    state = torch.get_rng_state()
    for module in (layer.eval(), randomize(layer.train(), keep=1)):
        found = gradients(module, *given)[1]
        assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert torch.equal(torch.get_rng_state(), state)


# --- memory ------------------------------------------------------------------------------------


@each_method
@pytest.mark.parametrize("keep", [0.05, 0.1, 0.5])
@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (lambda: nn.Linear(300, 7), (64, 300)),
        (lambda: nn.Conv2d(8, 5, 3, padding=1), (4, 8, 16, 16)),
        (lambda: nn.Sequential(nn.Linear(9, 300), nn.ReLU(), nn.Linear(300, 300)), (64, 9)),
    ],
    ids=["linear", "convolution", "ReLU between two"],
)
def test_what_is_kept_is_a_small_part_of_the_inputs(make, shape, keep, options):
    exact, inputs = make(), torch.randn(shape, requires_grad=True)
    layer = randomize(copy.deepcopy(exact), keep, **options)
    whole = saved_bytes(exact, inputs)
    assert whole >= 4 * inputs.numel()
    assert saved_bytes(layer, inputs) <= (keep + 0.05) * whole


def test_the_count_of_memory_is_the_papers_and_our_layers_keep_it():
    rows = paper_rows()
    assert len(rows) == 12
    for row in rows:
        assert row["accounted_mb"] == pytest.approx(row["paper_mb"], abs=0.05)
        if row["network"] == "fully connected":  # the other keeps what its pooling needs
            assert row["measured_mb"] == pytest.approx(row["paper_mb"], abs=0.05)


def test_the_count_of_memory_worked_out_by_hand():
    network = nn.Sequential(nn.Linear(5, 3), nn.ReLU(), nn.Linear(3, 2, bias=False))
    weights = 4 * (5 * 3 + 3 + 3 * 2)
    assert accounted_mb(network, (5,), 1.0, batch=16) == (weights + 16 * 4 * (5 + 3)) / 1e6
    assert accounted_mb(network, (5,), 0.5, batch=16) == (weights + 16 * 16 + 16 * 3 / 8) / 1e6


def test_nothing_is_kept_for_a_weight_that_is_not_learned():
    for name in ("linear", "convolution"):
        exact, layer, (inputs, cotangent) = pair(*LAYERS[name], keep=0.2)
        inputs.requires_grad_()
        for module in (exact, layer):
            module.weight.requires_grad_(False)
        outputs = layer(inputs)
        assert saved_bytes(layer, inputs) == 0
        found = torch.autograd.grad(outputs, [inputs, layer.bias], cotangent)
        expected = torch.autograd.grad(exact(inputs), [inputs, exact.bias], cotangent)
        assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("shape", [(), (7,), (3, 5, 2), (4, 8), (0, 3)], ids=str)
def test_the_relu_is_exact_and_keeps_bits(shape, inplace):
    exact, layer, given = pair(lambda: nn.ReLU(inplace=inplace), shape, keep=0.1)
    special = torch.tensor([torch.nan, torch.inf, -torch.inf, 0.0, -0.0]).double()
    for values in (given[0], special):
        cotangent = torch.full_like(values, torch.inf)
        leaf = values.clone().requires_grad_()
        (expected,), (found,) = (
            torch.autograd.grad(module(leaf.clone()), leaf, cotangent) for module in (exact, layer)
        )
        torch.testing.assert_close(found, expected, atol=0, rtol=0, equal_nan=True)
        outputs = layer(values.clone())
        torch.testing.assert_close(outputs, exact(values.clone()), atol=0, rtol=0, equal_nan=True)
    leaf = torch.randn(1000, requires_grad=True)
    assert saved_bytes(nn.Sequential(layer), leaf.clone()) == 125


def test_the_relu_has_all_its_derivatives():
    leaf = torch.randn(9, dtype=torch.float64, requires_grad=True)
    relu = randomize(nn.ReLU())
    assert torch.autograd.gradcheck(relu, leaf) and torch.autograd.gradgradcheck(relu, leaf)


# --- flows -------------------------------------------------------------------------------------


def shaken(flow: nn.Module, inputs: Tensor) -> nn.Module:
    """Fitted to the inputs, and away from the identity."""
    with torch.no_grad():
        flow(inputs)
        for parameter in flow.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return flow


def grey_levels(shape: tuple) -> Tensor:
    return torch.randint(256, shape).double() / 256


FLOWS = {
    "vectors": (lambda memory: RotationSplineFlow(3, layers=2, knots=4, memory=memory), (9, 3)),
    "images": (lambda memory: Glow((2, 4, 4), steps=2, memory=memory), (6, 2, 4, 4)),
    "masked": (lambda memory: MaskedSplineFlow(3, layers=2, memory=memory), (9, 3)),
}
each_flow = pytest.mark.parametrize(("make", "shape"), FLOWS.values(), ids=FLOWS.keys())


def step(flow: nn.Module, inputs: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    torch.manual_seed(3)
    flow.zero_grad()
    log_prob = flow(inputs)
    log_prob.mean().backward()
    return log_prob.detach(), {name: p.grad.clone() for name, p in flow.named_parameters()}


@each_flow
def test_of_a_flow_only_the_conditioners_weights_have_noisy_gradients(make, shape):
    exact = shaken(make("store").double(), inputs := grey_levels(shape))
    flow = randomize(copy.deepcopy(exact), keep=0.3)
    if "Glow" in type(flow).__name__:
        # Its noise between grey levels would come from another state.
        flow.transform.transforms[0].forward = exact.transform.transforms[0].forward = (
            lambda inputs, context=None: (inputs, inputs.new_zeros(len(inputs)))
        )
    (expected_log_prob, expected), (log_prob, found) = step(exact, inputs), step(flow, inputs)
    assert torch.equal(log_prob, expected_log_prob)
    noisy = {name for name in found if not torch.equal(found[name], expected[name])}
    assert noisy and all(".net." in name and name.endswith("weight") for name in noisy)


@each_flow
@pytest.mark.parametrize("memory", ["checkpoint", "reversible"])
def test_chains_that_repeat_their_layers_repeat_the_draws(make, shape, memory):
    stored = shaken(make("store").double(), inputs := grey_levels(shape))
    lean = make(memory).double()
    lean.load_state_dict(stored.state_dict())
    for flow in (stored, lean):
        randomize(flow, keep=0.3)
    (log_prob, expected), (lean_log_prob, found) = step(stored, inputs), step(lean, inputs)
    torch.testing.assert_close(lean_log_prob, log_prob)
    torch.testing.assert_close(found, expected, atol=1e-9, rtol=1e-9)
    assert any(isinstance(part, Composite) and part.memory == memory for part in lean.modules())


# --- conversion --------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [lambda: MLP(2, 3), lambda: MADE(2, 3), lambda: ConvNet(2, 3)])
def test_weights_load_either_way(make):
    exact, net = make(), randomize(make())
    parameters = list(net.parameters())
    assert list(net.state_dict()) == list(exact.state_dict())
    net.load_state_dict(exact.state_dict())
    exact.load_state_dict(net.state_dict())
    randomize(net, keep=0.5)
    assert all(map(lambda a, b: a is b, net.parameters(), parameters))
    for other in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert str(other) == str(net) and "keep=0.5" in str(net)


def test_again_changes_what_is_kept():
    net = randomize(MLP(2, 3, activation="relu"), keep=0.5)
    classes = [type(part) for part in net.modules()]
    assert randomize(net, keep=0.2, per_sample=False) is net
    assert [type(part) for part in net.modules()] == classes and BitReLU in classes
    assert "keep=0.2, per_sample=False" in str(net.last) and "0.5" not in str(net)


def test_parametrized_weights_stay_parametrized():
    layer = randomize(orthogonal(nn.Linear(20, 20)), keep=0.3)
    weight = layer.weight
    torch.testing.assert_close(weight @ weight.mT, torch.eye(20), atol=1e-5, rtol=0)
    plain = nn.Linear(20, 20)
    assert parametrize.type_before_parametrizations(plain) is nn.Linear  # others stay as they are
    twin = copy.deepcopy(layer)
    inputs, cotangent = torch.randn(5, 20), torch.randn(5, 20)
    results = []
    for module in (layer, twin, randomize(twin, keep=0.3)):
        torch.manual_seed(2)
        results.append(gradients(module, inputs, cotangent)[1])
    for found in results[1:]:
        assert all(torch.equal(found[name], results[0][name]) for name in found)
    parametrize.remove_parametrizations(layer, "weight")
    assert torch.equal(layer.weight, weight) and type(layer) is type(randomize(plain, keep=0.3))
    later = orthogonal(plain)
    assert gradients(later, inputs, cotangent)[1]["parametrizations.weight.original0"].any()


def test_subclasses_with_a_forward_of_their_own_stay_as_they_are():
    class Doubled(nn.Linear):
        def forward(self, inputs):
            return 2 * super().forward(inputs)

    net = nn.Sequential(nn.Linear(3, 3), Doubled(3, 3))
    randomize(net)
    assert type(net[1]) is Doubled
    with pytest.raises(ValueError, match="module must hold one of Linear, .*, got Doubled"):
        randomize(net[1])


@pytest.mark.parametrize("keep", [0, -0.1, 1.1, float("nan")])
def test_a_part_that_is_none_is_refused(keep):
    with pytest.raises(ValueError, match="keep must be greater than 0 and at most 1, got"):
        randomize(nn.Linear(3, 3), keep)


def test_other_methods_are_refused():
    with pytest.raises(ValueError, match="method must be one of .*, got 'gaussian'"):
        randomize(nn.Linear(3, 3), method="gaussian")
    with pytest.raises(ValueError, match="needs per_sample=False, got True"):
        randomize(nn.Linear(3, 3), method="rademacher", per_sample=True)


# --- with the rest of torch --------------------------------------------------------------------


@pytest.mark.parametrize("name", ["linear", "masked", "orthogonal", "convolution"])
def test_second_derivatives_are_refused_and_eval_has_them(name):
    _, layer, (inputs, cotangent) = pair(*LAYERS[name], keep=0.2)
    inputs.requires_grad_()
    with pytest.raises(RuntimeError, match=r"no derivatives of derivatives .*: call eval\(\)"):
        torch.autograd.grad(layer(inputs), inputs, cotangent, create_graph=True)
    layer.eval()
    (first,) = torch.autograd.grad(layer(inputs), inputs, cotangent, create_graph=True)
    first.sum().backward()
    assert all(p.grad.any() for name, p in layer.named_parameters() if not is_exact(name))


@pytest.mark.parametrize("name", ["linear", "masked", "convolution"])
def test_autocast_keeps_half_precision(name):
    make, shape = LAYERS[name]
    exact, layer, (inputs, cotangent) = pair(make, shape, torch.float32, keep=0.2)
    results = []
    for module in (exact, layer):
        with torch.autocast("cpu", torch.bfloat16):
            results.append(gradients(module, inputs, cotangent.bfloat16()))
    (outputs, expected), (found_outputs, found) = results
    assert torch.equal(found_outputs, outputs) and found_outputs.dtype == torch.bfloat16
    assert torch.equal(found["inputs"], expected["inputs"])
    assert torch.equal(found["bias"], expected["bias"])
    assert found["weight"].dtype == torch.float32 and found["weight"].isfinite().all()
    if name == "linear":
        inputs.requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            assert saved_bytes(layer, inputs) == 7 * 5 * 2  # five of 21 numbers in seven rows


def test_in_torch_func_transforms_gradients_are_exact():
    exact, layer, (inputs, cotangent) = pair(*LAYERS["linear"], keep=0.2)

    def loss(parameters, row, module):
        return torch.func.functional_call(module, parameters, row).square().sum()

    per_sample = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, None))
    results = [per_sample(dict(m.named_parameters()), inputs, m) for m in (exact, layer)]
    torch.testing.assert_close(*results, atol=0, rtol=0)


# What torch.compile says to itself where it leaves a part out.
@pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"
)
def test_compiled_layers_draw_the_same():
    _, net, given = pair(
        lambda: nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Unflatten(1, (1, 4, 4)),
                              nn.Conv2d(1, 2, 3), nn.SiLU()), (5, 6), keep=0.3
    )  # fmt: skip
    compiled = torch.compile(net, backend="aot_eager")
    results = []
    for module in (net, compiled, compiled):
        torch.manual_seed(4)
        results.append([p.clone() for p in gradients(module, *given)[1].values()])
    for found in results[1:]:
        torch.testing.assert_close(found, results[0])


def test_distributed_training_sees_every_gradient(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        net = randomize(MLP(6, 4, hidden_features=16, activation="relu"), keep=0.3)
        nn.init.normal_(net.last.weight)
        wrapped, inputs = DistributedDataParallel(net), torch.randn(5, 6)
        results = []
        for module in (net, wrapped):
            torch.manual_seed(4)
            net.zero_grad()
            module(inputs).square().sum().backward()
            results.append([p.grad.clone() for p in net.parameters()])
        torch.testing.assert_close(*results, atol=0, rtol=0)
    finally:
        dist.destroy_process_group()


# --- the benchmark -----------------------------------------------------------------------------


def test_the_benchmark_trains_every_way_and_draws_it(tmp_path, monkeypatch):
    monkeypatch.setattr(timing, "RESULTS", tmp_path)
    figure = tmp_path / "figure.png"
    options = ["--flows", "two_moons", "--keep", "0.5", "0.1", "--seeds", "0", "--steps", "2"]
    options += ["--seconds", "0"]
    for arguments in (options, ["--plot", "--figure", str(figure)]):
        monkeypatch.setattr(sys, "argv", ["randomized_autodiff", *arguments])
        randomized_autodiff.main()
    (file,) = tmp_path.glob("*.json")
    rows = {(row["method"], row["keep"]): row for row in json.loads(file.read_text())["rows"]}
    exact = rows["exact", 1.0]
    for (method, keep), row in rows.items():
        if method in ("checkpoint", "reversible"):
            assert row["saved_mib"] < 0.1 * exact["saved_mib"] and "losses" not in row
        elif method != "exact":
            assert row["saved_mib"] < (keep + 0.4) * exact["saved_mib"]
            same = rows["shared", keep]["saved_mib"]
            assert row["saved_mib"] == pytest.approx(same, rel=0.02)
            assert row["loss"] != exact["loss"]
            assert (row["batch"] == exact["batch"]) == (method != "smaller batch")
    assert figure.stat().st_size > 10_000
