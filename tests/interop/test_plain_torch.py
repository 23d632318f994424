"""Rotations and orthogonal weights in networks that are no flows."""

import copy

import pytest
import torch
from torch import Tensor, nn

from flows import Rotation, orthogonal


class Classifier(nn.Module):
    """User code: a rotation between two linear layers, by its matrix or by its call."""

    def __init__(self, *, by_matrix: bool) -> None:
        super().__init__()
        self.first = nn.Linear(6, 8)
        self.rotation = Rotation(8, init="haar")
        self.last = nn.Linear(8, 2)
        self.by_matrix = by_matrix

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.first(x))
        if self.by_matrix:
            hidden = nn.functional.linear(hidden, self.rotation.matrix())
        else:
            hidden = self.rotation(hidden)[0]
        return self.last(torch.tanh(hidden))


def plain_network() -> nn.Sequential:
    return nn.Sequential(
        orthogonal(nn.Linear(6, 16)),
        nn.Tanh(),
        orthogonal(nn.Linear(16, 16)),
        nn.Tanh(),
        orthogonal(nn.Linear(16, 2)),
    )


def convolutional_network() -> nn.Sequential:
    return nn.Sequential(
        nn.Unflatten(1, (1, 6)), orthogonal(nn.Conv1d(1, 4, 3)), nn.Flatten(), nn.Linear(16, 2)
    )


NETWORKS = {
    "rotation by its matrix": lambda: Classifier(by_matrix=True),
    "rotation by its call": lambda: Classifier(by_matrix=False),
    "orthogonal linear": plain_network,
    "orthogonal convolution": convolutional_network,
}


@pytest.fixture(params=NETWORKS.values(), ids=NETWORKS.keys())
def make(request):
    return request.param


def data() -> tuple[Tensor, Tensor]:
    x = torch.randn(200, 6)
    return x, (x[:, 0] + x[:, 1] > 0).long()


def fit(network: nn.Module, steps: int = 40) -> list[float]:
    x, labels = data()
    optimizer = torch.optim.Adam(network.parameters(), lr=0.03)
    losses = []
    for _ in range(steps):
        loss = nn.functional.cross_entropy(network(x), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def orthogonal_matrices(network: nn.Module) -> list[Tensor]:
    found = [m.matrix() for m in network.modules() if isinstance(m, Rotation)]
    parametrized = [m for m in network.modules() if nn.utils.parametrize.is_parametrized(m)]
    return found + [m.weight.flatten(1) for m in parametrized]


def test_it_learns_and_stays_orthogonal(make):
    network = make()
    before = [w.detach().clone() for w in orthogonal_matrices(network)]
    losses = fit(network)
    assert losses[-1] < 0.7 * losses[0]
    after = orthogonal_matrices(network)
    assert before
    for old, new in zip(before, after, strict=True):
        assert (old - new).abs().max() > 1e-2  # it was learned
        wide = new if len(new) <= new.shape[1] else new.mT
        torch.testing.assert_close(wide @ wide.mT, torch.eye(len(wide)), rtol=0, atol=1e-5)


def test_a_state_dict_gives_the_same_network(make):
    network, other = make(), make()
    fit(network, 3)
    x, _ = data()
    assert not torch.equal(network(x), other(x))
    other.load_state_dict(network.state_dict())
    assert torch.equal(network(x), other(x))


def test_a_deepcopy_is_the_same_and_learns_alone(make):
    network = make()
    x, _ = data()
    twin = copy.deepcopy(network)
    before = network(x)
    assert torch.equal(before, twin(x))
    fit(twin, 3)
    assert torch.equal(before, network(x))
    assert not torch.equal(before, twin(x))


def test_a_rotation_takes_any_leading_axes_in_a_sequential():
    class First(nn.Module):
        """What a Sequential needs: one output."""

        def __init__(self, transform: nn.Module) -> None:
            super().__init__()
            self.transform = transform

        def forward(self, x: Tensor) -> Tensor:
            return self.transform(x)[0]

    network = nn.Sequential(nn.Linear(3, 4), First(Rotation(4, init="haar")), nn.LayerNorm(4))
    assert network(torch.randn(2, 5, 3)).shape == (2, 5, 4)
