"""Batches that a resumed run can repeat."""

import pytest
import torch

from datasets.base import Batches, seeded_generator


def order(loader: Batches) -> list[int]:
    return torch.cat([rows for (rows,) in loader]).tolist()


def test_batches_cover_every_row_once():
    loader = Batches(torch.arange(10), batch_size=4, shuffle=True)
    assert [len(rows) for (rows,) in loader] == [4, 4, 2] and len(loader) == 3
    assert sorted(order(loader)) == list(range(10))


def test_the_order_depends_on_seed_and_epoch_alone():
    loader, twin = (Batches(torch.arange(100), batch_size=7, shuffle=True) for _ in range(2))
    other = Batches(torch.arange(100), batch_size=7, shuffle=True, seed=1)
    first = order(loader)
    torch.rand(3)  # the global generator plays no part
    assert order(twin) == first and order(other) != first
    loader.set_epoch(5)
    assert order(loader) != first
    twin.sampler.set_epoch(5)
    assert order(twin) == order(loader)


def test_without_shuffling_rows_keep_their_order():
    assert order(Batches(torch.arange(5), batch_size=2)) == [0, 1, 2, 3, 4]


def test_rows_of_several_tensors_stay_together():
    x = torch.arange(9)
    for a, b in Batches(x, -x, batch_size=4, shuffle=True):
        assert torch.equal(a, -b)


def test_no_rows_make_no_batches():
    assert list(Batches(torch.empty(0, 2), batch_size=4, shuffle=True)) == []


def test_bad_sizes_are_refused():
    with pytest.raises(ValueError, match="at least 1, got 0"):
        Batches(torch.arange(3), batch_size=0)
    with pytest.raises(ValueError, match=r"one length, got \[3, 2\]"):
        Batches(torch.arange(3), torch.arange(2), batch_size=1)


def test_neighbouring_seeds_give_unrelated_streams():
    streams = [
        torch.randn(20_000, generator=seeded_generator(*seeds))
        for seeds in ((0, 0), (0, 1), (1, 0), (1, 1), (0,), (-1, 0))
    ]
    correlations = torch.corrcoef(torch.stack(streams)) - torch.eye(len(streams))
    assert correlations.abs().max() < 5 / 20_000**0.5
