"""What is particular to Sylvester layers: bounds, the numeric inverse, parameters per row."""

from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import gradgradcheck

from flows import givens
from flows.nets import MLP
from flows.transforms import Sylvester
from flows.transforms.sylvester import _solve

SIZES = [(2, 1), (2, 2), (5, 3), (8, 8), (33, 7)]
each_size = pytest.mark.parametrize(("features", "rank"), SIZES)
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
NET = partial(MLP, hidden_features=8, context_features=2)


def randomized(
    layer: Sylvester, std: float = 0.5, dtype: torch.dtype = torch.float64
) -> Sylvester:
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=std)
    return layer.to(dtype).eval()


def formula(layer: Sylvester, raw: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Q, R, R~ and b of the docstring, entry by entry."""
    rank, values = layer.rank, iter(raw.tolist())

    def take(count: int) -> Tensor:
        return torch.tensor([next(values) for _ in range(count)], dtype=torch.float64)

    q = layer.base @ givens.matrix(take(layer.schedule.num_angles), layer.schedule)
    triangles = []
    for _ in range(2):
        triangle = torch.zeros(rank, rank, dtype=torch.float64)
        for i in range(rank):
            triangle[i, i + 1 :] = take(rank - 1 - i) / rank**0.5
        triangles.append(triangle)
    outer, inner = triangles
    slopes, diagonal = (
        (2 * torch.tanh(take(rank) / 2)).exp(),
        (2 * torch.tanh(take(rank) / 2)).exp(),
    )
    bias = take(rank)
    assert next(values, None) is None
    return q[:, :rank], outer + ((slopes - 1) / diagonal).diag(), inner + diagonal.diag(), bias


@each_size
def test_forward_is_the_formula(features, rank):
    layer = randomized(Sylvester(features, rank=rank))
    q, outer, inner, bias = formula(layer, layer.raw)
    x = torch.randn(6, features, dtype=torch.float64)
    h = torch.tanh(x @ q @ inner.T + bias)
    outputs, logabsdet = layer(x)
    torch.testing.assert_close(outputs, x + h @ outer.T @ q.T)
    factors = 1 + (1 - h**2) * outer.diagonal() * inner.diagonal()
    torch.testing.assert_close(logabsdet, factors.log().sum(1))


@each_size
def test_a_row_of_context_is_a_layer_of_its_own(features, rank):
    layer = randomized(Sylvester(features, NET, rank=rank), std=0.3)
    x, context = torch.randn(4, features).double(), torch.randn(4, 2).double()
    raw = layer.net(x[:, :0], context)
    alone = Sylvester(features, rank=rank).double()
    alone.base.copy_(layer.base)
    for direction in ("forward", "inverse"):
        outputs, logabsdet = getattr(layer, direction)(x, context)
        for row in range(4):
            alone.raw.data = raw[row].detach()
            expected = getattr(alone, direction)(x[row : row + 1])
            result = outputs[row : row + 1], logabsdet[row : row + 1]
            torch.testing.assert_close(result, expected, atol=1e-11, rtol=1e-11)


@each_size
@pytest.mark.parametrize("net", [None, NET], ids=["parameters", "context"])
def test_starts_as_the_identity_and_learns_from_there(features, rank, net):
    layer = Sylvester(features, net, rank=rank)
    x, context = torch.randn(20, features), torch.randn(20, 2)
    outputs, logabsdet = layer(x, context)
    assert torch.equal(outputs, x) and not logabsdet.any()
    (outputs.square().sum() - logabsdet.sum()).backward()
    grad = layer.raw.grad if net is None else layer.net.last.bias.grad
    assert grad.isfinite().all() and grad.any()


@each_size
@pytest.mark.parametrize("mixing", ["householder", "permutation"])
@pytest.mark.parametrize("net", [None, NET], ids=["parameters", "context"])
def test_other_columns_make_the_same_formula(features, rank, mixing, net):
    layer = randomized(Sylvester(features, net, rank=rank, mixing=mixing))
    x, context = torch.randn(4, features).double(), torch.randn(4, 2).double()
    raw = layer.raw if net is None else layer.net(x[:, :0], context)
    turns, rest = raw.detach().expand(4, -1).split([layer.sizes[0], sum(layer.sizes[1:])], dim=1)
    # R, R~ and b stand behind what makes Q, as in a layer of angles; there Q is the base.
    by_angles = Sylvester(features, rank=rank).double()
    count = by_angles.schedule.num_angles
    eye = torch.eye(features, dtype=torch.float64)
    outputs, logabsdet = layer(x, context)
    for row in range(4):
        q = eye
        for k, v in enumerate(turns[row].view(-1, features)):
            v = v + eye[k // 2]
            q = q @ (eye - 2 * v.outer(v) / v.dot(v))
        by_angles.base.copy_(layer.base @ q)
        by_angles.raw.data = torch.cat([torch.zeros(count).double(), rest[row]])
        expected = by_angles(x[row : row + 1])
        result = outputs[row : row + 1], logabsdet[row : row + 1]
        torch.testing.assert_close(result, expected, atol=1e-10, rtol=1e-10)
    back, negative = layer.inverse(outputs, context)
    torch.testing.assert_close(layer(back, context)[0], outputs, atol=1e-10, rtol=1e-10)
    torch.testing.assert_close(negative, -layer(back, context)[1], atol=1e-9, rtol=1e-9)


def test_permutations_choose_features_and_learn_no_columns():
    layer = Sylvester(7, rank=3, mixing="permutation")
    assert sorted(layer.base.argmax(1).tolist()) == list(range(7))
    assert layer.base.sum() == 7 and len(layer.raw) == sum(layer.sizes[1:])


@pytest.mark.parametrize("rank", [2, 3, 6])
def test_reflections_start_where_angles_do(rank):
    torch.manual_seed(1)
    layer = Sylvester(6, rank=rank, mixing="householder")
    torch.manual_seed(1)
    by_angles = Sylvester(6, rank=rank)
    assert torch.equal(layer.base, by_angles.base)
    for each in (layer, by_angles):
        above = sum(each.sizes[:1])
        each.raw.data[above:] = torch.linspace(-1, 1, len(each.raw) - above)
    x = torch.randn(5, 6)
    if rank % 2 == 0:
        torch.testing.assert_close(layer(x)[0], by_angles(x)[0])
    (gradient,) = torch.autograd.grad(layer(x)[0].sin().sum(), layer.raw)
    assert gradient[: 6 * rank].view(rank, 6).any(1).all()


def test_changes_nothing_outside_its_subspace():
    layer = randomized(Sylvester(6, rank=2))
    q = formula(layer, layer.raw)[0]
    x = torch.randn(50, 6, dtype=torch.float64)
    change = layer(x)[0] - x
    torch.testing.assert_close(change @ q @ q.T, change)
    assert torch.linalg.matrix_rank(change) == 2


@each_dtype
@pytest.mark.parametrize("value", [-1e6, -30.0, 30.0, 1e6])
def test_volume_changes_within_bounds_for_any_diagonal(dtype, value):
    layer = Sylvester(3).to(dtype)
    above = sum(layer.sizes[:3])
    layer.raw.data[above : above + 3] = value
    x = torch.cat([torch.zeros(1, 3), torch.randn(50, 3)]).to(dtype)
    for direction in (layer, layer.inverse):
        outputs, logabsdet = direction(x)
        assert outputs.isfinite().all() and logabsdet.isfinite().all()
        assert logabsdet.abs().max() <= 6 * (1 + 4 * torch.finfo(dtype).eps)
        torch.testing.assert_close(logabsdet[0].abs(), torch.tensor(6.0, dtype=dtype))


@each_size
@each_dtype
@pytest.mark.parametrize("std", [0.1, 1.0, 10.0])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3, 1e6])
def test_inverse_holds_the_stated_tolerance(features, rank, dtype, std, scale):
    layer = randomized(Sylvester(features, rank=rank), std, dtype)
    y = scale * torch.randn(50, features, dtype=dtype)
    with torch.no_grad():
        x, logabsdet = layer.inverse(y)
        back, _ = layer(x)
    q, outer, inner, _ = formula(layer.double(), layer.raw)
    terms = (x.double() @ q).abs() @ (outer.abs() @ inner.abs()).T
    size = torch.cat([y, terms.to(dtype)], dim=1).abs().amax(1).clamp_min(1)
    assert ((back - y).abs().amax(1) <= 30 * torch.finfo(dtype).eps * size).all()
    assert logabsdet.isfinite().all()


@each_dtype
def test_inverse_undoes_forward_to_rounding_where_well_conditioned(dtype):
    layer = randomized(Sylvester(16), 0.1, dtype)
    x = torch.randn(200, 16, dtype=dtype)
    with torch.no_grad():
        y, logabsdet = layer(x)
        back, negative = layer.inverse(y)
    tolerance = 100 * torch.finfo(dtype).eps
    torch.testing.assert_close(back, x, atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(negative, -logabsdet, atol=tolerance, rtol=tolerance)


def test_scalar_equation_is_solved_to_rounding_for_every_slope_the_bounds_allow():
    slopes = torch.linspace(-2, 2, 101, dtype=torch.float64)
    p = torch.expm1(slopes)[:, None]
    sizes = torch.cat([torch.logspace(-9, 6, 500), torch.linspace(0, 15, 3000)]).double()
    c = torch.cat([-sizes, sizes])[None]
    t = _solve(p, c)
    low, high = c - p.abs() - 1, c + p.abs() + 1
    for _ in range(70):  # bisection
        middle = (low + high) / 2
        above = middle + p * middle.tanh() > c
        low, high = torch.where(above, low, middle), torch.where(above, middle, high)
    tolerance = 32 * torch.finfo(torch.float64).eps
    # The bisection's own error: the terms' rounding over the slope.
    assert ((t - low).abs() <= tolerance * (1 + low.abs())).all()


@pytest.mark.parametrize("net", [None, NET], ids=["parameters", "context"])
def test_second_derivatives_of_both_directions_are_right(net):
    layer = randomized(Sylvester(3, net, rank=2), std=0.7)
    x, context = torch.randn(2, 3).double(), torch.randn(2, 2).double()
    for direction in (layer.forward, layer.inverse):
        assert gradgradcheck(partial(direction, context=context), x.requires_grad_())


@each_dtype
def test_autocast_does_not_blunt_it(dtype):
    layer = randomized(Sylvester(5, rank=3), 0.5, dtype)
    x = torch.randn(4, 5, dtype=dtype)
    for direction in (layer.forward, layer.inverse):
        expected = direction(x)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            torch.testing.assert_close(direction(x), expected, atol=0, rtol=0)


def test_weights_of_another_schedule_or_rank_are_refused():
    weights = Sylvester(5, rank=2).state_dict()
    with pytest.raises(ValueError, match=r"the layer has crossing\(5\) rank=5"):
        Sylvester(5, schedule=givens.crossing(5)).load_state_dict(weights)
    with pytest.raises(ValueError, match="the layer has householder rank=2"):
        Sylvester(5, rank=2, mixing="householder").load_state_dict(weights)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"features": 1}, r"^features must be at least 2, got 1\.$"),
        ({"features": 4, "rank": 0}, r"^rank must be from 1 to 4, got 0\.$"),
        ({"features": 4, "rank": 5}, r"^rank must be from 1 to 4, got 5\.$"),
        ({"features": 4, "schedule": givens.crossing(5)}, "^schedule must have dimension 4, got "),
        ({"features": 4, "schedule": givens.cosine_sine(4)}, "^schedule must not be degenerate"),
        ({"features": 4, "mixing": "lu"}, "^mixing must be .* columns of Q orthonormal, got 'lu'"),
        (
            {"features": 4, "mixing": "householder", "schedule": givens.crossing(4)},
            "^schedule must be None for mixing='householder', got crossing",
        ),
    ],
    ids=str,
)
def test_bad_arguments_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Sylvester(**options)


def test_images_are_refused():
    with pytest.raises(
        ValueError, match=r"^inputs must be vectors \(batch, 3\), got \(4, 3, 2, 2"
    ):
        Sylvester(3)(torch.randn(4, 3, 2, 2))
