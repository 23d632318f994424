"""The files of CIFAR-10 and SVHN; MNIST's are in ``idx.py``."""

import math
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from datasets.errors import one_line

__all__ = ["CLASSES", "check_labels", "read_cifar", "read_svhn"]

# A compressed file of photographs does not become larger by such a factor.
EXPANSION = 64
NUMBERS = ("uint8", "int8", "uint16", "int16", "uint32", "int32", "int64", "single", "double")
CLASSES = 10  # in MNIST, Fashion-MNIST, CIFAR-10 and SVHN alike


def check_labels(path: Path, labels: Tensor, count: int) -> Tensor:
    """Labels as int64, one per image, 0 to 9.

    Args:
        path: The file they are from, for the error.
        labels: Integers.
        count: Number of images.

    Shape:
        labels (count,) to int64 (count,)

    Raises:
        ValueError: If they are no integers from 0 to 9, one per image.

    Example:
        >>> from pathlib import Path
        >>> import torch
        >>> from datasets.image_files import check_labels
        >>> check_labels(Path("labels"), torch.tensor([3, 11]), count=2)
        Traceback (most recent call last):
        ValueError: labels: expected labels 0 to 9, got 3 to 11.
    """
    if count < 1 or labels.shape != (count,) or labels.is_floating_point():
        raise ValueError(
            f"{path}: expected labels for {count} images, at least one, got "
            f"{labels.dtype} {tuple(labels.shape)}."
        )
    if not (labels.min() >= 0 and labels.max() < CLASSES):
        raise ValueError(
            f"{path}: expected labels 0 to {CLASSES - 1}, got {labels.min()} to {labels.max()}."
        )
    return labels.long()


def read_svhn(path: Path) -> tuple[Tensor, Tensor]:
    """Pixels (count, 3, 32, 32), uint8, and digits (count,), int64, of a cropped-digits file.

    Args:
        path: A file of MATLAB, such as ``train_32x32.mat``.

    Shape:
        pixels (count, 3, 32, 32), digits (count,)

    Raises:
        ValueError: The file is no such MATLAB file.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> import numpy as np
        >>> from scipy.io import savemat
        >>> from datasets.image_files import read_svhn
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder, "train_32x32.mat")
        ...     images = np.ones((32, 32, 3, 2), np.uint8)
        ...     savemat(path, {"X": images, "y": np.array([[5], [10]])}, do_compression=False)
        ...     pixels, digits = read_svhn(path)
        >>> pixels.shape, digits  # the files write 0 as 10
        (torch.Size([2, 3, 32, 32]), tensor([5, 0]))
    """
    from scipy.io import loadmat, whosmat

    try:
        limit = EXPANSION * path.stat().st_size
        for name, shape, kind in whosmat(path):
            if kind not in NUMBERS or math.prod(shape) > limit:
                raise ValueError(f"{name} of {kind} {shape}, not at most {limit} numbers")
        content = loadmat(path, variable_names=["X", "y"])
        pixels, digits = content["X"], content["y"]
    except Exception as error:  # damaged bytes make the reader raise almost anything
        raise ValueError(
            f"{path}: expected a MATLAB file with X and y, got {one_line(error)}"
        ) from error
    if pixels.dtype != np.uint8 or pixels.ndim != 4 or pixels.shape[:3] != (32, 32, 3):
        raise ValueError(
            f"{path}: expected X of bytes and shape (32, 32, 3, count), "
            f"got {pixels.dtype} {pixels.shape}."
        )
    images = torch.from_numpy(np.ascontiguousarray(pixels.transpose(3, 2, 0, 1)))
    # The digit 0 is written as 10.
    return images, check_labels(path, torch.from_numpy(digits.ravel() % 10), len(images))


class _PlainUnpickler(pickle._Unpickler):
    """Builds arrays, numbers, text, lists and dicts, and refuses everything else.

    It is the one in Python: that in C makes room for as many objects as a file says it has.
    """

    def find_class(self, module: str, name: str) -> Any:
        module = module.replace("numpy.core.", "numpy._core.")
        match module, name:
            case "numpy", "dtype":
                return np.dtype
            case "numpy", "ndarray":
                return None  # nothing to call; only named, for the next one
            case "numpy._core.multiarray", "_reconstruct":
                return _empty_array
            case "_codecs", "encode":
                return _encode
        raise pickle.UnpicklingError(f"the file asks for {module}.{name}")


def _empty_array(kind: None, shape: tuple[int], code: bytes) -> np.ndarray:
    """What the state of a pickled array is then put into."""
    return np.ndarray.__new__(np.ndarray, (0,), np.int8)


def _encode(text: str, encoding: str) -> bytes:
    """How Python 2 is given its bytes."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"the file asks for the encoding {encoding!r}")
    return text.encode("latin1")


def read_cifar(path: Path) -> tuple[Tensor, Tensor]:
    """Pixels (count, 3, 32, 32), uint8, and classes (count,), int64, of a "python version" batch.

    Args:
        path: A batch, such as ``data_batch_1``.

    Shape:
        pixels (count, 3, 32, 32), classes (count,)

    Raises:
        ValueError: The file is no such batch, or asks for code to be run.

    Example:
        >>> import pickle, tempfile
        >>> from pathlib import Path
        >>> import numpy as np
        >>> from datasets.image_files import read_cifar
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder, "data_batch_1")
        ...     batch = {"data": np.ones((2, 3072), np.uint8), "labels": [6, 9]}
        ...     _ = path.write_bytes(pickle.dumps(batch, protocol=2))
        ...     pixels, classes = read_cifar(path)
        >>> pixels.shape, classes
        (torch.Size([2, 3, 32, 32]), tensor([6, 9]))
    """
    with open(path, "rb") as file:
        try:
            batch = _PlainUnpickler(file, encoding="latin1").load()
            pixels, labels = batch["data"], batch["labels"]
            if not isinstance(labels, list) or not all(type(label) is int for label in labels):
                raise ValueError("labels that are no list of integers")
            labels = torch.tensor(labels)
        except Exception as error:  # damaged bytes make the unpickler raise almost anything
            raise ValueError(
                f"{path}: expected a batch of CIFAR-10 in Python's form, got {one_line(error)}"
            ) from error
    if (
        not isinstance(pixels, np.ndarray)
        or pixels.dtype != np.uint8
        or pixels.shape[1:] != (3072,)
    ):
        came = f"{pixels.dtype} {pixels.shape}" if isinstance(pixels, np.ndarray) else type(pixels)
        raise ValueError(f"{path}: expected data of bytes and shape (count, 3072), got {came}.")
    images = torch.from_numpy(pixels.reshape(len(pixels), 3, 32, 32).copy())
    return images, check_labels(path, labels, len(images))
