"""Image sets: what is read from their files, how it is split, and what is refused."""

import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from jsonargparse import ArgumentParser
from pytorch_lightning import LightningDataModule
from scipy.io import savemat
from sklearn.datasets import load_digits

from datasets.images import CIFAR10, MNIST, SVHN, Digits, FashionMNIST

ROOT = Path(__file__).parents[2]
EMPTY = bytes([0, 0, 8, 3, 0, 0, 0, 0, 0, 0, 0, 28, 0, 0, 0, 28])  # IDX: 0 images


@pytest.fixture(scope="module")
def digits():
    module = Digits()
    module.setup("fit")
    return module


@pytest.fixture
def images(random_images):
    return {"train": random_images(7, 28, 28), "test": random_images(3, 28, 28, seed=1)}


def ready(module):
    module.setup("fit")
    return module


# Digits


def test_digits_split_into_1000_350_and_447(digits):
    lengths = {name: len(inputs) for name, (inputs,) in digits.splits.items()}
    assert lengths == {"train": 1000, "val": 350, "test": 447}
    assert digits.shape == (1, 8, 8)
    assert all(inputs.shape[1:] == digits.shape for (inputs,) in digits.splits.values())


def test_digits_are_exactly_the_17_levels(digits):
    inputs = torch.cat([inputs for (inputs,) in digits.splits.values()])
    assert digits.grey_levels == 17
    assert inputs.dtype == torch.float32
    assert torch.equal(inputs.unique(), torch.arange(17) / 17)


def test_digits_keep_the_order_of_sklearn(digits):
    inputs = torch.cat([digits.splits[name][0] for name in ("train", "val", "test")])
    expected = torch.from_numpy(load_digits().images)
    assert torch.equal((17 * inputs.double()).round()[:, 0], expected)


def test_digits_come_in_batches_that_cover_the_training_set_in_a_new_order(digits):
    batches = [inputs for (inputs,) in digits.train_dataloader()]
    assert [len(inputs) for inputs in batches] == [100] * 10
    shuffled, stored = torch.cat(batches), digits.splits["train"][0]
    assert not torch.equal(shuffled, stored)
    torch.testing.assert_close(shuffled.double().sum(0), stored.double().sum(0))


def test_digits_give_their_labels_when_asked():
    module = ready(Digits(labels=True))
    labels = torch.cat([module.splits[name][1] for name in ("train", "val", "test")])
    assert module.classes == 10 and Digits().classes is None and labels.dtype == torch.int64
    assert torch.equal(labels, torch.from_numpy(load_digits().target))


# MNIST and Fashion-MNIST

each_mnist = pytest.mark.parametrize("kind", [MNIST, FashionMNIST])


@pytest.mark.parametrize("gzipped", [False, True], ids=["plain", "gzipped"])
@each_mnist
def test_mnist_takes_validation_from_the_end_of_the_training_file(
    kind, tmp_path, images, gzipped, write_mnist
):
    write_mnist(tmp_path, kind.__name__, **images, gzipped=gzipped)
    module = kind(str(tmp_path), val_size=2)
    module.setup("fit")
    assert module.shape == (1, 28, 28) and module.grey_levels == 256
    for name, pixels in {
        "train": images["train"][:5],
        "val": images["train"][5:],
        "test": images["test"],
    }.items():
        (split,) = module.splits[name]
        inputs = split[:]
        assert len(split) == len(pixels)
        assert inputs.dtype == torch.float32
        assert torch.equal(inputs, pixels[:, None].float() / 256), name


def test_mnist_padding_surrounds_the_image_with_zeros(tmp_path, images, write_mnist):
    write_mnist(tmp_path, "MNIST", **images)
    module = MNIST(str(tmp_path), val_size=1, padding=2)
    module.setup()
    assert module.shape == (1, 32, 32)
    inputs = module.splits["test"][0][:]
    assert inputs.shape == (3, *module.shape)
    assert torch.equal(inputs[:, 0, 2:-2, 2:-2], images["test"] / 256)
    assert inputs.sum() == inputs[:, :, 2:-2, 2:-2].sum()


def test_mnist_setup_for_test_does_not_read_the_files_again(tmp_path, images, write_mnist):
    write_mnist(tmp_path, "MNIST", **images)
    module = MNIST(str(tmp_path), val_size=1)
    module.setup("fit")
    (before,) = module.splits["train"]
    module.setup("test")
    assert module.splits["train"][0] is before


