"""Rows divided into train, val and test."""

import math
from pathlib import Path

import torch
from torch import Tensor

from datasets.base import seeded_generator

__all__ = ["check_fractions", "divide"]


def check_fractions(**fractions: float) -> None:
    """Refuse fractions that are not between 0 and 1, or leave no rows to train on.

    Args:
        **fractions: By name, such as ``val_fraction``.

    Raises:
        ValueError: If one is not between 0 and 1, or they sum to 1 or more.

    Example:
        >>> from datasets.divide import check_fractions
        >>> check_fractions(val_fraction=0.5, test_fraction=0.5)
        Traceback (most recent call last):
        ValueError: val_fraction and test_fraction must leave rows to train on, got 0.5 and 0.5.
    """
    for name, fraction in fractions.items():
        if not 0 < fraction < 1:
            raise ValueError(f"{name} must lie between 0 and 1, got {fraction}.")
    if sum(fractions.values()) >= 1:
        names, values = (" and ".join(map(str, part)) for part in (fractions, fractions.values()))
        raise ValueError(f"{names} must leave rows to train on, got {values}.")


def divide(
    rows: int, fractions: dict[str, float], *, split_seed: int | None, source: str | Path
) -> dict[str, Tensor]:
    """Which of so many rows train, and which belong to each of the named fractions.

    Args:
        rows: Number of rows.
        fractions: Name to fraction of the rows, rounded down, but at least one row.
        split_seed: Seed of the order in which rows are dealt, first to train; None deals
            them as they come.
        source: Where the rows are from, for the error.

    Shape:
        row numbers (rows of that part,), int64

    Returns:
        ``"train"`` and the names to row numbers, int64.

    Raises:
        ValueError: A fraction of so few rows would be none, or fewer than two would train.

    Example:
        >>> from datasets.divide import divide
        >>> parts = divide(10, {"val": 0.2, "test": 0.1}, split_seed=None, source="example")
        >>> {name: rows.tolist() for name, rows in parts.items()}
        {'train': [0, 1, 2, 3, 4, 5, 6], 'val': [7, 8], 'test': [9]}
    """
    parts = [(1, fraction) for fraction in fractions.values()]
    parts.append((2, 1 - sum(fractions.values())))
    needed = max(math.ceil(count / part) for count, part in parts)
    if rows < needed:
        asked = ", ".join(f"{name} {fraction}" for name, fraction in fractions.items())
        raise ValueError(
            f"{source}: expected at least {needed} rows to divide ({asked or 'all train'}), "
            f"got {rows}."
        )
    order = torch.arange(rows)
    if split_seed is not None:
        order = torch.randperm(rows, generator=seeded_generator(split_seed))
    sizes = [max(1, int(rows * fraction)) for fraction in fractions.values()]
    parts = order.split([rows - sum(sizes), *sizes])
    return dict(zip(("train", *fractions), parts, strict=True))
