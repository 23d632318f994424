"""Two processes, each with half of the batch, step as one does with all of it."""

import os

import pytest
import torch
from torch import Tensor, multiprocessing, nn
from torch.nn.parallel import DistributedDataParallel

from flows.optim import SENG, NGPlus, ProxProp

OPTIMIZERS = {
    "NG+": lambda model: NGPlus(model, lr=0.1, refresh_every=2),
    "NG+, mean gradient": lambda model: NGPlus(model, lr=0.1, statistic="mean_grad"),
    "ProxProp": lambda model: ProxProp(model, lr=0.1),
    "ProxProp, normalized": lambda model: ProxProp(model, lr=0.1, normalize=True),
    "SENG": lambda model: SENG(model, lr=0.1, refresh_every=2),
}


def make_model() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 3, 2), nn.Tanh(), nn.Flatten(), nn.Linear(27, 4), nn.Tanh(), nn.Linear(4, 2)
    )
    return model.double()


def train(optimizer: torch.optim.Optimizer, model: nn.Module, rows: slice) -> Tensor:
    """All parameters, after four steps on some rows of each batch."""
    generator = torch.Generator().manual_seed(1)
    for _ in range(4):
        batch = torch.randn(12, 1, 4, 4, dtype=torch.float64, generator=generator)
        optimizer.zero_grad()
        # Half of the batch after the other, as gradients are accumulated.
        for part in batch[rows].chunk(2):
            (0.5 * model(part).square().sum(1).mean()).backward()
        optimizer.step()
    return torch.nn.utils.parameters_to_vector(model.parameters()).detach()


def _distributed(rank: int, address: str, queue) -> None:
    torch.set_num_threads(1)
    os.environ |= {"GLOO_SOCKET_IFNAME": "lo"}
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{address}", rank=rank, world_size=2
    )
    found = []
    for make in OPTIMIZERS.values():
        inner = make_model()
        model = DistributedDataParallel(inner)
        parameters = train(make(inner), model, slice(6 * rank, 6 * rank + 6))
        both = [torch.empty_like(parameters) for _ in range(2)]
        torch.distributed.all_gather(both, parameters)
        found.append([one.numpy() for one in both])
    if rank == 0:
        queue.put(found)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def gathered(tmp_path_factory) -> dict[str, list[Tensor]]:
    """The parameters of both processes."""
    queue = multiprocessing.get_context("spawn").SimpleQueue()
    arguments = str(tmp_path_factory.mktemp("gathered") / "meeting"), queue
    running = multiprocessing.spawn(_distributed, arguments, nprocs=2, join=False)
    found = queue.get()
    running.join()
    return {
        name: [torch.from_numpy(one) for one in both]
        for name, both in zip(OPTIMIZERS, found, strict=True)
    }


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_two_processes_stay_together(gathered, name):
    assert torch.equal(*gathered[name])


@pytest.mark.parametrize("name", [name for name in OPTIMIZERS if name != "SENG"])
def test_two_processes_step_as_one_with_the_whole_batch(gathered, name):
    model = make_model()
    alone = train(OPTIMIZERS[name](model), model, slice(None))
    torch.testing.assert_close(gathered[name][0], alone, rtol=1e-9, atol=1e-10)