def test_mnist_root_may_begin_with_the_home_folder(tmp_path, images, monkeypatch, write_mnist):
    monkeypatch.setenv("HOME", str(tmp_path))
    write_mnist(tmp_path / "here", "MNIST", **images)
    module = MNIST("~/here", val_size=1)
    module.setup()
    assert len(module.splits["train"][0]) == 6


@pytest.mark.parametrize("missing", ["train", "t10k"])
@each_mnist
def test_mnist_missing_file_is_named_with_the_ways_to_get_it(
    kind, tmp_path, images, missing, write_mnist
):
    write_mnist(tmp_path, kind.__name__, **images, gzipped=True)
    file = tmp_path / kind.__name__ / "raw" / f"{missing}-images-idx3-ubyte"
    file.with_name(f"{file.name}.gz").unlink()
    with pytest.raises(FileNotFoundError) as caught:
        kind(str(tmp_path), val_size=1).setup()
    message = str(caught.value)
    for part in (str(file), f"{file.name}.gz", "download=True"):
        assert part in message
    assert ("make fashion-mnist" in message) == (kind is FashionMNIST)
    assert "\n" not in message


def test_mnist_missing_folder_is_a_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere/MNIST/raw"):
        MNIST(str(tmp_path / "nowhere")).setup()


@pytest.mark.parametrize("bad", ["train", "test"])
@pytest.mark.parametrize(
    "content, complaint",
    {
        "27 columns": (
            torch.zeros(7, 28, 27, dtype=torch.uint8),
            r"\(count, 28, 28\), got \(7, 28, 27\)",
        ),
        "labels": (torch.zeros(7, dtype=torch.uint8), r"got \(7,\)"),
        "colour": (torch.zeros(2, 28, 28, 3, dtype=torch.uint8), r"got \(2, 28, 28, 3\)"),
        "no images": (EMPTY, r"at least 1, got \(0, 28, 28\)"),
    }.values(),
    ids=["27 columns", "labels", "colour", "no images"],
)
def test_mnist_refuses_other_images(tmp_path, images, bad, content, complaint, write_mnist):
    write_mnist(tmp_path, "MNIST", **images | {bad: content})
    module = MNIST(str(tmp_path), val_size=1)
    with pytest.raises(ValueError, match=complaint):
        module.setup()
    assert not module.splits


@pytest.mark.parametrize("val_size", [7, 8])
def test_mnist_refuses_to_validate_on_every_image(tmp_path, images, val_size, write_mnist):
    write_mnist(tmp_path, "MNIST", **images)
    with pytest.raises(ValueError, match=f"below the 7 images .* got {val_size}"):
        MNIST(str(tmp_path), val_size=val_size).setup()


@pytest.mark.parametrize("argument", [{"val_size": 0}, {"val_size": -1}, {"padding": -1}], ids=str)
def test_mnist_refuses_bad_arguments_at_once(argument):
    with pytest.raises(ValueError, match=next(iter(argument))):
        MNIST(**argument)


@each_mnist
@pytest.mark.parametrize("gzipped", [False, True], ids=["plain", "gzipped"])
def test_mnist_labels_stay_with_their_images(kind, tmp_path, images, write_mnist, gzipped):
    # The first pixel repeats the label.
    labels = {"train_labels": torch.tensor([3, 0, 9, 1, 1, 7, 2]).to(torch.uint8)}
    labels["test_labels"] = torch.tensor([5, 8, 0]).to(torch.uint8)
    for split in images:
        images[split][:, 0, 0] = labels[f"{split}_labels"]
    write_mnist(tmp_path, kind.__name__, **images, **labels, gzipped=gzipped)
    module = ready(kind(str(tmp_path), val_size=2, labels=True, batch_size=3))
    assert module.classes == 10
    loaders = module.train_dataloader(), module.val_dataloader(), module.test_dataloader()
    seen = 0
    for loader in loaders:
        for inputs, classes in loader:
            assert classes.dtype == torch.int64 and inputs.dtype == torch.float32
            assert torch.equal(256 * inputs[:, 0, 0, 0], classes.float())
            seen += len(inputs)
    assert seen == 10


