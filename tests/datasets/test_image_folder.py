"""ImageFolder: what becomes of files, how they are split, and what is refused."""

import numpy as np
import pytest
import torch
from PIL import Image

from datasets.image_folder import ImageFolder, read_image


def picture(path, height=8, width=8, *, mode="RGB", value=None, seed=0):
    """Write random pixels, or one value, and return them."""
    channels = {"RGB": (3,), "RGBA": (4,), "L": ()}[mode]
    pixels = np.random.default_rng(seed).integers(256, size=(height, width, *channels))
    pixels = np.full_like(pixels, pixels if value is None else value).astype(np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels, mode).save(path)
    return pixels


def ready(path, **arguments):
    module = ImageFolder(str(path), size=arguments.pop("size", 4), **arguments)
    module.setup("fit")
    return module


def values(module):
    """The first byte of every image of every split."""
    return {
        name: (256 * images[:][:, 0, 0, 0]).int().tolist()
        for name, (images, *_) in module.splits.items()
    }


# One file


def test_an_image_of_the_right_size_is_read_as_it_is(tmp_path):
    pixels = picture(tmp_path / "a.png", 5, 5)
    assert torch.equal(read_image(tmp_path / "a.png", 5, 3), torch.tensor(pixels).permute(2, 0, 1))


