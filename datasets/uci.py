"""The five tables on which density estimators are compared, prepared as published.

Log-likelihoods in the literature are those of the prepared data, which these modules give.
The preparation is that of Papamakarios, Pavlakou, Murray (2017), Masked Autoregressive Flow
for Density Estimation, arXiv 1705.07057, and the files are those of their archive,
https://zenodo.org/record/1161203, unpacked to ``data``.
"""

from abc import ABC, abstractmethod
from pathlib import Path

import numpy as np
import torch

from datasets.base import DataModule
from datasets.errors import one_line
from datasets.table_files import read_columns, read_names

__all__ = [
    "BSDS300",
    "UCI",
    "Gas",
    "Hepmass",
    "MiniBoone",
    "Power",
    "prepare_gas",
    "prepare_hepmass",
    "prepare_miniboone",
    "prepare_power",
]

Splits = tuple[np.ndarray, np.ndarray, np.ndarray]  # train, val, test


class UCI(DataModule, ABC):
    """One of the five tables; choose a subclass.

    Args:
        root: Folder of the data.
        batch_size: Rows per training batch.
        seed: Seed of the batches' order.

    Shape:
        inputs (batch, features), float32

    Attributes:
        rows: Rows of train, val and test that the published file gives.

    Raises:
        ValueError: If ``batch_size`` is below 1; in ``setup``, if files are not those published.
        FileNotFoundError: In ``setup``, if a file is missing.

    Reference:
        Papamakarios, Pavlakou and Murray (2017), arXiv 1705.07057, for the preparation

    Example:
        >>> import numpy as np
        >>> from datasets.uci import UCI
        >>> class Small(UCI):
        ...     shape = (2,)
        ...     rows = (8, 1, 1)
        ...     def _read(self, root):
        ...         return np.zeros((8, 2)), np.zeros((1, 2)), np.zeros((1, 2))
        >>> data = Small()
        >>> data.setup()
        >>> data.splits["train"][0].dtype
        torch.float32
    """

    rows: tuple[int, int, int]

    def __init__(self, root: str = "data", *, batch_size: int = 512, seed: int = 0) -> None:
        super().__init__(batch_size=batch_size, seed=seed)
        self.root = root

    def setup(self, stage: str | None = None) -> None:
        if self.splits:
            return
        root = Path(self.root).expanduser()
        splits = self._read(root)
        shapes = [part.shape for part in splits]
        expected = [(rows, *self.shape) for rows in self.rows]
        if shapes != expected:
            raise ValueError(
                f"{type(self).__name__} below {root}: expected shapes {expected} of train, val "
                f"and test, got {shapes}: these are not the published files."
            )
        self.splits = {
            name: (torch.from_numpy(part.astype(np.float32)),)
            for name, part in zip(("train", "val", "test"), splits, strict=True)
        }

    @abstractmethod
    def _read(self, root: Path) -> Splits:
        """The prepared train, val and test."""


class Power(UCI):
    """Electric power of one household, minute by minute, from ``root/power/data.npy``.

    Example:
        >>> from datasets.uci import Power
        >>> Power("data").shape  # files are read by setup()
        (6,)
    """

    shape = (6,)
    rows = (1_659_917, 184_435, 204_928)

    def _read(self, root: Path) -> Splits:
        return prepare_power(_npy(root / "power" / "data.npy", columns=8))


class Gas(UCI):
    """Sixteen gas sensors in a mixture of ethylene and CO, of which eight are kept.

    Reads ``root/gas/ethylene_CO.csv``, ``.parquet`` or ``.npy``: the archive's pickle, which
    could run any code, converted once where that is acceptable:
    ``pandas.read_pickle("ethylene_CO.pickle").to_csv("ethylene_CO.csv", index=False)``. An
    NPY file holds the sensors alone.

    Raises:
        ValueError: In ``setup``, if the file is damaged or not the published one.
        FileNotFoundError: In ``setup``, if there is none.

    Example:
        >>> from datasets.uci import Gas
        >>> Gas("data").shape  # files are read by setup()
        (8,)
    """

    shape = (8,)
    rows = (852_174, 94_685, 105_206)

    def _read(self, root: Path) -> Splits:
        stem = root / "gas" / "ethylene_CO"
        found = [p for s in (".csv", ".parquet", ".npy") if (p := stem.with_suffix(s)).is_file()]
        if not found:
            raise _missing(f"{stem}.csv, .parquet or .npy (converted from its pickle)")
        names = read_names(found[0])
        sensors = [i for i, name in enumerate(names) if name not in ("Time", "Meth", "Eth")]
        if len(sensors) != 16:
            raise ValueError(
                f"{found[0]}: expected 16 sensors beside Time, Meth and Eth, got {len(sensors)}."
            )
        return prepare_gas(read_columns(found[0], sensors))


