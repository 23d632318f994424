"""Columns of numbers from CSV, NPY and Parquet files, every cell checked."""

import csv
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TextIO

import numpy as np

from datasets.errors import one_line

__all__ = ["read_columns", "read_names"]

# A header of 10,000 names fits easily; a binary file without line ends does not.
LINE_LIMIT = 2**20
# A Parquet file that repeats one value can claim any number of rows.
PARQUET_LIMIT = 2**28
EXPANSION = 64


def read_names(path: Path, *, delimiter: str = ",") -> list[str]:
    r"""The names of a table's columns; of an NPY file their positions, "0", "1", ...

    Args:
        path: A file ending in .csv (its first row holds the names), .npy or .parquet.
        delimiter: What separates the cells of a CSV file.

    Raises:
        ValueError: The file is no such table, or a name is missing or occurs twice.
        FileNotFoundError: There is no such file.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> from datasets.table_files import read_names
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder, "table.csv")
        ...     _ = path.write_text("height,width\n1,2\n3,4\n")
        ...     read_names(path)
        ['height', 'width']
    """
    match _suffix(path):
        case ".csv":
            names = _csv_names(path, delimiter)
        case ".npy":
            names = [str(column) for column in range(_open_npy(path).shape[1])]
        case _:
            names = _open_parquet(path).schema_arrow.names
    for column, name in enumerate(names):
        if not name:
            raise ValueError(f"{path}: expected a name for every column, got none for {column}.")
        if (first := names.index(name)) != column:
            raise ValueError(
                f"{path}: expected different column names, got {name!r} for columns "
                f"{first} and {column}."
            )
    return names


def read_columns(path: Path, columns: Sequence[int], *, delimiter: str = ",") -> np.ndarray:
    r"""The chosen columns, by position, as float64 of shape (rows, len(columns)), all finite.

    Other columns may hold anything.

    Args:
        path: A file ending in .csv, .npy or .parquet.
        columns: Positions, counted from 0.
        delimiter: What separates the cells of a CSV file.

    Raises:
        ValueError: A cell of these columns is no finite number, or the file is damaged.
        FileNotFoundError: There is no such file.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> from datasets.table_files import read_columns
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder, "table.csv")
        ...     _ = path.write_text("height,name,width\n1,a,2\n3,b,4\n")
        ...     read_columns(path, [0, 2])
        array([[1., 2.],
               [3., 4.]])
    """
    match _suffix(path):
        case ".csv":
            return _csv_columns(path, columns, delimiter)
        case ".npy":
            values = np.asarray(_open_npy(path)[:, list(columns)], dtype=np.float64)
        case _:
            values = _parquet_columns(path, columns)
    bad = np.argwhere(~np.isfinite(values))
    if len(bad):
        row, which = bad[0]
        raise ValueError(
            f"{path}: expected a finite number, got {values[row, which]} in row {row}, "
            f"column {columns[which]} (both counted from 0)."
        )
    return values


def _suffix(path: Path) -> str:
    suffix = path.suffix.lower()
    if suffix not in (".csv", ".npy", ".parquet"):
        raise ValueError(f"{path}: expected a file ending in .csv, .npy or .parquet.")
    if not path.is_file():
        raise FileNotFoundError(f"expected a table, found no file {path}.")
    return suffix


# CSV


def _csv_names(path: Path, delimiter: str) -> list[str]:
    for _, cells in _csv_rows(path, delimiter):
        names = [cell.strip() for cell in cells]
        positions = [str(column) for column in range(len(names))]
        if names != positions and all(map(_is_number, names)):
            raise ValueError(
                f"{path}: expected column names in the first row, got {_shown(names)}."
            )
        return names
    raise ValueError(f"{path}: expected a header row with column names, got an empty file.")