@pytest.mark.parametrize(
    "labels, complaint",
    [([0] * 6, r"for 7 images.* \(6,\)"), ([0, 1, 2, 3, 4, 5, 10], "0 to 9, got 0 to 10")],
    ids=["too few", "out of range"],
)
def test_mnist_refuses_bad_labels(tmp_path, images, write_mnist, labels, complaint):
    labels = torch.tensor(labels).to(torch.uint8)
    write_mnist(tmp_path, "MNIST", **images, train_labels=labels, test_labels=labels[:3])
    with pytest.raises(ValueError, match=f"train-labels-idx1-ubyte: expected labels.*{complaint}"):
        MNIST(str(tmp_path), val_size=1, labels=True).setup()
    ready(MNIST(str(tmp_path), val_size=1))  # without labels nobody looks at them


def test_real_fashion_has_60000_and_10000_images():
    if not (ROOT / "data" / "FashionMNIST" / "raw").exists():
        pytest.skip("no data/FashionMNIST/raw: run make fashion-mnist")
    module = ready(FashionMNIST(str(ROOT / "data"), labels=True))
    lengths = {name: len(inputs) for name, (inputs, _) in module.splits.items()}
    assert lengths == {"train": 55_000, "val": 5_000, "test": 10_000}
    pixels = sum(module.splits[name][0][:].double().sum() for name in ("train", "val"))
    # The mean that is commonly used to normalize it, of k / 255.
    assert pixels / (60_000 * 784) * 256 / 255 == pytest.approx(0.2860, abs=5e-5)
    labels = torch.cat([module.splits[name][1] for name in ("train", "val")])
    assert labels.bincount().tolist() == [6000] * 10


# CIFAR-10


@pytest.fixture
def cifar(tmp_path, random_images, write_cifar):
    images, labels = random_images(36, 3, 32, 32), torch.arange(36) * 7 % 10
    write_cifar(tmp_path, images, labels)
    return images, labels


def test_cifar_joins_its_five_files_in_order(tmp_path, cifar):
    module = ready(CIFAR10(str(tmp_path), val_size=4, labels=True))
    assert module.shape == (3, 32, 32) and module.classes == 10
    for name, rows in {"train": slice(26), "val": slice(26, 30), "test": slice(30, 36)}.items():
        inputs, labels = module.splits[name]
        assert torch.equal(inputs[:], cifar[0][rows].float() / 256)
        assert torch.equal(labels, cifar[1][rows]) and labels.dtype == torch.int64
    assert len(ready(CIFAR10(str(tmp_path), val_size=4)).splits["test"]) == 1


def test_cifar_reads_arrays_as_numpy_1_under_python_2_wrote_them(tmp_path, cifar):
    file = tmp_path / "cifar-10-batches-py" / "test_batch"
    content = file.read_bytes()
    assert content.count(b"numpy._core.multiarray") == 1
    file.write_bytes(content.replace(b"numpy._core.multiarray", b"numpy.core.multiarray"))
    module = ready(CIFAR10(str(tmp_path), val_size=4))
    assert torch.equal(module.splits["test"][0][:], cifar[0][30:].float() / 256)


class RunsCode:
    def __reduce__(self):
        return subprocess.check_call, (["touch", "executed"],)


BAD_BATCHES = {
    "empty": (b"", "CIFAR-10 in Python's form"),
    "no pickle": (b"not a pickle at all", "CIFAR-10 in Python's form"),
    "a list": (pickle.dumps([1, 2]), "CIFAR-10 in Python's form"),
    "code": (pickle.dumps({"data": RunsCode(), "labels": [1]}), "the file asks for subprocess"),
    "other width": (
        pickle.dumps({"data": np.zeros((6, 3071), np.uint8), "labels": [0] * 6}, 2),
        r"\(count, 3072\), got uint8 \(6, 3071\)",
    ),
    "floats": (
        pickle.dumps({"data": np.zeros((6, 3072)), "labels": [0] * 6}, 2),
        r"bytes .* got float64",
    ),
    "text": (pickle.dumps({"data": "no array", "labels": [0] * 6}, 2), "bytes .* got .*str"),
    "few labels": (
        pickle.dumps({"data": np.zeros((6, 3072), np.uint8), "labels": [0] * 5}, 2),
        r"labels for 6 images",
    ),
    "label 10": (
        pickle.dumps({"data": np.zeros((2, 3072), np.uint8), "labels": [0, 10]}, 2),
        "0 to 9, got 0 to 10",
    ),
}


