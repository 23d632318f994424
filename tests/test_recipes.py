"""Whole models: they run, invert and refuse what cannot work."""

import copy
import math
from pathlib import Path

import pytest
import torch
from torch import nn

import flows
from flows import Flow, recipes
from flows.distributions import DiagonalNormal, Normal
from flows.nets import Hats
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
from flows.transforms import (
    AffineCoupling,
    Composite,
    ElementwiseSpline,
    EmpiricalCDF,
    Logit,
    MaskedAutoregressiveSpline,
    Multiscale,
    Permutation,
    Rotation,
    Rotation1x1,
    SplineCoupling,
)

GLOW = {"shape": (1, 4, 8), "grey_levels": 17, "levels": 2, "steps": 2, "hidden_features": 3}


def randomized(flow: Flow, std: float = 0.3) -> Flow:
    for parameter in flow.parameters():
        nn.init.normal_(parameter, std=std)
    return flow


def count(flow: Flow, kind: type) -> int:
    return sum(isinstance(module, kind) for module in flow.modules())


def levels(rows: int) -> torch.Tensor:
    return torch.randint(17, (rows, *GLOW["shape"])).double() / 17


# Recipes for vectors, and the layer that bends.
VECTORS = {
    RotationSplineFlow: SplineCoupling,
    SplineCouplingFlow: SplineCoupling,
    MaskedSplineFlow: MaskedAutoregressiveSpline,
    GaussianizationFlow: ElementwiseSpline,
}
each_vector_recipe = pytest.mark.parametrize("recipe", VECTORS, ids=lambda r: r.__name__)


def test_tables_have_every_recipe():
    elsewhere = {Glow, SylvesterVAE, VolumePreservingFlow, VolumePreservingGlow}
    assert {getattr(recipes, name) for name in recipes.__all__} == {*VECTORS, *elsewhere}


@each_vector_recipe
@pytest.mark.parametrize("context_features", [0, 2])
@pytest.mark.parametrize("features", [2, 5])
def test_vector_recipes_undo_themselves(recipe, features, context_features):
    flow = recipe(features, layers=3, hidden_features=8, bins=4, context_features=context_features)
    flow = randomized(flow).double().eval()
    x = torch.randn(50, features, dtype=torch.float64)
    context = torch.randn(50, 2, dtype=torch.float64) if context_features else None
    z, logabsdet = flow.transform(x, context)
    back, inverse_logabsdet = flow.transform.inverse(z, context)
    torch.testing.assert_close(back, x, atol=1e-8, rtol=1e-8)
    torch.testing.assert_close(inverse_logabsdet, -logabsdet, atol=1e-8, rtol=1e-8)
    assert flow(x, context).shape == (50,) and flow(x, context).isfinite().all()
    rows = (50,) if context_features else ()
    assert flow.sample(7, context).shape == (*rows, 7, features)


@each_vector_recipe
def test_vector_recipes_are_made_of_their_arguments(recipe):
    flow = recipe(
        3, layers=5, bins=6, tail_bound=2.5, hidden_features=7, blocks=4, context_features=2
    )
    kind = VECTORS[recipe]
    assert count(flow, kind) == 5
    for layer in (m for m in flow.modules() if isinstance(m, kind)):
        assert (layer.bins, layer.tail_bound) == (6, 2.5)
        inputs = {SplineCoupling: 1, MaskedAutoregressiveSpline: 3, ElementwiseSpline: 0}[kind]
        inputs *= 32 if kind is SplineCoupling else 1  # knots
        assert layer.net.first.weight.shape == (7, inputs + 2) and len(layer.net.blocks) == 4
    rotations = {RotationSplineFlow: 5, GaussianizationFlow: 5}
    assert count(flow, Rotation) == rotations.get(recipe, 0)
    x, context = torch.randn(4, 3), torch.randn(4, 2)
    log_prob = randomized(flow).eval()(x, context)
    assert log_prob.shape == (4,) and not torch.equal(log_prob, flow(x, context + 1))
    with pytest.raises(ValueError, match="context must have 2 features, got None"):
        flow(x)


@each_vector_recipe
def test_vector_recipes_take_labels_as_context(recipe):
    flow = randomized(recipe(3, layers=2, hidden_features=8, classes=4)).eval()
    x, labels = torch.randn(4, 3), torch.arange(4)
    log_prob = flow(x, labels)
    assert (log_prob != flow(x, (labels + 1) % 4)).all()
    assert flow.sample(2, labels).shape == (4, 2, 3)
    with pytest.raises(ValueError, match="labels must be 0 to 3, got 1 to 4"):
        flow(x, labels + 1)


