"""LULinear: its factors, its start, its precision; test_contract.py has what all layers share."""

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import gradgradcheck
from torch.func import functional_call, jvp, vmap

from flows.transforms import LULinear

SIZES = [2, 3, 8, 17]
each_size = pytest.mark.parametrize("features", SIZES)
each_init = pytest.mark.parametrize("init", ["identity", "haar"])


def randomized(features: int, init: str = "haar") -> LULinear:
    layer = LULinear(features, init=init).double()
    nn.init.normal_(layer.factors, std=0.3)
    return layer


def formula(layer: LULinear) -> Tensor:
    """P L (U + diag(s)), entry by entry."""
    n, factors = len(layer.order), layer.factors.tolist()
    lower, upper, p = (torch.zeros(n, n, dtype=torch.float64) for _ in range(3))
    for i in range(n):
        p[i, layer.order[i]] = lower[i, i] = 1.0
        upper[i, i] = layer.signs[i] * torch.tensor(factors[i][i]).exp()
        for j in range(i):
            lower[i, j], upper[j, i] = factors[i][j], factors[j][i]
    return p @ lower @ upper


@each_size
def test_it_multiplies_by_the_product_of_its_factors(features):
    layer = randomized(features)
    w = formula(layer)
    torch.testing.assert_close(layer.matrix(), w, atol=1e-6, rtol=1e-6)
    w = layer.matrix().detach()
    x = torch.randn(5, features, dtype=torch.float64)
    torch.testing.assert_close(layer(x)[0], x @ w.mT)
    torch.testing.assert_close(layer.inverse(x)[0], torch.linalg.solve(w, x.mT).mT)
    torch.testing.assert_close(layer(x)[1], w.slogdet()[1].expand(5))


def test_positions_of_an_image_are_rows_and_count_in_the_volume():
    layer, images = randomized(3), torch.randn(4, 3, 2, 5, dtype=torch.float64)
    rows = images.movedim(1, -1).reshape(-1, 3)
    for direction in (layer, layer.inverse):
        outputs, logabsdet = direction(images)
        expected, volume = direction(rows)
        assert outputs.shape == images.shape
        torch.testing.assert_close(outputs.movedim(1, -1).reshape(-1, 3), expected)
        torch.testing.assert_close(logabsdet, volume.view(4, 10).sum(1))


@each_size
def test_starts_at_the_identity_or_at_a_random_orthogonal_matrix(features):
    eye = torch.eye(features)
    assert torch.equal(LULinear(features).matrix(), eye)
    first, second = (LULinear(features, init="haar").matrix() for _ in range(2))
    torch.testing.assert_close(first @ first.mT, eye, atol=1e-5, rtol=0)
    assert (first - second).abs().max() > 0.1
    torch.manual_seed(3)
    expected = nn.init.orthogonal_(torch.empty(features, features, dtype=torch.float64))
    torch.manual_seed(3)
    layer = LULinear(features, init="haar")
    torch.testing.assert_close(layer.matrix(), expected.float(), atol=1e-5, rtol=0)
    assert layer.factors.tril(-1).abs().max() <= 1  # pivots are the largest of their column


def test_a_random_start_moves_rows_and_has_signs():
    layers = [LULinear(6, init="haar") for _ in range(20)]
    assert any(layer.order.tolist() != list(range(6)) for layer in layers)
    assert {sign for layer in layers for sign in layer.signs.tolist()} == {-1.0, 1.0}


@each_init
def test_it_learns_a_matrix_that_no_rotation_is(init):
    layer, x = LULinear(4, init=init).double(), torch.randn(64, 4, dtype=torch.float64)
    start = layer.matrix().detach()
    target = start @ torch.tensor([2.0, 1.0, 1.0, 0.5]).double().diag() + 0.1
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.03)
    for _ in range(300):
        optimizer.zero_grad()
        (layer(x)[0] - x @ target.mT).square().mean().backward()
        optimizer.step()
    torch.testing.assert_close(layer.matrix(), target, atol=0.02, rtol=0)


