"""IDX, the file format of MNIST."""

import gzip
import math
import os
import struct
import zlib
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

__all__ = ["read_idx"]

# A .gz of 300 kB can hold this many bytes; whoever means more unpacks the file first.
GZIP_LIMIT = 2**28
CHUNK = 2**20


def read_idx(path: str | Path) -> Tensor:
    """The array in an IDX file of unsigned bytes, plain or gzipped (told by content).

    The header is not trusted with memory: a plain file is first compared with its
    length, and gzipped data may fill at most 256 MiB.

    Args:
        path: An IDX file: magic ``0x0000080k``, k big-endian 32-bit sizes, then the bytes.

    Shape:
        as the file says, uint8

    Returns:
        The sizes' shape, dtype uint8.

    Raises:
        ValueError: The file is no such file, is damaged, or has fewer or more bytes
            than its header says.
        FileNotFoundError: There is no file.

    Reference:
        The IDX format, http://yann.lecun.com/exdb/mnist

    Example:
        >>> import os, tempfile
        >>> from datasets.idx import read_idx
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = os.path.join(folder, "labels")
        ...     with open(path, "wb") as file:
        ...         _ = file.write(bytes([0, 0, 8, 1, 0, 0, 0, 3, 7, 8, 9]))  # one axis of 3
        ...     read_idx(path)
        tensor([7, 8, 9], dtype=torch.uint8)
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
