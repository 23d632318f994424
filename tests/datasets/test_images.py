"""Image data: the digits, Fashion-MNIST's files, and every way an IDX file can be bad."""

import gzip
import struct
import tracemalloc
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.datasets import load_digits

from datasets.images import Digits, FashionMNIST, read_idx

REAL = Path(__file__).parents[2] / "data"


def random_images(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(256, shape, generator=generator, dtype=torch.uint8)


def header(*shape, magic=None):
    return struct.pack(f">{1 + len(shape)}I", magic or 0x0800 + len(shape), *shape)


def idx(tensor):
    return header(*tensor.shape) + tensor.numpy().tobytes()


def write_fashion(root, *, train, test, gzipped=False):
    folder = root / "FashionMNIST" / "raw"
    folder.mkdir(parents=True)
    for name, content in (("train", train), ("t10k", test)):
        content = content if isinstance(content, bytes) else idx(content)
        file = folder / f"{name}-images-idx3-ubyte{'.gz' if gzipped else ''}"
        file.write_bytes(gzip.compress(content) if gzipped else content)


@pytest.fixture(scope="module")
def digits():
    module = Digits()
    module.setup("fit")
    return module


@pytest.fixture
def images():
    return {"train": random_images(7, 28, 28), "test": random_images(3, 28, 28, seed=1)}


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


# Fashion-MNIST


@pytest.mark.parametrize("gzipped", [False, True], ids=["plain", "gzipped"])
def test_fashion_takes_validation_from_the_end_of_the_training_file(tmp_path, images, gzipped):
    write_fashion(tmp_path, **images, gzipped=gzipped)
    module = FashionMNIST(str(tmp_path), val_size=2)
    module.setup("fit")
    assert module.shape == (1, 28, 28) and module.grey_levels == 256
    for name, pixels in {
        "train": images["train"][:5],
        "val": images["train"][5:],
        "test": images["test"],
    }.items():
        (inputs,) = module.splits[name]
        assert inputs.dtype == torch.float32
        assert torch.equal(inputs, pixels[:, None].float() / 256), name


def test_fashion_padding_surrounds_the_image_with_zeros(tmp_path, images):
    write_fashion(tmp_path, **images)
    module = FashionMNIST(str(tmp_path), val_size=1, padding=2)
    module.setup()
    assert module.shape == (1, 32, 32)
    (inputs,) = module.splits["test"]
    assert inputs.shape == (3, *module.shape)
    assert torch.equal(inputs[:, 0, 2:-2, 2:-2], images["test"] / 256)
    assert inputs.sum() == inputs[:, :, 2:-2, 2:-2].sum()


def test_fashion_setup_for_test_does_not_read_the_files_again(tmp_path, images):
    write_fashion(tmp_path, **images)
    module = FashionMNIST(str(tmp_path), val_size=1)
    module.setup("fit")
    (before,) = module.splits["train"]
    module.setup("test")
    assert module.splits["train"][0] is before


def test_fashion_root_may_begin_with_the_home_folder(tmp_path, images, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write_fashion(tmp_path / "here", **images)
    module = FashionMNIST("~/here", val_size=1)
    module.setup()
    assert len(module.splits["train"][0]) == 6


@pytest.mark.parametrize("missing", ["train", "t10k"])
def test_fashion_missing_file_is_named_with_the_ways_to_get_it(tmp_path, images, missing):
    write_fashion(tmp_path, **images, gzipped=True)
    file = tmp_path / "FashionMNIST" / "raw" / f"{missing}-images-idx3-ubyte"
    file.with_name(f"{file.name}.gz").unlink()
    with pytest.raises(FileNotFoundError) as caught:
        FashionMNIST(str(tmp_path), val_size=1).setup()
    message = str(caught.value)
    for part in (str(file), f"{file.name}.gz", "make fashion-mnist", "download=True"):
        assert part in message
    assert "\n" not in message


def test_fashion_missing_folder_is_a_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="make fashion-mnist"):
        FashionMNIST(str(tmp_path / "nowhere")).setup()


@pytest.mark.parametrize("bad", ["train", "test"])
@pytest.mark.parametrize(
    "content, complaint",
    {
        "27 columns": (random_images(7, 28, 27), r"\(count, 28, 28\), got \(7, 28, 27\)"),
        "labels": (random_images(7), r"got \(7,\)"),
        "colour": (random_images(2, 28, 28, 3), r"got \(2, 28, 28, 3\)"),
        "no images": (header(0, 28, 28), r"at least 1, got \(0, 28, 28\)"),
    }.values(),
    ids=["27 columns", "labels", "colour", "no images"],
)
def test_fashion_refuses_other_images(tmp_path, images, bad, content, complaint):
    write_fashion(tmp_path, **images | {bad: content})
    module = FashionMNIST(str(tmp_path), val_size=1)
    with pytest.raises(ValueError, match=complaint):
        module.setup()
    assert not module.splits


@pytest.mark.parametrize("val_size", [7, 8])
def test_fashion_refuses_to_validate_on_every_image(tmp_path, images, val_size):
    write_fashion(tmp_path, **images)
    with pytest.raises(ValueError, match=f"below the 7 images .* got {val_size}"):
        FashionMNIST(str(tmp_path), val_size=val_size).setup()


@pytest.mark.parametrize("argument", [{"val_size": 0}, {"val_size": -1}, {"padding": -1}], ids=str)
def test_fashion_refuses_bad_arguments_at_once(argument):
    with pytest.raises(ValueError, match=next(iter(argument))):
        FashionMNIST(**argument)


def test_real_fashion_has_60000_and_10000_images():
    if not (REAL / "FashionMNIST" / "raw").exists():
        pytest.skip("no data/FashionMNIST/raw: run make fashion-mnist")
    module = FashionMNIST(str(REAL))
    module.setup()
    lengths = {name: len(inputs) for name, (inputs,) in module.splits.items()}
    assert lengths == {"train": 55_000, "val": 5_000, "test": 10_000}
    pixels = sum(module.splits[name][0].double().sum() for name in ("train", "val"))
    # The mean that is commonly used to normalize it, of k / 255.
    assert pixels / (60_000 * 784) * 256 / 255 == pytest.approx(0.2860, abs=5e-5)


# IDX files


@pytest.mark.parametrize("gzipped", [False, True], ids=["plain", "gzipped"])
@pytest.mark.parametrize("shape", [(1,), (5,), (3, 2), (2, 3, 5), (1, 2, 3, 4)], ids=str)
def test_idx_comes_back_whatever_the_file_is_called(tmp_path, shape, gzipped):
    expected = random_images(*shape)
    path = tmp_path / ("name" if gzipped else "name.gz")
    path.write_bytes(gzip.compress(idx(expected)) if gzipped else idx(expected))
    tensor = read_idx(str(path))
    assert tensor.dtype == torch.uint8
    assert torch.equal(tensor, expected)


def refusal(path, content):
    """The message of the ValueError that reading the content raises: one line naming the file."""
    path.write_bytes(content)
    with pytest.raises(ValueError) as caught:
        read_idx(path)
    message = str(caught.value)
    assert str(path) in message and "expected" in message and "got" in message
    assert "\n" not in message
    return message


GOOD = idx(random_images(2, 28, 28))
HUGE = 2**32 - 1
# name -> content and what the message says of it
BAD = {
    "empty": (b"", "empty file"),
    "three bytes": (GOOD[:3], "0x000008"),
    "not IDX": (b"\x89PNG\r\n\x1a\n" + bytes(50), "0x89504e47"),
    "float data": (header(1, magic=0x0D01) + bytes(4), "0x00000d01"),
    "no dimensions": (header(magic=0x0800) + bytes(1), "0x00000800"),
    "16 dimensions": (header(*[1] * 16, magic=0x0810) + bytes(1), "0x00000810"),
    "half a header": (GOOD[:14], "16 bytes, got 14"),
    "one byte short": (GOOD[:-1], "1568 bytes for shape (2, 28, 28), got 1567"),
    "one byte long": (GOOD + b"\0", "1568 bytes for shape (2, 28, 28), got more"),
    "no bytes": (header(2, 28, 28), "1568 bytes"),
    "huge": (header(HUGE, HUGE, HUGE) + bytes(784), f"{HUGE**3} bytes"),
    "empty and huge": (header(0, HUGE, HUGE, HUGE), "at least 1"),
}


@pytest.mark.parametrize("gzipped", [False, True], ids=["plain", "gzipped"])
@pytest.mark.parametrize("name", BAD)
def test_bad_idx_is_refused_in_one_line(tmp_path, name, gzipped):
    content, complaint = BAD[name]
    assert complaint in refusal(tmp_path / "file", gzip.compress(content) if gzipped else content)


def test_damaged_gzip_is_refused_in_one_line(tmp_path):
    good = gzip.compress(GOOD)
    middle, checksum = len(good) // 2, len(good) - 8
    damaged = {
        "cut": good[:middle],
        "no trailer": good[:checksum],
        "magic only": good[:2],
        "middle": good[:middle] + bytes([good[middle] ^ 1]) + good[middle + 1 :],
        "checksum": good[:checksum] + bytes([good[checksum] ^ 1]) + good[checksum + 1 :],
        "followed by rubbish": good + b"rubbish",
    }
    for name, content in damaged.items():
        assert "gzip" in refusal(tmp_path / name, content)


def test_missing_idx_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nothing-here"):
        read_idx(tmp_path / "nothing-here")


def peak_of_refusal(path, content):
    tracemalloc.start()
    try:
        refusal(path, content)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


ZEROS = 2**26
BOMBS = {  # name -> shape the header claims, how many times ZEROS bytes follow
    "contains 4 GB, claims one image": ((1, 28, 28), 64),
    "contains 4 GB and claims it": ((ZEROS, 64), 64),
    "claims 4 GB and contains none": ((ZEROS, 64), 0),
    "claims 100 MB and contains none": ((100_000, 1000), 0),
}


@pytest.fixture(scope="module")
def zeros():
    return gzip.compress(bytes(ZEROS), 1)


@pytest.mark.parametrize("shape, members", BOMBS.values(), ids=BOMBS.keys())
def test_gzip_bomb_costs_no_memory(tmp_path, zeros, shape, members):
    # Members of a gzip file unpack to one stream, so 4 GB are cheap to write.
    bomb = gzip.compress(header(*shape)) + zeros * members
    assert peak_of_refusal(tmp_path / "bomb", bomb) < 2**22


def test_gzip_bomb_of_a_lawful_size_costs_about_that_size(tmp_path, zeros):
    bomb = gzip.compress(header(ZEROS)) + zeros * 64
    assert peak_of_refusal(tmp_path / "bomb", bomb) < 1.5 * ZEROS


def test_plain_file_is_held_against_its_length_before_it_is_read(tmp_path):
    assert "at most 800 " in refusal(tmp_path / "file", header(2, 28, 28) + bytes(784))


SHAPE = (2, 28, 28)
FILES = {"plain": GOOD, "gzipped": gzip.compress(GOOD, mtime=0)}


def places(content):
    """Positions in the content; the header deserves half of the attempts."""
    return st.integers(0, 24) | st.integers(0, len(content) - 1)


@pytest.mark.parametrize("kind", FILES)
@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_damage_is_harmless_or_a_value_error(tmp_path_factory, kind, data):
    content = bytearray(FILES[kind])
    if data.draw(st.booleans(), "truncate"):
        del content[data.draw(places(content), "length") :]
    else:
        content[data.draw(places(content), "place")] ^= data.draw(st.integers(1, 255), "flip")
        if kind == "plain":  # pixels may change as they like
            for place in data.draw(st.sets(st.integers(16, len(content) - 1), max_size=5)):
                content[place] ^= 255
    path = tmp_path_factory.getbasetemp() / f"damaged-{kind}"
    path.write_bytes(content)
    try:
        tensor = read_idx(path)
    except ValueError as error:
        assert str(path) in str(error) and "\n" not in str(error)
        return
    assert tensor.shape == SHAPE and tensor.dtype == torch.uint8
    if kind == "gzipped":  # what a checksum guards comes back unchanged
        assert idx(tensor) == GOOD
