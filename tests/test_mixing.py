"""Every recipe with every way to mix: it learns, inverts, and its density is right."""

import hashlib
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.functional import jacobian

import flows
from flows import recipes
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
from flows.recipes.mixing import choose_mixing
from flows.training import DensityEstimator
from flows.transforms import (
    Householder1x1,
    HouseholderRotation,
    LULinear,
    Permutation,
    Rotation,
    Rotation1x1,
    Sylvester,
)

MIXINGS = ["angles", "householder", "lu", "permutation"]
VECTORS = {"features": 5, "layers": 5, "hidden_features": 8}
IMAGES = {"shape": (1, 4, 8), "grey_levels": 17, "levels": 2, "steps": 2, "hidden_features": 3}
VAE = {
    "shape": (1, 4, 4),
    "grey_levels": 17,
    "latent_features": 4,
    "layers": 2,
    "hidden_features": 3,
    "posterior_features": 5,
}
OPTIONS = {
    GaussianizationFlow: VECTORS,
    Glow: IMAGES,
    MaskedSplineFlow: VECTORS,
    RotationSplineFlow: VECTORS,
    SplineCouplingFlow: VECTORS,
    SylvesterVAE: VAE,
    VolumePreservingFlow: VECTORS,
    VolumePreservingGlow: IMAGES,
}
WITHOUT_LU = [SylvesterVAE, VolumePreservingFlow, VolumePreservingGlow]
LAYERS = {
    False: [Rotation, HouseholderRotation, LULinear, Permutation],
    True: [Rotation1x1, Householder1x1, LULinear, Permutation],
}
# Of each recipe a digest of the names in its state, and its mean log_prob in `defaults`, from the
# commit before recipes took `mixing`: old seeds and checkpoints give the flows that they gave.
BEFORE = {
    GaussianizationFlow: ("1d4f9a97adb3c8f0", -6.820656236),
    Glow: ("557695dc66b10b17", -10.725460088),
    MaskedSplineFlow: ("43af60a023eda643", -8.052914992),
    RotationSplineFlow: ("1b407a558e0661b9", -6.344075565),
    SplineCouplingFlow: ("43af60a023eda643", -6.566232995),
    SylvesterVAE: ("45193ba42435ae2b", -0.506361708),
    VolumePreservingFlow: ("f740e31c5a9d51c8", -6.463139570),
    VolumePreservingGlow: ("8f298201cc6c9ac6", -5.325778277),
}
pairs = [
    pytest.param(recipe, mixing, id=f"{recipe.__name__}, {mixing}")
    for recipe in OPTIONS
    for mixing in MIXINGS
    if not (mixing == "lu" and recipe in WITHOUT_LU)
]
each_pair = pytest.mark.parametrize(("recipe", "mixing"), pairs)
each_flow = pytest.mark.parametrize(
    ("recipe", "mixing"), [pair for pair in pairs if pair.values[0] is not SylvesterVAE]
)


def make(recipe: type, mixing: str, **changes) -> nn.Module:
    return recipe(**OPTIONS[recipe] | changes, mixing=mixing).double()


def randomized(flow: nn.Module) -> nn.Module:
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter += 0.1 * torch.randn_like(parameter)  # reflections start at random
    return flow


def data(recipe: type, rows: int) -> Tensor:
    if OPTIONS[recipe] is VECTORS:
        return torch.randn(rows, 5).double()
    return torch.randint(17, (rows, *OPTIONS[recipe]["shape"])).double() / 17


def test_table_has_every_recipe():
    assert {getattr(recipes, name) for name in recipes.__all__} == set(OPTIONS) == set(BEFORE)


@pytest.mark.parametrize("recipe", OPTIONS)
def test_defaults_are_the_flows_of_before(recipe):
    torch.manual_seed(0)
    flow = recipe(**OPTIONS[recipe]).double()
    for parameter in flow.parameters():
        nn.init.normal_(parameter, std=0.1)
    inputs = data(recipe, 4)
    names = "\n".join(flow.state_dict())
    assert hashlib.sha256(names.encode()).hexdigest()[:16] == BEFORE[recipe][0]
    with torch.no_grad():
        log_prob = flow.eval()(inputs).mean().item()
    assert log_prob == pytest.approx(BEFORE[recipe][1], abs=1e-6)


