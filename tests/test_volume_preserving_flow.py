"""The recipe that never changes volume."""

from functools import partial

import pytest
import torch
from nflows.transforms import Tanh
from torch import nn

from flows import ActNorm, AffineCoupling, Composite, ElementwiseSpline, Rotation, Twist
from flows.nets import MLP
from flows.recipes import VolumePreservingFlow
from flows.transforms import RotationCoupling

SMALL = {"layers": 3, "hidden_features": 8, "blocks": 1, "components": 4}


def randomized(flow: VolumePreservingFlow) -> VolumePreservingFlow:
    for parameter in flow.parameters():
        nn.init.normal_(parameter, std=0.5)
    return flow.double().eval()


@pytest.mark.parametrize("features", [2, 3, 6])
def test_it_inverts_and_keeps_volume(features):
    flow = randomized(VolumePreservingFlow(features, **SMALL))
    x = torch.randn(50, features, dtype=torch.float64)
    noise, logabsdet = flow.transform(x)
    assert not logabsdet.any() and not torch.equal(noise, x)
    torch.testing.assert_close(flow.transform.inverse(noise)[0], x, atol=1e-10, rtol=1e-10)
    assert torch.equal(flow(x), flow.distribution.log_prob(noise))
    assert flow.sample(7).shape == (7, features)


def test_successive_twists_pair_other_features():
    flow = VolumePreservingFlow(6, **SMALL)
    assert [m.matching for m in flow.modules() if isinstance(m, Twist)] == [0, 1, 2]
    flips = [m.flip for m in flow.modules() if isinstance(m, RotationCoupling)]
    assert flips == [False, True, False]


def test_volume_is_kept_after_training_and_base_and_layers_learn():
    flow = VolumePreservingFlow(2, **SMALL)
    x = torch.randn(256, 2)
    x[:, 1] += x[:, 0].square()
    optimizer = torch.optim.Adam(flow.parameters(), lr=1e-2)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = -flow(x).mean()
        loss.backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in flow.parameters())
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.2
    assert not flow.transform(x)[1].any()


@pytest.mark.parametrize("options", [{"context_features": 2}, {"classes": 3}], ids=str)
def test_context_reaches_base_and_layers(options):
    flow = randomized(VolumePreservingFlow(3, **SMALL, **options))
    context = torch.tensor([0, 1]) if "classes" in options else torch.randn(2, 2).double()
    x = torch.randn(1, 3, dtype=torch.float64).expand(2, 3)
    noise = flow.transform_to_noise(x, context)
    assert not torch.equal(noise[0], noise[1])
    base = flow.distribution.log_prob(x, flow.embedding_net(context))
    assert not torch.equal(base[0], base[1])
    assert flow.sample(4, context).shape == (2, 4, 3)


def test_own_transforms_are_taken_if_they_preserve_volume():
    net = partial(MLP, hidden_features=4)
    transforms = [Rotation(3), Composite([Twist(3, net)])]
    flow = VolumePreservingFlow(3, transforms=transforms)
    assert list(flow.transform.transforms) == transforms


@pytest.mark.parametrize(
    "make",
    [
        lambda: ActNorm(3),
        lambda: AffineCoupling(3, MLP),
        lambda: Composite([Rotation(3), ElementwiseSpline(3)]),
        Tanh,
    ],
)
def test_parts_that_change_volume_are_refused(make):
    part = make()
    name = type(part).__name__
    with pytest.raises(ValueError, match=f"must all preserve volume, got {name}, which may not"):
        VolumePreservingFlow(3, transforms=[Rotation(3), part])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"features": 1}, "features must be at least 2, got 1"),
        ({"features": 2, "layers": 0}, "layers must be at least 1, got 0"),
        ({"features": 2, "components": 0}, "components must be at least 1, got 0"),
    ],
)
def test_bad_arguments_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        VolumePreservingFlow(**options)