class Hepmass(UCI):
    """Simulated particle collisions with a particle of mass 1000.

    Reads ``root/hepmass/1000_train.csv`` and ``1000_test.csv``.

    Example:
        >>> from datasets.uci import Hepmass
        >>> Hepmass("data").shape  # files are read by setup()
        (21,)
    """

    shape = (21,)
    rows = (315_123, 35_013, 174_987)

    def _read(self, root: Path) -> Splits:
        names = ("1000_train.csv", "1000_test.csv")
        return prepare_hepmass(*(_hepmass_file(root / "hepmass" / name) for name in names))


class MiniBoone(UCI):
    """Particle identification at MiniBooNE, from ``root/miniboone/data.npy``.

    The file is cleaned already: outliers and features with repeated values are gone.

    Example:
        >>> from datasets.uci import MiniBoone
        >>> MiniBoone("data").shape  # files are read by setup()
        (43,)
    """

    shape = (43,)
    rows = (29_556, 3_284, 3_648)

    def _read(self, root: Path) -> Splits:
        return prepare_miniboone(_npy(root / "miniboone" / "data.npy", columns=43))


class BSDS300(UCI):
    """Patches of 8x8 pixels of natural images without their mean, the last pixel left out.

    Reads ``root/BSDS300/BSDS300.hdf5``, which is prepared already (extra ``tables``).

    Raises:
        ValueError: In ``setup``, if the file is damaged or not the published one.
        FileNotFoundError: In ``setup``, if there is none.
        ImportError: In ``setup``, without h5py.

    Example:
        >>> from datasets.uci import BSDS300
        >>> BSDS300("data").shape  # files are read by setup()
        (63,)
    """

    shape = (63,)
    rows = (1_000_000, 50_000, 250_000)

    def _read(self, root: Path) -> Splits:
        path = root / "BSDS300" / "BSDS300.hdf5"
        if not path.is_file():
            raise _missing(path)
        try:
            import h5py
        except ImportError as error:
            raise ImportError(
                "BSDS300 needs h5py: pip install -c constraints.txt -e '.[tables]'"
            ) from error
        try:
            with h5py.File(path) as file:
                splits = tuple(file[name][:] for name in ("train", "validation", "test"))
        except (KeyError, OSError, TypeError, ValueError) as error:
            raise ValueError(
                f"{path}: expected an HDF5 file with train, validation and test, "
                f"got {one_line(error)}"
            ) from error
        for part in splits:
            _check_finite(path, part)
        return splits


def prepare_power(data: np.ndarray) -> Splits:
    """Shuffled rows without columns 1 and 3, dequantized by noise; standardized.

    Args:
        data: (rows, 8): active and reactive power, voltage, intensity, three meters, time.

    Returns:
        train, val and test, (rows, 6) each.

    Example:
        >>> import numpy as np
        >>> from datasets.uci import prepare_power
        >>> [part.shape for part in prepare_power(np.random.rand(100, 8))]
        [(81, 6), (9, 6), (10, 6)]
    """
    # The generator's stream and the order of its draws are part of the published data.
    generator = np.random.RandomState(42)
    data = np.array(data)
    generator.shuffle(data)
    rows = len(data)
    voltage = 0.01 * generator.rand(rows, 1)
    power = 0.001 * generator.rand(rows, 1)
    meters = generator.rand(rows, 3)
    noise = np.hstack((power, voltage, meters, np.zeros((rows, 1))))
    return _standardized(*_in_order(data[:, [0, 2, 4, 5, 6, 7]] + noise))