@pytest.mark.parametrize("images", [False, True])
@pytest.mark.parametrize("init", ["identity", "haar"])
@pytest.mark.parametrize("features", [2, 5])
def test_each_word_makes_its_layer_where_asked(images, init, features):
    eye = torch.eye(features)
    for mixing, kind in zip(MIXINGS, LAYERS[images], strict=True):
        layer = choose_mixing(mixing, init=init, images=images)(features)
        assert type(layer) is kind
        if kind is Permutation:
            continue
        matrix = layer.matrix()
        torch.testing.assert_close(matrix @ matrix.mT, eye, atol=1e-5, rtol=0)
        assert torch.allclose(matrix, eye, atol=1e-5) == (init == "identity")


@each_pair
def test_recipes_are_made_of_what_they_are_told(recipe, mixing):
    kinds = {type(module) for module in make(recipe, mixing).modules()}
    if recipe is SylvesterVAE:
        (layer, _) = make(recipe, mixing).posterior.transforms
        assert isinstance(layer, Sylvester) and layer.mixing == mixing
        return
    chosen = LAYERS["shape" in OPTIONS[recipe]][MIXINGS.index(mixing)]
    # An image rotation holds a rotation of vectors.
    everything = {*LAYERS[False], *LAYERS[True]} - {Rotation, HouseholderRotation}
    assert chosen in kinds and not kinds & everything - {chosen}


@each_flow
def test_density_is_that_of_the_noise_times_the_jacobian(recipe, mixing):
    flow = randomized(make(recipe, mixing))
    inputs = data(recipe, 20)
    flow.train()(inputs)  # sets ActNorm, Standardize, EmpiricalCDF
    chain = flow.eval().transform
    if OPTIONS[recipe] is IMAGES:
        dequantize, *layers = chain.transforms
        inputs, chain = dequantize(inputs)[0], flows.Composite(layers)
    x = inputs[:1]
    noise, logabsdet = chain(x)
    size = x.numel()
    matrix = jacobian(lambda v: chain(v.view_as(x))[0].flatten(), x.flatten())
    torch.testing.assert_close(logabsdet[0], matrix.view(size, size).slogdet()[1])
    torch.testing.assert_close(chain.inverse(noise)[0], x, atol=1e-8, rtol=1e-8)
    if OPTIONS[recipe] is VECTORS:
        expected = flow.distribution.log_prob(noise) + matrix.slogdet()[1]
        torch.testing.assert_close(flow(x), expected)
    assert flow.sample(2).shape == (2, *x.shape[1:])


@pytest.mark.parametrize("mixing", ["angles", "householder", "permutation"])
def test_posterior_of_an_autoencoder_counts_its_volume(mixing):
    posterior = randomized(make(SylvesterVAE, mixing)).eval().posterior
    x, context = torch.randn(1, 4).double(), torch.randn(1, 5).double()
    latent, logabsdet = posterior(x, context)
    matrix = jacobian(lambda v: posterior(v[None], context)[0][0], x[0])
    torch.testing.assert_close(logabsdet[0], matrix.slogdet()[1])
    torch.testing.assert_close(posterior.inverse(latent, context)[0], x)


@each_pair
def test_a_step_of_training_reaches_every_parameter(recipe, mixing):
    flow, inputs = randomized(make(recipe, mixing)).train(), data(recipe, 50)
    flow(inputs)
    before = [p.detach().clone() for p in flow.parameters()]
    losses = []
    optimizer = torch.optim.Adam(flow.parameters(), lr=2e-3)
    for _ in range(2):
        torch.manual_seed(1)  # the same noise
        loss = -flow(inputs).mean()
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[1] < losses[0]
    changed = [not torch.equal(p, old) for p, old in zip(flow.parameters(), before, strict=True)]
    assert all(changed)