@each_vector_recipe
def test_vector_recipes_take_data_and_context_in_their_own_units(recipe):
    x, context = torch.randn(200, 2, dtype=torch.float64), torch.randn(200, 1).double()
    plain = recipe(2, layers=2, hidden_features=8, context_features=1).double()
    scaled = copy.deepcopy(plain)
    batches = (x, context), (1e4 + 1e3 * x, 1e5 * context - 1e4)
    results = []
    for flow, batch in zip((plain, scaled), batches, strict=True):
        flow(*batch)  # sets the units, which no parameter may hold
        torch.manual_seed(1)
        results.append(randomized(flow).eval()(*batch))
    torch.testing.assert_close(results[1] + 2 * math.log(1e3), results[0])


@pytest.mark.parametrize("recipe", [*VECTORS, Glow])
def test_columns_and_labels_together_are_refused(recipe):
    options = GLOW if recipe is Glow else {"features": 2}
    with pytest.raises(ValueError, match="got context_features=2 and classes=3"):
        recipe(**options, context_features=2, classes=3)


@pytest.mark.parametrize("recipe", [*VECTORS, VolumePreservingFlow])
def test_dropout_reaches_the_conditioners(recipe):
    flow = recipe(3, layers=2, context_features=1, dropout=0.25)
    assert {m.p for m in flow.modules() if isinstance(m, nn.Dropout)} == {0.25}


@pytest.mark.parametrize("features", [2, 5])
def test_two_couplings_bend_every_feature_between_permutations(features):
    flow = randomized(SplineCouplingFlow(features, layers=5, hidden_features=8))
    _, _, *layers = flow.transform.transforms
    assert [type(layer) for layer in layers] == [
        *[SplineCoupling, SplineCoupling, Permutation] * 2,
        SplineCoupling,
    ]
    x = torch.randn(20, features)
    for first, second in (layers[0:2], layers[3:5]):
        assert (second(first(x)[0])[0] != x).any(0).all()


def test_spline_couplings_see_knots_in_the_splines_interval():
    flow = SplineCouplingFlow(5, layers=2, tail_bound=2.5, knots=6)
    hats = [module for module in flow.modules() if isinstance(module, Hats)]
    assert [(h.features, h.knots, h.bound) for h in hats] == [(2, 6, 2.5)] * 2
    assert count(SplineCouplingFlow(5, knots=0), Hats) == 0
    assert count(flow, nn.SiLU) == 0 < count(SplineCouplingFlow(5, activation="silu"), nn.SiLU)


def test_masked_layers_take_opposite_orders_between_permutations():
    flow = randomized(MaskedSplineFlow(3, layers=4, hidden_features=8))
    _, _, first, second, permutation, third, fourth = flow.transform.transforms
    assert isinstance(permutation, Permutation)
    assert [m.reverse for m in (first, second, third, fourth)] == [False, True, False, True]


@each_vector_recipe
def test_vector_recipes_start_as_volume_preserving_maps(recipe):
    flow = recipe(4, layers=3).eval()
    _, logabsdet = flow.transform(torch.randn(20, 4))
    torch.testing.assert_close(logabsdet, torch.zeros(20), atol=1e-4, rtol=0)


@each_vector_recipe
def test_vector_recipes_learn(recipe):
    flow = recipe(2, layers=4, hidden_features=16)
    x = torch.randn(256, 2)
    x[:, 1] += x[:, 0].square()  # a bent normal: its entropy is that of the straight one
    assert_learns(flow, x)


def assert_learns(flow: Flow, *batch: torch.Tensor) -> None:
    optimizer = torch.optim.Adam(flow.parameters(), lr=1e-2)
    losses = []
    for _ in range(40):
        optimizer.zero_grad()
        loss = -flow(*batch).mean()
        loss.backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in flow.parameters())
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.15


def test_one_feature_is_enough_for_masked_splines():
    x = torch.randn(256, 1).exp()
    assert_learns(MaskedSplineFlow(1, layers=2, hidden_features=16), x)


@pytest.mark.parametrize(
    ("recipe", "options"),
    [
        *((recipe, {"features": 3, "layers": 3, "hidden_features": 4}) for recipe in VECTORS),
        (GaussianizationFlow, {"features": 3, "layers": 2, "context_features": 2}),
        (Glow, {**GLOW, "classes": 3}),
    ],
)
def test_recipes_come_back_from_a_checkpoint(recipe, options, tmp_path: Path):
    flow = randomized(recipe(**options)).eval()
    config = {"class_path": f"flows.recipes.{recipe.__name__}", "init_args": options}
    weights = {f"flow.{name}": value for name, value in flow.state_dict().items()}
    torch.save({"state_dict": weights, "flow_config": config}, tmp_path / "last.ckpt")
    loaded = flows.load(tmp_path)
    assert type(loaded) is recipe
    context = None
    if "context_features" in options:
        context = torch.randn(2, 2)
    elif "classes" in options:
        context = torch.tensor([0, 2])
    samples = []
    for each in (flow, loaded):
        torch.manual_seed(1)
        samples.append(each.sample(3, context))
    assert torch.equal(*samples)


