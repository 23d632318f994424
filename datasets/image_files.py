"""The files of CIFAR-10 and SVHN; MNIST's are in ``idx.py``."""

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from datasets.errors import one_line

__all__ = ["CLASSES", "check_labels", "read_cifar", "read_svhn"]

CLASSES = 10  # in MNIST, Fashion-MNIST, CIFAR-10 and SVHN alike


def check_labels(path: Path, labels: Tensor, count: int) -> Tensor:
    """Labels as int64, one per image, 0 to 9."""
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

    Raises:
        ValueError: The file is no such MATLAB file.
    """
    from scipy.io import loadmat

    try:
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


class _PlainUnpickler(pickle.Unpickler):
    """Builds arrays, numbers, text, lists and dicts, and refuses everything else."""

    def find_class(self, module: str, name: str) -> Any:
        module = module.replace("numpy.core.", "numpy._core.")
        if (module, name) not in {
            ("numpy", "dtype"),
            ("numpy", "ndarray"),
            ("numpy._core.multiarray", "_reconstruct"),
            ("_codecs", "encode"),
        }:
            raise pickle.UnpicklingError(f"the file asks for {module}.{name}")
        return super().find_class(module, name)


def read_cifar(path: Path) -> tuple[Tensor, Tensor]:
    """Pixels (count, 3, 32, 32), uint8, and classes (count,), int64, of a "python version" batch.

    Raises:
        ValueError: The file is no such batch, or asks for code to be run.
    """
    with open(path, "rb") as file:
        try:
            batch = _PlainUnpickler(file, encoding="latin1").load()
            pixels, labels = batch["data"], torch.tensor(batch["labels"])
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
