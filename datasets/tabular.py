"""Tables of numbers: any CSV, NPY or Parquet file, and scikit-learn's breast cancer data."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from datasets.base import DataModule
from datasets.divide import check_fractions, divide
from datasets.table_files import read_columns, read_names

__all__ = ["BreastCancer", "Table"]


class Table(DataModule):
    r"""A table of numbers from a file, in its own units, some columns as context if wished.

    Nothing is rescaled here. Begin the flow with :class:`flows.Standardize`, which takes its
    units from the training rows (recipes for vectors do), and hand it
    ``embedding_net=flows.nets.StandardizedContext(...)``: then densities, samples and
    contexts are in the units of the file wherever the flow is used, without the file.

    Args:
        path: A .csv file with a header row, a .npy file of shape (rows, columns), or a
            .parquet file (extra ``tables``).
        features: Columns to model, by name or position from 0; all that are no context if
            None. Columns that are not chosen may hold anything.
        context: Columns that the density is conditional on, likewise.
        batch_size: Rows per training batch.
        val_fraction: Part of the rows that validate.
        test_fraction: Part of the rows that test.
        split_seed: Seed of the division, which no other seed changes; None keeps the order
            of the rows: the last ones test, those before validate.
        seed: Seed of the batches' order.
        delimiter: What separates the cells of a CSV file.

    Shape:
        inputs (batch, features), context (batch, columns of context). Float32, or float64
        where float32 would move a value by more than 1e-4 of its column's deviation: a
        Standardize in front makes either float32.

    Raises:
        ValueError: If an option is out of range; in ``setup``, if a chosen column does not exist,
            is constant or holds anything but finite numbers, or there are too few rows.
        FileNotFoundError: In ``setup``, if there is no such file.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> from datasets.tabular import Table
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder, "people.csv")
        ...     rows = "".join(f"{160 + i},{50 + i % 7},{i}\n" for i in range(40))
        ...     _ = path.write_text(f"height,weight,age\n{rows}")
        ...     data = Table(str(path), context=["age"])
        ...     data.setup()
        >>> data.columns, data.context_features
        (('height', 'weight'), 1)
    """

    def __init__(
        self,
        path: str,
        *,
        features: Sequence[str | int] | None = None,
        context: Sequence[str | int] | None = None,
        batch_size: int = 256,
        val_fraction: float = 0.1,
        test_fraction: float = 0.1,
        split_seed: int | None = 0,
        seed: int = 0,
        delimiter: str = ",",
    ) -> None:
        super().__init__(batch_size=batch_size, seed=seed)
        check_fractions(val_fraction=val_fraction, test_fraction=test_fraction)
        self.fractions = {"val": val_fraction, "test": test_fraction}
        self.split_seed = split_seed
        if len(delimiter) != 1 or delimiter in '\r\n" ':
            raise ValueError(f"delimiter must be one character, got {delimiter!r}.")
        self.path = path
        self.features = features
        self.context = context or ()
        self.delimiter = delimiter
        self.context_features = len(self.context) or None
        if features is not None:
            self.shape = (len(features),)

    def setup(self, stage: str | None = None) -> None:
        if self.splits:
            return
        path = Path(self.path).expanduser()
        names = read_names(path, delimiter=self.delimiter)
        context = _positions(path, names, self.context)
        if self.features is None:
            features = [column for column in range(len(names)) if column not in context]
        else:
            features = _positions(path, names, self.features)
        if not features:
            raise ValueError(f"{path}: expected at least one column to model, got none.")
        if both := [names[column] for column in features if column in context]:
            raise ValueError(f"{path}: {both[0]!r} must be a feature or context, got it as both.")
        values = read_columns(path, features + context, delimiter=self.delimiter)
        tensors = [_compact(values[:, : len(features)])]
        if context:
            tensors.append(_compact(values[:, len(features) :]))
        split = divide(len(values), self.fractions, split_seed=self.split_seed, source=path)
        train = values[split["train"].numpy()]
        constant = (train == train[0]).all(0).nonzero()[0]
        if len(constant):
            raise ValueError(
                f"{path}: expected columns that vary, got {train[0, constant[0]]:g} in all "
                f"{len(train)} training rows of {names[(features + context)[constant[0]]]!r}; "
                "choose features and context without it."
            )
        self.shape = (len(features),)
        self.columns = tuple(names[column] for column in features)
        self.splits = {
            name: tuple(tensor[rows] for tensor in tensors) for name, rows in split.items()
        }


class BreastCancer(DataModule):
    """569 tumours, 30 measurements each: a real table that is always there.

    Args:
        batch_size: Rows per training batch.
        val_fraction: Part of the rows that validate.
        test_fraction: Part of the rows that test.
        labels: Give the diagnosis too: 0 malignant, 1 benign.
        split_seed: Seed of the division; None keeps the order of the rows.
        seed: Seed of the batches' order.

    Shape:
        inputs (batch, 30), float32, in their own units: see :class:`Table`; labels (batch,)

    Raises:
        ValueError: If a fraction is not between 0 and 1, or ``batch_size`` is below 1.

    Reference:
        ``sklearn.datasets.load_breast_cancer``, UCI's "Breast Cancer Wisconsin (Diagnostic)"
        (Wolberg, Mangasarian, Street, Street, 1993)

    Example:
        >>> from datasets.tabular import BreastCancer
        >>> data = BreastCancer()
        >>> data.setup()
        >>> [len(data.splits[name][0]) for name in ("train", "val", "test")], data.columns[0]
        ([399, 85, 85], 'mean radius')
    """

    shape = (30,)

    def __init__(
        self,
        *,
        batch_size: int = 64,
        val_fraction: float = 0.15,
        test_fraction: float = 0.15,
        labels: bool = False,
        split_seed: int | None = 0,
        seed: int = 0,
    ) -> None:
        super().__init__(batch_size=batch_size, seed=seed)
        check_fractions(val_fraction=val_fraction, test_fraction=test_fraction)
        self.fractions = {"val": val_fraction, "test": test_fraction}
        self.split_seed = split_seed
        self.classes = 2 if labels else None

    def setup(self, stage: str | None = None) -> None:
        if self.splits:
            return
        from sklearn.datasets import load_breast_cancer

        data = load_breast_cancer()
        self.columns = tuple(data.feature_names.tolist())
        tensors = [_compact(data.data)]
        if self.classes:
            tensors.append(torch.from_numpy(data.target).long())
        split = divide(
            len(data.data), self.fractions, split_seed=self.split_seed, source="breast cancer"
        )
        self.splits = {
            name: tuple(tensor[rows] for tensor in tensors) for name, rows in split.items()
        }


def _positions(path: Path, names: list[str], chosen: Sequence[str | int]) -> list[int]:
    """Positions of columns that were chosen by name or position."""
    positions = []
    for column in chosen:
        if isinstance(column, str) and column in names:
            position = names.index(column)
        elif isinstance(column, int) and 0 <= column < len(names):
            position = column
        else:
            shown = ", ".join(map(repr, names[:20])) + (", ..." if len(names) > 20 else "")
            raise ValueError(
                f"{path}: expected one of its {len(names)} columns, {shown}, got {column!r}."
            )
        if position in positions:
            raise ValueError(f"{path}: {names[position]!r} must be chosen once, got it twice.")
        positions.append(position)
    return positions


def _compact(values: np.ndarray) -> Tensor:
    """Columns as float32 if that moves none by over 1e-4 of its deviation, else as float64."""
    if not len(values):
        return torch.from_numpy(values)
    with np.errstate(over="ignore"):
        rounded = values.astype(np.float32)
    moved = np.abs(rounded - values).max(0)
    fine = (moved <= 1e-4 * values.std(0)) | (np.ptp(values, 0) == 0)
    return torch.from_numpy(rounded if fine.all() else values)