@pytest.mark.parametrize("dequantize", ["uniform", "variational"])
@pytest.mark.parametrize("marginals", ["logit", "empirical"])
@pytest.mark.parametrize("coupling", ["affine", "spline"])
def test_glow_undoes_itself(coupling, marginals, dequantize):
    options = {"coupling": coupling, "marginals": marginals, "dequantize": dequantize}
    flow = randomized(Glow(**options, **GLOW), 0.1).double()
    images = levels(40)
    flow.train()(images)
    flow.eval()
    log_prob = flow(images)
    assert log_prob.shape == (40,) and log_prob.isfinite().all()
    z = flow.transform_to_noise(images)
    assert z.shape == (40, 32)
    torch.testing.assert_close(flow.transform.inverse(z)[0], images)
    samples = flow.sample(5)
    assert samples.shape == (5, *GLOW["shape"])
    torch.testing.assert_close(17 * samples, (17 * samples).round())  # grey levels again
    assert 0 <= samples.min() and samples.max() <= 16 / 17 + 1e-9


def test_glow_is_made_of_its_arguments():
    affine, spline = (Glow(coupling=name, dropout=0.25, **GLOW) for name in ("affine", "spline"))
    assert count(affine, AffineCoupling) == count(affine, Rotation1x1) == 4
    assert count(spline, SplineCoupling) == 4 and count(spline, AffineCoupling) == 0
    flips = [m.flip for m in affine.modules() if isinstance(m, AffineCoupling)]
    assert flips == [False, True, False, True]  # successive steps exchange the halves
    assert {m.p for m in affine.modules() if isinstance(m, nn.Dropout2d)} == {0.25}
    empirical = Glow(marginals="empirical", **GLOW)
    assert count(affine, Logit) == count(empirical, EmpiricalCDF) == 1
    assert count(affine, EmpiricalCDF) == count(empirical, Logit) == 0
    (cdf,) = (m for m in empirical.modules() if isinstance(m, EmpiricalCDF))
    assert (cdf.shape, cdf.bins) == ((1, 4, 8), 17)
    (multiscale,) = (m for m in affine.modules() if isinstance(m, Multiscale))
    assert multiscale.level_shapes == [(4, 2, 4), (8, 1, 2)]


def test_glow_reaches_every_pixel():
    flow = randomized(Glow(**GLOW)).double().eval()
    x = levels(1).requires_grad_()
    flow.transform_to_noise(x).square().sum().backward()
    assert (x.grad != 0).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"features": 0}, "features must be at least [12], got 0"),
        ({"layers": 0}, "layers must be at least 1, got 0"),
        ({"bins": 1}, "bins must be at least 2, got 1"),
        ({"tail_bound": 0.0}, "tail_bound must be finite and greater than 0, got 0"),
        ({"hidden_features": 0}, "hidden_features must .*, got 0"),
        ({"blocks": -1}, "blocks must .*, got -1"),
        ({"context_features": -1}, "context_features must .*, got -1"),
    ],
    ids=str,
)
@each_vector_recipe
def test_vector_recipes_refuse_bad_arguments(recipe, options, message):
    with pytest.raises(ValueError, match=message) as error:
        recipe(**{"features": 2, **options})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("recipe", [RotationSplineFlow, SplineCouplingFlow, GaussianizationFlow])
def test_mixing_needs_two_features(recipe):
    with pytest.raises(ValueError, match="^features must be at least 2, got 1"):
        recipe(1)


@pytest.mark.parametrize("shape", [(3, 4, 4), (5, 8, 12), (1, 2, 6)], ids=str)
@pytest.mark.parametrize("coupling", ["affine", "spline"])
def test_glow_takes_any_channels_and_sizes_that_its_levels_allow(shape, coupling):
    levels = 1 if shape[1] == 2 else 2
    flow = Glow(shape, levels=levels, steps=2, hidden_features=3, coupling=coupling)
    flow = randomized(flow, 0.1).double().eval()
    images = torch.randint(256, (6, *shape)).double() / 256
    z = flow.transform_to_noise(images)
    torch.testing.assert_close(flow.transform.inverse(z)[0], images)
    assert flow.sample(2).shape == (2, *shape)