@pytest.mark.parametrize("mixing", ["angles", "householder", "permutation"])
@pytest.mark.parametrize("recipe", [VolumePreservingFlow, VolumePreservingGlow])
def test_volume_is_kept_exactly(recipe, mixing):
    flow = randomized(make(recipe, mixing)).float()
    if recipe is VolumePreservingFlow:
        _, logabsdet = flow.transform(torch.randn(20, 5))
    else:
        _, logabsdet = flow.transform.transforms[-1](torch.randn(20, 1, 4, 8))
    assert logabsdet.shape == (20,) and not logabsdet.any()


@each_flow
@pytest.mark.parametrize("memory", ["checkpoint", "reversible"])
def test_what_is_kept_does_not_change_gradients(recipe, mixing, memory):
    changes = {"layers": 3} if "layers" in OPTIONS[recipe] else {}
    inputs, found = data(recipe, 6), []
    for how in ("store", memory):
        torch.manual_seed(0)
        flow = randomized(make(recipe, mixing, memory=how, **changes)).eval()
        torch.manual_seed(1)
        flow(inputs).sum().backward()
        found.append([p.grad for p in flow.parameters() if p.grad is not None])
    torch.testing.assert_close(found[1], found[0], atol=1e-7, rtol=1e-6)


@each_pair
def test_a_flow_comes_back_from_its_run(recipe, mixing, tmp_path: Path):
    options = OPTIONS[recipe] | {"mixing": mixing}
    flow = randomized(recipe(**options)).eval()
    config = {"class_path": f"flows.recipes.{recipe.__name__}", "init_args": options}
    weights = {f"flow.{name}": value for name, value in flow.state_dict().items()}
    torch.save({"state_dict": weights, "flow_config": config}, tmp_path / "last.ckpt")
    samples = []
    for each in (flow, flows.load(tmp_path)):
        torch.manual_seed(1)
        samples.append(each.sample(3))
    assert torch.equal(*samples)


@pytest.mark.parametrize("recipe", OPTIONS)
def test_weights_of_another_mixing_are_refused(recipe):
    first, other = ("householder", "angles")
    with pytest.raises((RuntimeError, ValueError)):
        make(recipe, first).load_state_dict(make(recipe, other).state_dict())


@pytest.mark.parametrize("recipe", [VolumePreservingFlow, VolumePreservingGlow])
def test_flows_that_preserve_volume_refuse_lu(recipe):
    with pytest.raises(ValueError, match="that preserves volume, which 'lu' changes; got 'lu'"):
        make(recipe, "lu")


def test_an_autoencoder_refuses_lu():
    with pytest.raises(ValueError, match="which make the columns of Q orthonormal, got 'lu'"):
        make(SylvesterVAE, "lu")


@pytest.mark.parametrize("recipe", OPTIONS)
def test_other_words_are_refused(recipe):
    with pytest.raises(ValueError, match="^mixing must be .*, got 'qr'") as error:
        make(recipe, "qr")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("mixing", MIXINGS[1:])
@pytest.mark.parametrize("recipe", [RotationSplineFlow, Glow])
def test_only_angles_are_recentered(recipe, mixing):
    DensityEstimator(make(recipe, "angles"), recenter_every_n_epochs=2)
    with pytest.raises(ValueError, match="must be None for a flow without a layer that has recen"):
        DensityEstimator(make(recipe, mixing), recenter_every_n_epochs=2)


@each_pair
def test_weight_decay_leaves_what_mixes_alone(recipe, mixing):
    model = DensityEstimator(make(recipe, mixing), weight_decay=0.1)
    model.trainer = Trainer()
    *decayed, plain = model.configure_optimizers()["optimizer"].param_groups
    assert [group["weight_decay"] for group in (*decayed, plain)][-2:] in ([0.1, 0.0], [0.0])
    kept = {id(p) for p in plain["params"]}
    names = ("raw_angles", "vectors", "factors")
    mixed = [p for n, p in model.flow.named_parameters() if n.endswith(names)]
    learned = recipe is not SylvesterVAE and mixing != "permutation"
    assert bool(mixed) == learned and all(id(p) in kept for p in mixed)


class Trainer:
    """What an optimizer asks of the trainer."""

    precision = "32-true"
    estimated_stepping_batches = 10
    callbacks = ()
