"""Permutation: an order drawn once."""

import pytest
import torch

from flows.transforms import Permutation


def test_features_come_in_the_order_drawn():
    layer = Permutation(7)
    outputs, _ = layer(torch.arange(7.0).view(1, 7))
    assert outputs[0].tolist() == layer.order.tolist() != list(range(7))
    assert sorted(layer.order.tolist()) == list(range(7))


def test_the_order_depends_on_the_seed_alone():
    torch.manual_seed(1)
    first, other = Permutation(7), Permutation(7)
    torch.manual_seed(1)
    assert torch.equal(Permutation(7).order, first.order)
    assert not torch.equal(first.order, other.order)


def test_casting_keeps_the_order():
    layer = Permutation(300)
    order = layer.order.clone()
    assert torch.equal(layer.to(torch.bfloat16).order, order)


def test_every_seat_is_equally_likely():
    seats = torch.stack([Permutation(3).order for _ in range(600)])
    counts = torch.stack([(seats == feature).sum(0) for feature in range(3)])
    assert (counts - 200).abs().max() < 60  # five standard deviations


def test_no_features_are_refused():
    with pytest.raises(ValueError, match="^features must be at least 1, got 0"):
        Permutation(0)
