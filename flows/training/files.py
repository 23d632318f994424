"""Files that are either the old ones or the new ones, never halves."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

__all__ = ["write_atomically"]


@contextmanager
def write_atomically(path: Path) -> Iterator[TextIO]:
    """A text file that replaces ``path`` once the block has ended without an error."""
    partial = path.with_name(path.name + ".partial")
    try:
        with open(partial, "w", newline="", encoding="utf-8") as file:
            yield file
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
