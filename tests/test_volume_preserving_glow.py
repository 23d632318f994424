"""The recipe for images that changes volume in one fixed step only."""

from pathlib import Path

import pytest
import torch
from torch import nn

import flows
from flows.distributions import GaussianMixture
from flows.recipes import VolumePreservingGlow

SMALL = {
    "shape": (1, 4, 8),
    "grey_levels": 17,
    "levels": 2,
    "steps": 2,
    "hidden_features": 3,
    "components": 4,
}
COUPLINGS = ["incompressible", "additive", "rotation"]


def randomized(flow: VolumePreservingGlow) -> VolumePreservingGlow:
    for parameter in flow.parameters():
        nn.init.normal_(parameter, std=0.2)
    return flow.double()


def levels(rows: int) -> torch.Tensor:
    return torch.randint(17, (rows, *SMALL["shape"])).double() / 17


@pytest.mark.parametrize("coupling", COUPLINGS)
def test_it_inverts_and_changes_volume_in_the_fixed_step_only(coupling):
    flow = randomized(VolumePreservingGlow(coupling=coupling, **SMALL))
    images = levels(40)
    flow.train()(images)
    flow.eval()
    dequantize, cdf, layers = flow.transform.transforms
    normal, fixed = cdf(dequantize(images)[0])
    noise, logabsdet = layers(normal)
    assert not logabsdet.any() and fixed.all()
    assert not torch.allclose(noise.sort(1)[0], normal.flatten(1).sort(1)[0])
    torch.testing.assert_close(layers.inverse(noise)[0], normal)
    samples = flow.sample(5)
    assert samples.shape == (5, *SMALL["shape"])
    torch.testing.assert_close(17 * samples, (17 * samples).round())  # grey levels again


def test_without_steps_the_mixture_is_alone():
    flow = VolumePreservingGlow(**{**SMALL, "steps": 0})
    base = GaussianMixture(32, 4)
    assert [p.shape for p in flow.parameters()] == [p.shape for p in base.parameters()]


@pytest.mark.parametrize("coupling", COUPLINGS)
def test_layers_and_base_learn(coupling):
    flow = VolumePreservingGlow(**{**SMALL, "coupling": coupling, "hidden_features": 16})
    images = levels(200).float().sort(3)[0]  # each row gets brighter
    optimizer = torch.optim.Adam(flow.parameters(), lr=1e-2)
    losses = []
    for _ in range(40):
        optimizer.zero_grad()
        loss = -flow(images).mean()
        loss.backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in flow.parameters())
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 5


def test_the_label_reaches_every_conditioner_and_the_base():
    flow = randomized(VolumePreservingGlow(classes=3, **SMALL)).eval()
    images, labels = levels(12), torch.arange(12) % 3
    conditions = [p for name, p in flow.named_parameters() if name.endswith("condition.weight")]
    conditions.append(flow.distribution.net.first.weight)
    assert len(conditions) == 5
    for gradient in torch.autograd.grad(flow(images, labels).sum(), conditions):
        assert gradient.any(0).all()
    assert flow.sample(2, labels[:4]).shape == (4, 2, *SMALL["shape"])


def test_it_comes_back_from_a_checkpoint(tmp_path: Path):
    flow = randomized(VolumePreservingGlow(**SMALL)).float().eval()
    config = {"class_path": "flows.recipes.VolumePreservingGlow", "init_args": SMALL}
    weights = {f"flow.{name}": value for name, value in flow.state_dict().items()}
    torch.save({"state_dict": weights, "flow_config": config}, tmp_path / "last.ckpt")
    samples = []
    for each in (flow, flows.load(tmp_path)):
        torch.manual_seed(1)
        samples.append(each.sample(3))
    assert torch.equal(*samples)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shape": (1, 6, 8)}, "divisible by 4, got 6 x 8"),
        ({"levels": 0}, "at least one level, got"),
        ({"steps": -1}, "steps must be at least 0, got -1"),
        ({"components": 0}, "components must be at least 1, got 0"),
        ({"grey_levels": 1}, "grey_levels must be at least 2, got 1"),
        ({"coupling": "affine"}, "coupling must be one of .*, got 'affine'"),
        ({"hidden_features": 0}, "hidden_features must .*, got 0"),
    ],
    ids=str,
)
def test_bad_arguments_are_refused(options, message):
    with pytest.raises(ValueError, match=message) as error:
        VolumePreservingGlow(**{**SMALL, **options})
    assert "\n" not in str(error.value)