@each_size
def test_parameters_have_first_and_second_derivatives_in_both_directions(features):
    layer = randomized(min(features, 4))
    x = torch.randn(2, min(features, 4), dtype=torch.float64, requires_grad=True)
    for direction in (layer.forward, layer.inverse):

        def results(x: Tensor, factors: Tensor, direction=direction) -> tuple[Tensor, Tensor]:
            call = _Direction(layer, direction.__name__)
            return functional_call(call, {"layer.factors": factors}, (x,))

        assert gradgradcheck(results, (x, layer.factors), fast_mode=True)


class _Direction(nn.Module):
    def __init__(self, layer: LULinear, name: str) -> None:
        super().__init__()
        self.layer, self.name = layer, name

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return getattr(self.layer, self.name)(x)


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")
@pytest.mark.parametrize("name", ["forward", "inverse"])
def test_transforms_of_torch_func_go_through(name):
    layer = randomized(3)
    call = _Direction(layer, name)
    x, several = torch.randn(4, 3).double(), 0.3 * torch.randn(5, 3, 3).double()

    def outputs(factors: Tensor) -> Tensor:
        return functional_call(call, {"layer.factors": factors}, (x,))[0]

    each = torch.stack([outputs(factors) for factors in several])
    torch.testing.assert_close(vmap(outputs)(several), each)
    tangent, step = torch.randn(3, 3).double(), 1e-6
    _, slope = jvp(outputs, (several[0],), (tangent,))
    ends = [outputs(several[0] + sign * step * tangent) for sign in (1, -1)]
    torch.testing.assert_close(slope, (ends[0] - ends[1]) / (2 * step), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_autocast_does_not_blunt_it(dtype):
    layer, x = randomized(8).to(dtype), torch.randn(4, 8, dtype=dtype)
    for direction in (layer, layer.inverse):
        expected = direction(x)
        with torch.autocast("cpu", torch.bfloat16):
            torch.testing.assert_close(direction(x), expected, atol=0, rtol=0)


def test_half_precision_is_solved_in_single():
    layer = randomized(4)
    x = torch.randn(50, 4, dtype=torch.float64)
    expected = layer.inverse(x)[0]
    outputs, logabsdet = layer.bfloat16().inverse(x.bfloat16())
    assert outputs.dtype == logabsdet.dtype == torch.bfloat16
    assert (outputs.double() - expected).abs().max() < 0.05 * expected.abs().max()


def test_the_inverse_holds_to_rounding_in_single_precision():
    layer, x = LULinear(64, init="haar"), torch.randn(100, 64)
    with torch.no_grad():
        layer.factors += 0.02 * torch.randn(64, 64)
        back = layer.inverse(layer(x)[0])[0]
    condition = torch.linalg.cond(layer.matrix())
    assert (back - x).abs().max() < 20 * torch.finfo(torch.float32).eps * condition


def test_exported_program_takes_any_number_of_rows():
    layer = LULinear(4, init="haar")
    rows = {"inputs": {0: torch.export.Dim("rows")}}
    program = torch.export.export(layer, (torch.randn(3, 4, 2, 2),), dynamic_shapes=rows)
    inputs = torch.randn(7, 4, 2, 2)
    torch.testing.assert_close(program.module()(inputs), layer(inputs))


def test_casting_keeps_order_and_signs():
    layer = LULinear(300, init="haar")
    order, signs = layer.order.clone(), layer.signs.clone()
    layer.bfloat16()
    assert torch.equal(layer.order, order) and torch.equal(layer.signs.float(), signs)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"features": 1}, "^features must be at least 2, got 1"),
        ({"features": 3, "init": "random"}, "^init must be 'identity' or 'haar', got 'random'"),
    ],
    ids=str,
)
def test_bad_arguments_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        LULinear(**options)


def test_repr_tells_the_size():
    assert repr(LULinear(5)) == "LULinear(features=5)"
