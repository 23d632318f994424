"""Batches that a resumed run can repeat."""

import pytest
import torch

from datasets import base
from datasets.base import Batches, seeded_generator
from datasets.toy import TwoMoons


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


def parts(monkeypatch, make, processes: int) -> list[list[torch.Tensor]]:
    """The batches that each of so many processes would see."""
    found = []
    for process in range(processes):
        monkeypatch.setattr(base, "_place", lambda process=process: (process, processes))
        loader = make()
        loader.set_epoch(3)
        batches = [rows for (rows,) in loader]
        assert len(batches) == len(loader)
        found.append(batches)
    assert len({len(batches) for batches in found}) == 1
    return found


@pytest.mark.parametrize("processes", [1, 2, 3, 5])
@pytest.mark.parametrize("rows", [30, 31, 32, 37, 60])
def test_processes_share_every_batch_of_an_epoch_evenly(monkeypatch, rows, processes):
    def make(size):
        return lambda: Batches(torch.arange(rows), batch_size=size, shuffle=True, seed=4)

    found = parts(monkeypatch, make(4), processes)
    ((*alone,),) = parts(monkeypatch, make(4 * processes), 1)
    for number, batch in enumerate(zip(*found, strict=True)):
        assert len({len(part) for part in batch}) == 1  # or the mean of means is no mean
        together = torch.cat(batch)
        assert torch.equal(together, alone[number][: len(together)])
    assert sum(len(part) for batches in found for part in batches) == rows - rows % processes


@pytest.mark.parametrize("processes", [1, 2, 3, 5])
@pytest.mark.parametrize("rows", [1, 2, 29, 30, 41])
def test_processes_validate_every_row_once(monkeypatch, rows, processes):
    found = parts(monkeypatch, lambda: Batches(torch.arange(rows), batch_size=4), processes)
    together = [part for batch in zip(*found, strict=True) for part in batch]
    assert torch.equal(torch.cat(together), torch.arange(rows))


def test_processes_draw_parts_of_the_same_fresh_batches(monkeypatch):
    def make(size):
        return TwoMoons(batch_size=size, batches_per_epoch=3, seed=1).train_dataloader

    found = parts(monkeypatch, make(5), 4)
    ((*alone,),) = parts(monkeypatch, make(20), 1)
    for number, batch in enumerate(zip(*found, strict=True)):
        assert torch.equal(torch.cat(batch), alone[number])


def test_fewer_training_rows_than_processes_are_refused(monkeypatch):
    monkeypatch.setattr(base, "_place", lambda: (0, 4))
    loader = Batches(torch.arange(3), batch_size=2, shuffle=True)
    with pytest.raises(ValueError, match="4 processes need at least 4 training rows, got 3"):
        len(loader)


@pytest.mark.parametrize(
    "make",
    [
        lambda: Batches(torch.arange(50), batch_size=7, shuffle=True),
        lambda: TwoMoons(batch_size=7, batches_per_epoch=8).train_dataloader(),
    ],
    ids=["rows", "fresh"],
)
@pytest.mark.parametrize("seen", [1, 4, 8])
def test_a_loader_goes_on_within_an_epoch(make, seen):
    loader, resumed = make(), make()
    loader.set_epoch(2)
    batches = [rows for (rows,) in loader]
    running = iter(loader)
    for _ in range(seen):
        next(running)
    resumed.load_state_dict(loader.state_dict())
    running = iter(resumed)  # before the epoch is announced, as Lightning does
    resumed.set_epoch(2)
    rest = [rows for (rows,) in running]
    assert len(rest) == 8 - seen
    assert all(map(torch.equal, rest, batches[seen:]))
    resumed.set_epoch(3)
    loader.set_epoch(3)
    assert all(torch.equal(a, b) for (a,), (b,) in zip(resumed, loader, strict=True))


def test_an_epoch_that_was_cut_short_is_not_gone_on_with_in_the_next():
    loader, resumed = (Batches(torch.arange(50), batch_size=7) for _ in range(2))
    next(iter(loader))
    resumed.load_state_dict(loader.state_dict())
    resumed.set_epoch(1)
    assert len(list(resumed)) == 8