def test_glow_of_classes_reads_the_label_everywhere():
    flow = randomized(Glow(classes=3, coupling="spline", **GLOW), 0.1).double().eval()
    assert isinstance(flow.distribution, DiagonalNormal)
    assert isinstance(Glow(**GLOW).distribution, Normal)
    images, labels = levels(12), torch.arange(12) % 3
    torch.manual_seed(1)
    log_prob = flow(images, labels)
    assert log_prob.shape == (12,) and log_prob.isfinite().all()
    conditions = [flow.distribution.net.first.weight]
    conditions += [m.net.condition.weight for m in flow.modules() if isinstance(m, SplineCoupling)]
    assert len(conditions) == 5
    for gradient in torch.autograd.grad(log_prob.sum(), conditions):
        assert gradient.any(0).all()  # every class, in every conditioner
    assert flow.sample(2, labels[:4]).shape == (4, 2, *GLOW["shape"])


def test_glow_takes_columns_as_context():
    flow = randomized(Glow(context_features=2, **GLOW), 0.1).double().eval()
    images, context = levels(4), torch.randn(4, 2, dtype=torch.float64)
    torch.manual_seed(1)
    log_prob = flow(images, context)
    torch.manual_seed(1)
    assert (log_prob != flow(images, context + 1)).all()
    assert flow.sample(2, context).shape == (4, 2, *GLOW["shape"])


def test_glow_of_classes_learns_what_the_label_says():
    flow = Glow((1, 4, 4), grey_levels=16, levels=1, steps=2, hidden_features=8, classes=2)
    labels = torch.arange(200) % 2
    images = torch.randint(4, (200, 1, 4, 4)) + 10 * labels.view(-1, 1, 1, 1)
    images = images.float() / 16
    assert_learns(flow, images, labels)
    flow.eval()
    with torch.no_grad():
        assert (flow(images, labels) > flow(images, 1 - labels) + 1).all()


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (None, "context must have 3 features, got None"),
        (torch.tensor([0, 1, 2, 3]), "labels must be 0 to 2, got 0 to 3"),
        (torch.tensor([0.0, 1, 2, 2]), "labels must be integers"),
        (torch.tensor([0, 1, 2]), "context must have a row per input, got 3 for 4"),
    ],
    ids=str,
)
def test_glow_of_classes_refuses_other_labels(labels, message):
    flow = Glow(classes=3, **GLOW)
    with pytest.raises(ValueError, match=message):
        flow(levels(4).float(), labels)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shape": (1, 6, 8)}, "divisible by 4, got 6 x 8: take levels=1 or pad .* 8 x 8"),
        ({"shape": (3, 7, 7)}, "divisible by 4, got 7 x 7: pad the images to 8 x 8"),
        ({"shape": (8, 8)}, "channels, height, width"),
        ({"levels": 0}, "at least one level, got"),
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"grey_levels": 1}, "grey_levels must be at least 2, got 1"),
        ({"grey_levels": 1, "marginals": "empirical"}, "grey_levels must be at least 2, got 1"),
        ({"coupling": "cubic"}, "coupling must be 'spline' or 'affine', got 'cubic'"),
        ({"dequantize": "none"}, "dequantize must be 'uniform' or 'variational', got 'none'"),
        ({"marginals": "none"}, "marginals must be 'logit' or 'empirical', got 'none'"),
        ({"hidden_features": 0}, "hidden_features must .*, got 0"),
        ({"kernel_sizes": (3, 2, 1)}, "kernel_sizes must be three odd numbers, got"),
        ({"dropout": 1.5}, "dropout .* got 1.5"),
        ({"classes": 0}, "classes must be at least 1, got 0"),
    ],
    ids=str,
)
def test_glow_refuses_bad_arguments(options, message):
    with pytest.raises(ValueError, match=message) as error:
        Glow(**{**GLOW, **options})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("recipe", "arguments"),
    [(recipe, {"features": 3, "layers": 2}) for recipe in (*VECTORS, VolumePreservingFlow)]
    + [(recipe, GLOW) for recipe in (Glow, VolumePreservingGlow)],
)
def test_what_is_kept_does_not_change_gradients(recipe, arguments):
    inputs = levels(6) if arguments is GLOW else torch.randn(6, 3, dtype=torch.float64)
    found = []
    for memory in ("store", "checkpoint", "reversible"):
        torch.manual_seed(0)
        flow = randomized(recipe(**arguments, memory=memory).double(), std=0.1).eval()
        chains = [m for m in flow.modules() if isinstance(m, Composite)]
        assert any(chain.memory == memory for chain in chains)
        torch.manual_seed(1)
        flow(inputs).sum().backward()
        found.append([p.grad for p in flow.parameters() if p.grad is not None])
    torch.testing.assert_close(found[1:], 2 * found[:1], atol=1e-7, rtol=1e-6)
