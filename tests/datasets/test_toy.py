import pytest
import torch
from jsonargparse import ArgumentParser

from datasets import toy
from datasets.toy import DENSITIES

MODULES = {
    "two_moons": toy.TwoMoons,
    "circles": toy.Circles,
    "rings": toy.Rings,
    "eight_gaussians": toy.EightGaussians,
    "twenty_five_gaussians": toy.TwentyFiveGaussians,
    "pinwheel": toy.Pinwheel,
    "checkerboard": toy.Checkerboard,
    "two_spirals": toy.TwoSpirals,
    "swiss_roll": toy.SwissRoll,
    "banana": toy.Banana,
}


def test_every_density_has_a_data_module():
    assert {name: module.density for name, module in MODULES.items()} == DENSITIES


def batches(epoch, **arguments):
    loader = toy.TwoMoons(batch_size=7, batches_per_epoch=3, **arguments).train_dataloader()
    loader.sampler.set_epoch(epoch)
    assert len(loader) == 3
    return [inputs for (inputs,) in loader]


def test_epochs_differ_and_repeat_by_seed_and_epoch():
    first = torch.cat(batches(0))
    assert first.shape == (21, 2)
    assert torch.equal(first, torch.cat(batches(0)))
    together = torch.cat((first, *batches(1), *batches(0, seed=1)))
    assert len(together.unique(dim=0)) == 63


def test_training_batches_and_splits_share_no_sample():
    # Of one size, because equal seeds give equal samples only to equal sizes.
    data = toy.Rings(batch_size=4096, batches_per_epoch=3, val_size=4096, test_size=4096)
    data.setup()
    rows = torch.cat([x for (x,) in (*data.splits.values(), *data.train_dataloader())])
    assert rows.shape == (6 * 4096, 2)
    assert len(rows.unique(dim=0)) == len(rows)


def test_validation_and_test_repeat_and_depend_on_the_seed():
    def splits(seed):
        data = toy.Banana(val_size=10, test_size=20, seed=seed)
        data.setup("fit")
        (val,), (test,) = data.val_dataloader(), data.test_dataloader()
        return torch.cat((*val, *test))

    assert splits(0).shape == (30, 2)
    assert torch.equal(splits(0), splits(0))
    assert not torch.equal(splits(0), splits(1))


@pytest.mark.parametrize("name", ["batch_size", "batches_per_epoch", "val_size", "test_size"])
def test_sizes_below_one_are_refused(name):
    with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0."):
        toy.Circles(**{name: 0})


@pytest.mark.parametrize("module", MODULES.values())
def test_command_line_reads_the_arguments(module):
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(toy.Toy, "data")
    path = f"datasets.toy.{module.__name__}"
    data = parser.parse_args([f"--data={path}", "--data.val_size=5", "--data.batch_size=3"]).data
    assert data.class_path == path
    arguments = dict(batch_size=3, batches_per_epoch=100, val_size=5, test_size=50_000, seed=0)
    assert vars(data.init_args) == arguments
    assert module(**arguments).shape == (2,)
