"""Which outputs of the masked net see which inputs."""

from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.functional import jacobian

from flows.nets import MADE


def randomized(net: nn.Module) -> nn.Module:
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.5)
    return net.double().eval()


def seen(net: nn.Module, features: int, context: Tensor | None = None) -> Tensor:
    """Whether any output of feature i changes with input j, over some random inputs."""
    found = torch.zeros(features, features, dtype=torch.bool)
    for _ in range(5):
        x = torch.randn(1, features, dtype=torch.float64)
        matrix = jacobian(lambda x: net(x, context), x)  # (1, features, parameters, 1, features)
        found |= (matrix != 0).any(dim=2)[0, :, 0]
    return found


@pytest.mark.parametrize("context_features", [0, 2])
@pytest.mark.parametrize("blocks", [0, 1, 3])
@pytest.mark.parametrize(("features", "hidden"), [(1, 1), (2, 5), (3, 3), (5, 5), (5, 64), (7, 9)])
def test_outputs_see_all_features_before_and_no_others(features, hidden, blocks, context_features):
    net = MADE(
        features, 4, hidden_features=hidden, blocks=blocks, context_features=context_features
    )
    context = torch.randn(1, context_features, dtype=torch.float64)
    before = torch.ones(features, features, dtype=torch.bool).tril(-1)
    assert torch.equal(seen(randomized(net), features, context), before)


@pytest.mark.parametrize("features", [1, 2, 5])
def test_every_output_sees_every_feature_of_the_context(features):
    net = randomized(MADE(features, 3, hidden_features=8, context_features=2))
    x = torch.randn(1, features, dtype=torch.float64)
    context = torch.randn(1, 2, dtype=torch.float64)
    assert (jacobian(partial(net, x), context) != 0).all()


def test_no_unit_is_idle():
    # A unit of degree 0 is a constant unless there is a context.
    for context_features, lowest in [(0, 1), (2, 0)]:
        net = MADE(4, 1, hidden_features=12, context_features=context_features)
        assert net.first.mask[:, :4].sum(1).unique().tolist() == list(range(lowest, 4))


def test_masks_are_not_saved():
    assert not any("mask" in name for name in MADE(3, 2).state_dict())


def test_fewer_units_than_features_are_refused():
    with pytest.raises(
        ValueError, match=r"^hidden_features must be at least the 5 features, got 4"
    ):
        MADE(5, 2, hidden_features=4)
