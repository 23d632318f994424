"""Images of any format and size, from folders."""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from datasets.base import DataModule
from datasets.divide import check_fractions, divide
from datasets.errors import one_line
from datasets.images import GreyLevels

__all__ = ["ImageFolder", "read_image"]

SUFFIXES = (".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
FORMATS = ("BMP", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
# A small file can claim any number of pixels; those of photographs take a twentieth of a byte.
PIXELS, EXPANSION = 2**24, 200


def read_image(path: Path, size: int, channels: int) -> Tensor:
    """The middle square of an image file, resized to uint8 (channels, size, size).

    Resizing is bilinear over all pixels that a new one covers. One channel is luminance;
    transparency is dropped.

    Args:
        path: A file; its kind is told by its content.
        size: Height and width of the result.
        channels: 3 for colour, 1 for grey.

    Shape:
        uint8 (channels, size, size)

    Raises:
        ValueError: The file is no intact image of 8-bit pixels.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> from PIL import Image
        >>> from datasets.image_folder import read_image
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder, "blue.png")
        ...     Image.new("RGB", (40, 20), color=(0, 0, 255)).save(path)
        ...     image = read_image(path, size=4, channels=3)
        >>> image.shape, image.amax((1, 2)).tolist()
        (torch.Size([3, 4, 4]), [0, 0, 255])
    """
    from PIL import Image, ImageOps

    try:
        # Told by content, and by these alone: for others Pillow may start programs.
        with Image.open(path, formats=FORMATS) as image:
            most = max(PIXELS, EXPANSION * path.stat().st_size)
            if image.width * image.height > most:
                raise ValueError(f"{image.width} x {image.height} pixels, more than {most}")
            if image.mode.startswith(("I", "F")):
                raise ValueError(f"pixels of mode {image.mode}, not of 8 bits")
            image = image.convert("RGB" if channels == 3 else "L")
            image = ImageOps.fit(image, (size, size), Image.Resampling.BILINEAR)
    except Exception as error:  # damaged bytes make decoders raise almost anything
        raise ValueError(f"{path}: expected an intact image, got {one_line(error)}") from error
    return torch.from_numpy(np.array(image).reshape(size, size, channels)).permute(2, 0, 1)


class ImageFolder(DataModule):
    """All images below a folder, brought to one size; decoded once, on all processors.

    Files ending in .png, .jpg and the like are taken from ``path/train``, ``path/val`` and
    ``path/test`` and the folders in them. Without these three all images below ``path``
    train. In place of a missing val or test folder a part of the training images is drawn
    at random. In memory an image takes channels size^2 bytes.

    Args:
        path: The folder.
        size: Height and width of the images; see :func:`read_image`.
        channels: 3 for colour, 1 for grey.
        batch_size: Images per training batch.
        val_fraction: Part of the training images that validate if there is no val folder.
        test_fraction: Part of the training images that test if there is no test folder.
        labels: Give the class too: the folder next below train, val or test (or path); the
            classes are numbered in alphabetical order.
        split_seed: Seed of what is drawn, which no other seed changes.
        seed: Seed of the batches' order.

    Shape:
        inputs (batch, channels, size, size), float32, k / 256; labels (batch,)

    Raises:
        ValueError: If an option is out of range; in ``setup``, if a file is no intact image, or
            there are too few to divide.
        FileNotFoundError: In ``setup``, if there are no images.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> from PIL import Image
        >>> from datasets.image_folder import ImageFolder
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     for number in range(20):
        ...         Image.new("L", (16, 16), color=number).save(Path(folder, f"{number}.png"))
        ...     data = ImageFolder(folder, size=8, channels=1)
        ...     data.setup()
        >>> {name: pixels[:].shape for name, (pixels,) in data.splits.items()}["train"]
        torch.Size([16, 1, 8, 8])
    """

    grey_levels = 256

    def __init__(
        self,
        path: str,
        *,
        size: int = 32,
        channels: Literal[1, 3] = 3,
        batch_size: int = 128,
        val_fraction: float = 0.1,
        test_fraction: float = 0.1,
        labels: bool = False,
        split_seed: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__(batch_size=batch_size, seed=seed)
        if size < 1:
            raise ValueError(f"size must be at least 1, got {size}.")
        if channels not in (1, 3):
            raise ValueError(f"channels must be 1 or 3, got {channels}.")
        check_fractions(val_fraction=val_fraction, test_fraction=test_fraction)
        self.path = path
        self.shape = (channels, size, size)
        self.fractions = {"val": val_fraction, "test": test_fraction}
        self.labels = labels
        self.split_seed = split_seed

    def setup(self, stage: str | None = None) -> None:
        if self.splits:
            return
        files = self._files()
        labels = {name: () for name in files}
        if self.labels:
            classes = sorted({label for _, label in files["train"]})
            labels = {name: (_numbers(part, classes),) for name, part in files.items()}
            self.classes = len(classes)
        self.splits = {
            name: (GreyLevels(self._decode([file for file, _ in part])), *labels[name])
            for name, part in files.items()
        }

    def _files(self) -> dict[str, list[tuple[Path, str]]]:
        """Of each split the files, each with the name of its class, "" if it has none."""
        path = Path(self.path).expanduser()
        if not path.is_dir():
            raise FileNotFoundError(f"expected a folder of images, found no folder {path}.")
        folders = {name: path / name for name in ("train", "val", "test")}
        folders = {name: folder for name, folder in folders.items() if folder.is_dir()}
        if folders and "train" not in folders:
            raise ValueError(f"{path}: expected a folder train beside {' and '.join(folders)}.")
        train = _images_below(folders.pop("train", path))
        drawn = {name: part for name, part in self.fractions.items() if name not in folders}
        split = divide(len(train), drawn, split_seed=self.split_seed, source=path)
        files = {name: [train[row] for row in rows.tolist()] for name, rows in split.items()}
        return files | {name: _images_below(folder) for name, folder in folders.items()}

    def _decode(self, files: Sequence[Path]) -> Tensor:
        from PIL import Image

        Image.init()  # otherwise the first threads race to load decoders
        channels, size, _ = self.shape
        pixels = torch.empty(len(files), *self.shape, dtype=torch.uint8)
        read = partial(read_image, size=size, channels=channels)
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            # Decoders work without Python's lock. A part at a time bounds what waits.
            for start in range(0, len(files), 256):
                part = pool.map(read, files[start : start + 256])
                for row, image in enumerate(part, start):
                    pixels[row] = image
        return pixels


def _images_below(folder: Path) -> list[tuple[Path, str]]:
    found = []
    for file in sorted(folder.rglob("*")):
        if file.suffix.lower() in SUFFIXES and not file.name.startswith(".") and file.is_file():
            parts = file.relative_to(folder).parts
            found.append((file, parts[0] if len(parts) > 1 else ""))
    if not found:
        kinds = ", ".join(SUFFIXES)
        raise FileNotFoundError(f"expected images ({kinds}) below {folder}, found none.")
    return found


def _numbers(files: Sequence[tuple[Path, str]], classes: Sequence[str]) -> Tensor:
    """Each file's class by its place among all classes, int64."""
    for file, label in files:
        if not label:
            raise ValueError(f"{file}: expected a folder for every class, got it in none.")
        if label not in classes:
            raise ValueError(f"{file}: expected a class that is in train too, got {label!r}.")
    number = {label: i for i, label in enumerate(classes)}
    return torch.tensor([number[label] for _, label in files])