@pytest.mark.parametrize("name", BAD_BATCHES)
def test_bad_cifar_is_refused_and_runs_no_code(tmp_path, cifar, name, monkeypatch):
    monkeypatch.chdir(tmp_path)
    content, complaint = BAD_BATCHES[name]
    file = tmp_path / "cifar-10-batches-py" / "data_batch_3"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=complaint) as caught:
        CIFAR10(str(tmp_path), val_size=4).setup()
    assert str(file) in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "executed").exists()


def test_a_cut_cifar_file_is_refused(tmp_path, cifar):
    file = tmp_path / "cifar-10-batches-py" / "test_batch"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match="test_batch: expected a batch of CIFAR-10"):
        CIFAR10(str(tmp_path), val_size=4).setup()


# SVHN


def test_svhn_reads_its_two_files(tmp_path, random_images, write_svhn):
    images, digits = random_images(9, 3, 32, 32), torch.tensor([1, 2, 3, 4, 5, 9, 0, 0, 8])
    write_svhn(tmp_path, "train", images[:6], digits[:6])
    write_svhn(tmp_path, "test", images[6:], digits[6:])
    module = ready(SVHN(str(tmp_path), val_size=2, labels=True))
    assert module.shape == (3, 32, 32) and module.classes == 10
    for name, rows in {"train": slice(4), "val": slice(4, 6), "test": slice(6, 9)}.items():
        inputs, labels = module.splits[name]
        assert torch.equal(inputs[:], images[rows].float() / 256)
        assert torch.equal(labels, digits[rows]) and labels.dtype == torch.int64


@pytest.mark.parametrize(
    "content, complaint",
    {
        "no MATLAB": (b"not MATLAB", "a MATLAB file with X and y"),
        "empty": (b"", "a MATLAB file with X and y"),
        "other names": ({"Z": np.zeros(3)}, "a MATLAB file with X and y"),
        "floats": ({"X": np.zeros((32, 32, 3, 2)), "y": np.ones((2, 1))}, "bytes .* got float64"),
        "other size": ({"X": np.zeros((32, 31, 3, 2), "u1"), "y": np.ones((2, 1), "u1")}, "count"),
        "no images": (
            {"X": np.zeros((32, 32, 3, 0), "u1"), "y": np.ones((0, 1), "u1")},
            "0 images",
        ),
        "few labels": (
            {"X": np.zeros((32, 32, 3, 2), "u1"), "y": np.ones((1, 1), "u1")},
            "labels",
        ),
    }.values(),
    ids=["no MATLAB", "empty", "other names", "floats", "other size", "no images", "few labels"],
)
def test_bad_svhn_is_refused(tmp_path, content, complaint):
    file = tmp_path / "train_32x32.mat"
    if isinstance(content, bytes):
        file.write_bytes(content)
    else:
        savemat(file, content)
    with pytest.raises(ValueError, match=f"train_32x32.mat: expected .*{complaint}") as caught:
        SVHN(str(tmp_path)).setup()
    assert "\n" not in str(caught.value)


# All sets

EACH = {
    MNIST: "MNIST/raw/train-images-idx3-ubyte",
    FashionMNIST: "FashionMNIST/raw/train-images-idx3-ubyte",
    CIFAR10: "cifar-10-batches-py/data_batch_1",
    SVHN: "train_32x32.mat",
}
each_set = pytest.mark.parametrize("kind, file", EACH.items())


@each_set
def test_a_missing_file_is_named(tmp_path, kind, file):
    with pytest.raises(FileNotFoundError, match="download=True") as caught:
        kind(str(tmp_path)).setup()
    assert str(tmp_path / file) in str(caught.value)


@each_set
def test_download_without_torchvision_names_the_extra(tmp_path, kind, file, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision", None)
    with pytest.raises(ImportError, match="download=True needs torchvision, the extra `vision`"):
        kind(str(tmp_path), download=True).setup()


@each_set
def test_command_line_reads_the_arguments(kind, file):
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(LightningDataModule, "data")
    options = ["--data.labels=true", "--data.download=true", "--data.padding=2"]
    arguments = parser.parse_args([f"--data=datasets.images.{kind.__name__}", *options])
    module = parser.instantiate(arguments).data
    assert isinstance(module, kind) and module.download and module.classes == 10
