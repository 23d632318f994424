"""Layers that look at their first batch look at that of all processes."""

import os

import pytest
import torch
from torch import Tensor, multiprocessing, nn

from flows.transforms import ActNorm, EmpiricalCDF, Standardize
from flows.transforms.base import Transform

LAYERS = {
    "actnorm": lambda: ActNorm(3),
    "standardize": lambda: Standardize(3),
    "empirical cdf": lambda: EmpiricalCDF(3, bins=5),
}
# Rows of the second process: as many as the first, fewer, none.
SECOND = (10, 3, 0)


def data() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.rand(20, 3, dtype=torch.float64, generator=generator) ** 2


def statistics(layer: Transform) -> list[Tensor]:
    return [value.double() for value in layer.state_dict().values()]


def _distributed(rank: int, address: str, queue) -> None:
    torch.set_num_threads(1)
    os.environ |= {"GLOO_SOCKET_IFNAME": "lo"}
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{address}", rank=rank, world_size=2
    )
    found = []
    for make in LAYERS.values():
        for second in SECOND:
            layer = make().double()
            layer(data()[:10] if rank == 0 else data()[10 : 10 + second])
            found.append([value.numpy() for value in statistics(layer)])
    if rank == 1:  # whose own rows say least
        queue.put(found)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def gathered(tmp_path_factory) -> dict[tuple[str, int], list[Tensor]]:
    """The statistics that the second of two processes ends with."""
    queue = multiprocessing.get_context("spawn").SimpleQueue()
    arguments = str(tmp_path_factory.mktemp("gathered") / "meeting"), queue
    running = multiprocessing.spawn(_distributed, arguments, nprocs=2, join=False)
    found = iter(queue.get())
    running.join()
    return {
        (name, second): [torch.from_numpy(value) for value in next(found)]
        for name in LAYERS
        for second in SECOND
    }


@pytest.mark.parametrize("second", SECOND)
@pytest.mark.parametrize("name", LAYERS)
def test_statistics_are_those_of_all_rows(gathered, name, second):
    layer: nn.Module = LAYERS[name]().double()
    layer(data()[: 10 + second])
    for found, expected in zip(gathered[name, second], statistics(layer), strict=True):
        torch.testing.assert_close(found, expected, atol=1e-12, rtol=1e-12)