@pytest.mark.parametrize("height, width", [(6, 14), (14, 6), (6, 10)])
def test_the_middle_square_is_taken(tmp_path, height, width):
    pixels = picture(tmp_path / "a.png", height, width, mode="L")
    half = Image.fromarray(pixels).resize((width // 2, height // 2), Image.Resampling.BILINEAR)
    top, left = (height // 2 - 3) // 2, (width // 2 - 3) // 2
    expected = np.array(half)[top : top + 3, left : left + 3]
    np.testing.assert_array_equal(read_image(tmp_path / "a.png", 3, 1)[0].numpy(), expected)


def test_shrinking_averages_and_enlarging_interpolates(tmp_path):
    stripes = np.tile(np.array([0, 255], np.uint8), (64, 32))
    Image.fromarray(stripes).save(tmp_path / "a.png")
    small = read_image(tmp_path / "a.png", 4, 1)
    assert (small.int() - 127).abs().max() <= 3
    Image.fromarray(np.array([[0, 200], [0, 200]], np.uint8)).save(tmp_path / "b.png")
    row = read_image(tmp_path / "b.png", 4, 1)[0, 0]
    assert row.tolist() == [0, 50, 150, 200]


def test_channels_are_made_or_dropped(tmp_path):
    grey = torch.from_numpy(picture(tmp_path / "grey.png", mode="L"))
    assert torch.equal(read_image(tmp_path / "grey.png", 8, 3), grey.expand(3, 8, 8))
    colour = picture(tmp_path / "colour.png", mode="RGBA")
    expected = torch.from_numpy(colour[..., :3]).permute(2, 0, 1)
    assert torch.equal(read_image(tmp_path / "colour.png", 8, 3), expected)
    luminance = colour[..., :3] @ np.array([0.299, 0.587, 0.114])
    error = read_image(tmp_path / "colour.png", 8, 1)[0].numpy() - luminance
    assert np.abs(error).max() <= 1


@pytest.mark.parametrize("suffix", [".png", ".PNG", ".jpg", ".jpeg", ".bmp", ".webp", ".ppm"])
def test_formats(tmp_path, suffix):
    for i in range(20):
        picture(tmp_path / f"{i}{suffix}", 9, 11, value=12 * i)
    found = sorted(sum(values(ready(tmp_path)).values(), []))
    assert np.abs(np.array(found) - 12 * np.arange(20)).max() <= 2  # JPEG rounds


# Splits


def test_a_folder_without_splits_is_divided_at_random(tmp_path):
    for i in range(20):
        picture(tmp_path / "deep" / f"{i % 3}" / f"{i}.png", value=i)
    module = ready(tmp_path, val_fraction=0.2, test_fraction=0.1)
    assert module.shape == (3, 4, 4) and module.grey_levels == 256 and module.classes is None
    found = values(module)
    assert {name: len(part) for name, part in found.items()} == {"train": 14, "val": 4, "test": 2}
    assert sorted(sum(found.values(), [])) == list(range(20))
    same = ready(tmp_path, val_fraction=0.2, test_fraction=0.1, seed=3)
    other = ready(tmp_path, val_fraction=0.2, test_fraction=0.1, split_seed=1)
    assert values(same) == found != values(other)


@pytest.mark.parametrize("given", [(), ("val",), ("test",), ("val", "test")], ids=str)
def test_folders_named_as_splits_are_the_splits(tmp_path, given):
    for i in range(20):
        picture(tmp_path / "train" / f"{i}.png", value=i)
    for start, name in ((100, "val"), (200, "test")):
        for i in range(start, start + 3) if name in given else ():
            picture(tmp_path / name / f"{i}.png", value=i)
    picture(tmp_path / "elsewhere.png", value=255)
    found = values(ready(tmp_path))
    for start, name in ((100, "val"), (200, "test")):
        if name in given:
            assert found.pop(name) == [start, start + 1, start + 2]
        else:
            assert len(found[name]) == 2
    assert sorted(sum(found.values(), [])) == list(range(20))


def test_labels_are_the_folders_in_alphabetical_order(tmp_path):
    for i in range(20):
        picture(tmp_path / "train" / ("cat" if i % 2 else "ape") / "x" / f"{i}.png", value=i)
    picture(tmp_path / "test" / "cat" / "1.png", value=101)
    module = ready(tmp_path, labels=True)
    assert module.classes == 2
    for images, labels in module.splits.values():
        assert labels.dtype == torch.int64
        assert torch.equal((256 * images[:][:, 0, 0, 0]).long() % 2, labels)
    assert module.splits["test"][1].tolist() == [1]


def test_hidden_and_other_files_are_left_alone(tmp_path):
    for i in range(10):
        picture(tmp_path / f"{i}.png", value=i)
    (tmp_path / "._0.png").write_bytes(b"not an image")
    (tmp_path / "notes.txt").write_text("not an image")
    (tmp_path / "folder.png").mkdir()
    assert sum(map(len, values(ready(tmp_path)).values())) == 10


# What is refused


@pytest.mark.parametrize("damage", ["text", "empty", "cut", "16 bits", "float"])
def test_a_file_that_is_no_intact_8_bit_image_is_named(tmp_path, damage):
    for i in range(10):
        picture(tmp_path / f"{i}.png", value=i)
    bad = tmp_path / f"bad.{'tif' if damage == 'float' else 'png'}"
    if damage == "cut":
        picture(bad, 64, 64)
        bad.write_bytes(bad.read_bytes()[:5000])
    elif damage == "16 bits":
        Image.fromarray(np.full((8, 8), 40_000, np.uint16)).save(bad)
    elif damage == "float":
        Image.fromarray(np.zeros((8, 8), np.float32)).save(bad)
    else:
        bad.write_bytes(b"" if damage == "empty" else b"no image")
    module = ImageFolder(str(tmp_path), size=4)
    with pytest.raises(ValueError, match="expected an intact image, got") as caught:
        module.setup()
    message = str(caught.value)
    assert message.startswith(f"{bad}: ") and "\n" not in message and not module.splits
    if damage in ("16 bits", "float"):
        assert "not of 8 bits" in message


def test_missing_folders_images_and_classes_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"found no folder .*/nowhere\."):
        ready(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"images \(.*\.png.*\) below .*, found none"):
        ready(tmp_path)
    for i in range(3):
        picture(tmp_path / f"{i}.png")
    with pytest.raises(ValueError, match="at least 10 rows .*, got 3"):
        ready(tmp_path)
    for i in range(10):
        picture(tmp_path / "ape" / f"{i}.png")
    with pytest.raises(ValueError, match=r"/\d.png: expected a folder for every class"):
        ready(tmp_path, labels=True)
    picture(tmp_path / "val" / "0.png")
    with pytest.raises(ValueError, match="expected a folder train beside val"):
        ready(tmp_path)


def test_a_class_that_training_does_not_have_is_refused(tmp_path):
    for i in range(20):
        picture(tmp_path / "train" / "ape" / f"{i}.png")
    picture(tmp_path / "test" / "cat" / "0.png")
    with pytest.raises(ValueError, match=r"cat/0.png: expected a class .* got 'cat'"):
        ready(tmp_path, labels=True)


@pytest.mark.parametrize(
    "arguments, words",
    [
        ({"size": 0}, "size must be at least 1, got 0"),
        ({"channels": 2}, "channels must be 1 or 3, got 2"),
        ({"val_fraction": 0.0}, "val_fraction must lie between 0 and 1, got 0.0"),
    ],
    ids=str,
)
def test_bad_arguments_are_refused_at_once(arguments, words):
    with pytest.raises(ValueError, match=words):
        ImageFolder("anywhere", **arguments)