def prepare_gas(data: np.ndarray) -> Splits:
    """Columns less those that repeat others, standardized by all rows, split in order.

    While any column correlates above 0.98 with another one, the first such is dropped.
    Statistics of all rows tell training something about the test rows; so it was published.

    Args:
        data: (rows, sensors).

    Returns:
        train, val and test, (rows, sensors that are left) each.

    Example:
        >>> import numpy as np
        >>> from datasets.uci import prepare_gas
        >>> data = np.random.rand(100, 3)
        >>> data[:, 2] = 2 * data[:, 0]
        >>> [part.shape for part in prepare_gas(data)]
        [(81, 2), (9, 2), (10, 2)]
    """
    close = np.corrcoef(data, rowvar=False) > 0.98
    kept = list(range(data.shape[1]))
    while (repeats := close[np.ix_(kept, kept)].sum(1) > 1).any():
        del kept[repeats.argmax()]
    data = data[:, kept]
    return _in_order((data - data.mean(0)) / data.std(0, ddof=1))


def prepare_hepmass(train: np.ndarray, test: np.ndarray) -> Splits:
    """Signal rows, standardized by train, without features that repeat their smallest value.

    Args:
        train: (rows, 1 + features): the label, 1 for signal, then the features.
        test: Likewise.

    Returns:
        train, val and test, (signal rows, continuous features) each.

    Example:
        >>> import numpy as np
        >>> from datasets.uci import prepare_hepmass
        >>> train, test = np.random.rand(100, 4), np.random.rand(20, 4)
        >>> train[:, 0] = test[:, 0] = 1  # all of them signal
        >>> train[:50, 3] = 0  # a feature that repeats its smallest value
        >>> [part.shape for part in prepare_hepmass(train, test)]
        [(90, 2), (10, 2), (20, 2)]
    """
    train, test = (part[part[:, 0] == 1][:, 1:] for part in (train, test))
    mean, deviation = train.mean(0), train.std(0, ddof=1)
    train, test = ((part - mean) / deviation for part in (train, test))
    continuous = (train == train.min(0)).sum(0) <= 5
    train, test = train[:, continuous], test[:, continuous]
    rest = len(train) - int(0.1 * len(train))
    return train[:rest], train[rest:], test


def prepare_miniboone(data: np.ndarray) -> Splits:
    """Split in order, standardized.

    Args:
        data: (rows, features).

    Returns:
        train, val and test, (rows, features) each.

    Example:
        >>> import numpy as np
        >>> from datasets.uci import prepare_miniboone
        >>> train, val, test = prepare_miniboone(np.random.rand(100, 3))
        >>> both = np.concatenate((train, val))
        >>> np.allclose(both.mean(0), 0), np.allclose(both.std(0), 1), test.shape
        (True, True, (10, 3))
    """
    return _standardized(*_in_order(data))


def _in_order(data: np.ndarray) -> Splits:
    """The last tenth tests, the last tenth of what is left validates."""
    data, test = np.split(data, [len(data) - int(0.1 * len(data))])
    train, val = np.split(data, [len(data) - int(0.1 * len(data))])
    return train, val, test


def _standardized(train: np.ndarray, val: np.ndarray, test: np.ndarray) -> Splits:
    """By the mean and deviation of train and val together."""
    both = np.concatenate((train, val))
    mean, deviation = both.mean(0), both.std(0)
    return tuple((part - mean) / deviation for part in (train, val, test))


def _npy(path: Path, columns: int) -> np.ndarray:
    if not path.is_file():
        raise _missing(path)
    found = len(read_names(path))
    if found != columns:
        raise ValueError(f"{path}: expected {columns} columns, got {found}.")
    return read_columns(path, range(columns))


def _hepmass_file(path: Path) -> np.ndarray:
    """Label and 27 features; what the test file's rows hold beyond is no data."""
    if not path.is_file():
        raise _missing(path)
    try:
        data = np.loadtxt(path, delimiter=",", skiprows=1, usecols=range(28), ndmin=2)
    except ValueError as error:
        raise ValueError(
            f"{path}: expected a header, then rows of a label and 27 features, "
            f"got {one_line(error)}"
        ) from error
    _check_finite(path, data)
    return data


def _check_finite(path: Path, data: np.ndarray) -> None:
    if not np.isfinite(data).all():
        row, column = np.argwhere(~np.isfinite(data))[0]
        raise ValueError(
            f"{path}: expected finite numbers, got {data[row, column]} in row {row}, column "
            f"{column} (both counted from 0)."
        )


def _missing(path: Path | str) -> FileNotFoundError:
    return FileNotFoundError(
        f"found no {path}; data.tar.gz of https://zenodo.org/record/1161203 holds it."
    )
