"""IDX files, and every way one can be bad."""

import gzip
import struct
import tracemalloc

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from datasets.idx import read_idx


def random_images(*shape):
    generator = torch.Generator().manual_seed(0)
    return torch.randint(256, shape, generator=generator, dtype=torch.uint8)


def header(*shape, magic=None):
    return struct.pack(f">{1 + len(shape)}I", magic or 0x0800 + len(shape), *shape)


def idx(tensor):
    return header(*tensor.shape) + tensor.numpy().tobytes()


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