def _csv_columns(path: Path, columns: Sequence[int], delimiter: str) -> np.ndarray:
    rows = _csv_rows(path, delimiter)
    _, names = next(rows)
    # Eight bytes a number: lists of floats would take four times as much.
    values, lines = array("d"), array("q")
    for line, cells in rows:
        if len(cells) != len(names):
            raise ValueError(
                f"{path}: expected {len(names)} cells in every row, as in the header, got "
                f"{len(cells)} in line {line}."
            )
        lines.append(line)
        try:
            values.extend([float(cells[column]) for column in columns])
        except ValueError:
            column = next(column for column in columns if not _is_number(cells[column]))
            raise ValueError(
                f"{path}: expected a number, got {cells[column][:80]!r} in line {line}, "
                f"column {names[column].strip()!r}."
            ) from None
    table = np.frombuffer(values, dtype=np.float64).reshape(-1, len(columns))
    bad = np.argwhere(~np.isfinite(table))
    if len(bad):
        row, which = bad[0]
        raise ValueError(
            f"{path}: expected a finite number, got {table[row, which]} in line {lines[row]}, "
            f"column {names[columns[which]].strip()!r}."
        )
    return table


def _csv_rows(path: Path, delimiter: str) -> Iterator[tuple[int, list[str]]]:
    """Line number, counted from 1, and cells of every row that is not blank."""
    with open(path, newline="", encoding="utf-8-sig") as file:
        reader = csv.reader(_lines(file), delimiter=delimiter, strict=True)
        try:
            for cells in reader:
                if cells:
                    yield reader.line_num, cells
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}: expected UTF-8 text, got {error}.") from error
        except csv.Error as error:
            raise ValueError(f"{path}: line {reader.line_num} is no CSV: {error}.") from error


def _lines(file: TextIO) -> Iterator[str]:
    while line := file.readline(LINE_LIMIT + 1):
        if len(line) > LINE_LIMIT:
            raise csv.Error(f"it has more than {LINE_LIMIT} characters")
        yield line


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _shown(names: Sequence[str]) -> str:
    shown = ", ".join(map(repr, names[:8]))
    return f"{shown}, ..." if len(names) > 8 else shown


# NPY


def _open_npy(path: Path) -> np.ndarray:
    """The array, on disk: a header that claims too much costs no memory."""
    try:
        values = np.lib.format.open_memmap(path, mode="r")
    except PermissionError:
        raise
    except Exception as error:  # a damaged header is Python code to numpy's reader
        raise ValueError(
            f"{path}: expected an NPY file of plain numbers, without pickled objects, "
            f"got: {one_line(error)}"
        ) from error
    if values.dtype.kind not in "fiub":
        raise ValueError(f"{path}: expected real numbers, got an array of {values.dtype}.")
    if values.ndim != 2 or values.shape[1] < 1:
        raise ValueError(f"{path}: expected shape (rows, columns), got {values.shape}.")
    return values


# Parquet


def _open_parquet(path: Path):
    try:
        from pyarrow import ArrowException, parquet
    except ImportError as error:
        raise ImportError(
            "Parquet files need pyarrow: pip install -c constraints.txt -e '.[tables]'"
        ) from error
    try:
        return parquet.ParquetFile(path)
    except (ArrowException, OSError) as error:
        raise _damaged_parquet(path, error) from error


def _damaged_parquet(path: Path, error: Exception) -> ValueError:
    return ValueError(f"{path}: expected an intact Parquet file, got: {one_line(error)}")


def _parquet_columns(path: Path, columns: Sequence[int]) -> np.ndarray:
    import pyarrow

    file = _open_parquet(path)
    schema = file.schema_arrow
    limit = max(PARQUET_LIMIT, EXPANSION * path.stat().st_size)
    if (size := 8 * file.metadata.num_rows * len(columns)) > limit:
        raise ValueError(
            f"{path}: expected a table of at most {limit} bytes, {EXPANSION} times the file, got "
            f"{file.metadata.num_rows} rows, {size} bytes: write a larger one as .npy."
        )
    for column in columns:
        field = schema.field(column)
        kinds = (pyarrow.types.is_integer, pyarrow.types.is_floating, pyarrow.types.is_boolean)
        if not any(is_kind(field.type) for is_kind in kinds):
            raise ValueError(
                f"{path}: expected numbers, got {field.type} in column {field.name!r}."
            )
    try:
        table = file.read(columns=[schema.names[column] for column in columns])
    except (pyarrow.ArrowException, OSError) as error:
        raise _damaged_parquet(path, error) from error
    values = np.empty((table.num_rows, len(columns)))
    for which, column in enumerate(columns):
        # What is missing becomes NaN.
        cells = table.column(schema.names[column]).cast(pyarrow.float64(), safe=False)
        values[:, which] = cells.to_numpy()
    return values
