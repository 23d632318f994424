"""Whole models: they run, invert and refuse what cannot work."""

import pytest
import torch
from torch import nn

from flows import Flow
from flows.recipes import Glow, RotationSplineFlow
from flows.transforms import (
    AffineCoupling,
    EmpiricalCDF,
    Logit,
    Multiscale,
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


@pytest.mark.parametrize("features", [2, 5])
def test_rotation_spline_flow_undoes_itself(features):
    flow = randomized(RotationSplineFlow(features, layers=3, hidden_features=8, bins=4)).eval()
    x = torch.randn(50, features)
    z, logabsdet = flow.transform(x)
    back, inverse_logabsdet = flow.transform.inverse(z)
    torch.testing.assert_close(back, x, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(inverse_logabsdet, -logabsdet, atol=1e-3, rtol=1e-3)
    assert flow(x).shape == (50,) and flow(x).isfinite().all()
    assert flow.sample(7).shape == (7, features)


def test_rotation_spline_flow_is_made_of_its_arguments():
    flow = RotationSplineFlow(
        3, layers=5, bins=6, tail_bound=2.5, hidden_features=7, blocks=4, context_features=2
    )
    assert count(flow, Rotation) == count(flow, SplineCoupling) == 5
    for coupling in (m for m in flow.modules() if isinstance(m, SplineCoupling)):
        assert (coupling.bins, coupling.tail_bound) == (6, 2.5)
        assert coupling.net.first.weight.shape == (7, 1 + 2) and len(coupling.net.blocks) == 4
    x, context = torch.randn(4, 3), torch.randn(4, 2)
    log_prob = randomized(flow).eval()(x, context)
    assert log_prob.shape == (4,) and not torch.equal(log_prob, flow(x, context + 1))
    assert flow.sample(6, context).shape == (4, 6, 3)


def test_rotation_spline_flow_starts_as_a_volume_preserving_map():
    flow = RotationSplineFlow(4, layers=3).eval()
    _, logabsdet = flow.transform(torch.randn(20, 4))
    torch.testing.assert_close(logabsdet, torch.zeros(20), atol=1e-4, rtol=0)


def test_rotation_spline_flow_learns():
    flow = RotationSplineFlow(2, layers=2, hidden_features=16)
    x = torch.randn(256, 2)
    x[:, 1] += x[:, 0].square()  # a bent normal: its entropy is that of the straight one
    optimizer = torch.optim.Adam(flow.parameters(), lr=1e-2)
    losses = []
    for _ in range(40):
        optimizer.zero_grad()
        loss = -flow(x).mean()
        loss.backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in flow.parameters())
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.15


@pytest.mark.parametrize("marginals", ["logit", "empirical"])
@pytest.mark.parametrize("coupling", ["affine", "spline"])
def test_glow_undoes_itself(coupling, marginals):
    flow = randomized(Glow(coupling=coupling, marginals=marginals, **GLOW), 0.1).double()
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
        ({"features": 1}, "features must be at least 2, got 1"),
        ({"layers": 0}, "layers must be at least 1, got 0"),
        ({"bins": 1}, "bins must be at least 2, got 1"),
        ({"tail_bound": 0.0}, "tail_bound must be greater than 0, got 0"),
        ({"hidden_features": 0}, "hidden_features must .*, got 0"),
        ({"blocks": -1}, "blocks must .*, got -1"),
        ({"context_features": -1}, "context_features must .*, got -1"),
    ],
    ids=str,
)
def test_rotation_spline_flow_refuses_bad_arguments(options, message):
    with pytest.raises(ValueError, match=message) as error:
        RotationSplineFlow(**{"features": 2, **options})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shape": (1, 6, 8)}, "2 levels need height and width divisible by 4, got 6 x 8"),
        ({"shape": (8, 8)}, "channels, height, width"),
        ({"levels": 0}, "at least one level, got"),
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"grey_levels": 1}, "grey_levels must be at least 2, got 1"),
        ({"coupling": "cubic"}, "coupling must be 'spline' or 'affine', got 'cubic'"),
        ({"marginals": "none"}, "marginals must be 'logit' or 'empirical', got 'none'"),
        ({"hidden_features": 0}, "hidden_features must .*, got 0"),
        ({"dropout": 1.5}, "dropout .* got 1.5"),
    ],
    ids=str,
)
def test_glow_refuses_bad_arguments(options, message):
    with pytest.raises(ValueError, match=message) as error:
        Glow(**{**GLOW, **options})
    assert "\n" not in str(error.value)
