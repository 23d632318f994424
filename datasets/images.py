"""Images: scikit-learn's 8x8 digits, and Fashion-MNIST from IDX files."""

import gzip
import math
import os
import struct
import zlib
from pathlib import Path
from typing import BinaryIO

import torch
import torch.nn.functional as F
from torch import Tensor

from datasets.base import DataModule

__all__ = ["Digits", "FashionMNIST", "read_idx"]

# A .gz of 300 kB can hold this many bytes; whoever means more unpacks the file first.
GZIP_LIMIT = 2**28
CHUNK = 2**20


def read_idx(path: str | Path) -> Tensor:
    """The array in an IDX file of unsigned bytes, plain or gzipped (told by content).

    The header is not trusted with memory: a plain file is first compared with its
    length, and gzipped data may fill at most 256 MiB.

    Args:
        path: An IDX file: magic ``0x0000080k``, k big-endian 32-bit sizes, then the bytes.

    Returns:
        The sizes' shape, dtype uint8.

    Raises:
        ValueError: The file is no such file, is damaged, or has fewer or more bytes
            than its header says.
        FileNotFoundError: There is no file.

    Reference:
        The IDX format, http://yann.lecun.com/exdb/mnist
    """
    with open(path, "rb") as file:
        gzipped = file.read(2) == b"\x1f\x8b"
        file.seek(0)
        if not gzipped:
            return _read(file, path, limit=os.fstat(file.fileno()).st_size)
        try:
            with gzip.GzipFile(fileobj=file) as stream:
                return _read(stream, path, limit=GZIP_LIMIT)
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise ValueError(f"{path}: expected intact gzip data, got: {error}.") from error


def _read(stream: BinaryIO, path: str | Path, *, limit: int) -> Tensor:
    """``read_idx`` of an unzipped stream that has, or is allowed, at most limit bytes."""
    start = stream.read(4)
    magic = int.from_bytes(start, "big")
    if len(start) < 4 or not 0x0801 <= magic <= 0x080F:
        raise ValueError(
            f"{path}: expected IDX unsigned bytes, magic 0x0000080k, "
            f"got {f'0x{start.hex()}' if start else 'an empty file'}."
        )
    dims = magic & 0xF
    header = stream.read(4 * dims)
    if len(header) < 4 * dims:
        raise ValueError(
            f"{path}: expected an IDX header with {dims} sizes, {4 + 4 * dims} bytes, "
            f"got {4 + len(header)}."
        )
    shape = struct.unpack(f">{dims}I", header)
    if 0 in shape:
        raise ValueError(f"{path}: expected sizes of at least 1, got {shape}.")
    size = math.prod(shape)
    if size > limit:
        raise ValueError(
            f"{path}: expected {size} bytes for shape {shape}, got a file of at most {limit} "
            f"(a .gz is read up to {GZIP_LIMIT}: unpack a larger one)."
        )
    # One byte more finds a longer file, and the end of a gzip stream, where its checksum is.
    data = bytearray()
    while chunk := stream.read(min(CHUNK, size + 1 - len(data))):
        data += chunk
    if len(data) != size:
        came = len(data) if len(data) < size else "more"
        raise ValueError(f"{path}: expected {size} bytes for shape {shape}, got {came}.")
    return torch.frombuffer(data, dtype=torch.uint8).reshape(shape)


class Digits(DataModule):
    """1,797 handwritten digits, 8x8 pixels of 17 grey levels: real data that is always there.

    In file order the first 1,000 train, the next 350 validate, the last 447 test.

    Args:
        batch_size: Images per training batch.
        seed: Seed of the batches' order.

    Shape:
        inputs (batch, 1, 8, 8), float32, k / 17

    Reference:
        ``sklearn.datasets.load_digits``, the test part of UCI's "Optical Recognition of
        Handwritten Digits" (Alpaydin and Kaynak, 1998)
    """

    shape = (1, 8, 8)
    grey_levels = 17

    def __init__(self, *, batch_size: int = 100, seed: int = 0) -> None:
        super().__init__(batch_size=batch_size, seed=seed)

    def setup(self, stage: str | None = None) -> None:
        if self.splits:
            return
        from sklearn.datasets import load_digits

        images = torch.from_numpy(load_digits().images).float()[:, None] / self.grey_levels
        self.splits = {
            "train": (images[:1000],),
            "val": (images[1000:1350],),
            "test": (images[1350:],),
        }


class FashionMNIST(DataModule):
    """60,000 + 10,000 pictures of clothes, 28x28 pixels of 256 grey levels, without labels.

    Reads torchvision's layout, ``root/FashionMNIST/raw/train-images-idx3-ubyte`` and
    ``t10k-images-idx3-ubyte``, as they are or with ``.gz``. As float32 the splits hold
    220 MB, with ``padding=2`` 287 MB.

    Args:
        root: Folder that holds ``FashionMNIST/raw``.
        batch_size: Images per training batch.
        val_size: Images at the end of the training file that validate instead.
        seed: Seed of the batches' order.
        padding: Zeros on each side: 2 makes 32x32 for multiscale flows. Bits per
            dimension then count the padding among the dimensions.

    Shape:
        inputs (batch, 1, 28 + 2 padding, 28 + 2 padding), float32, k / 256

    Reference:
        Xiao, Rasul, Vollgraf (2017), arXiv 1708.07747
    """

    grey_levels = 256

    def __init__(
        self,
        root: str = "data",
        *,
        batch_size: int = 128,
        val_size: int = 5_000,
        seed: int = 0,
        padding: int = 0,
    ) -> None:
        super().__init__(batch_size=batch_size, seed=seed)
        if val_size < 1:
            raise ValueError(f"val_size must be at least 1, got {val_size}.")
        if padding < 0:
            raise ValueError(f"padding must be at least 0, got {padding}.")
        self.root = root
        self.val_size = val_size
        self.padding = padding
        self.shape = (1, 28 + 2 * padding, 28 + 2 * padding)

    def setup(self, stage: str | None = None) -> None:
        if self.splits:
            return
        train, test = (self._images(self._file(name)) for name in ("train", "t10k"))
        if self.val_size >= len(train):
            raise ValueError(
                f"val_size must be below the {len(train)} images of the training file, "
                f"got {self.val_size}."
            )
        self.splits = {
            "train": (train[: -self.val_size],),
            "val": (train[-self.val_size :],),
            "test": (test,),
        }

    def _file(self, name: str) -> Path:
        folder = Path(self.root).expanduser() / "FashionMNIST" / "raw"
        plain = folder / f"{name}-images-idx3-ubyte"
        for path in (plain, plain.with_name(f"{plain.name}.gz")):
            if path.is_file():
                return path
        raise FileNotFoundError(
            f"Found neither {plain} nor {plain.name}.gz beside it. `make fashion-mnist` puts "
            f"them under ./data where apt exists; elsewhere torchvision's "
            f"FashionMNIST({self.root!r}, download=True) does."
        )

    def _images(self, path: Path) -> Tensor:
        images = read_idx(path)
        if images.shape[1:] != (28, 28):
            raise ValueError(
                f"{path}: expected images of shape (count, 28, 28), got {tuple(images.shape)}."
            )
        # Bytes divided directly would pass through a second float copy.
        return F.pad(images, [self.padding] * 4)[:, None].float().div_(self.grey_levels)
