"""Files that are either the old ones or the new ones, never halves."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import torch
from lightning_fabric.plugins import TorchCheckpointIO

from flows.checkpoint import read_checkpoint

__all__ = ["AtomicCheckpointIO", "write_atomically"]


@contextmanager
def write_atomically(path: Path, mode: str = "w") -> Iterator[IO[Any]]:
    """A file that replaces ``path`` once the block has ended and all is on the disk.

    Whatever goes wrong before, a full disk, a kill, a failing machine, leaves what was there.

    Args:
        path: The file.
        mode: ``"w"`` for UTF-8 text, ``"wb"`` for bytes.
    """
    text = {} if "b" in mode else {"newline": "", "encoding": "utf-8"}
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")  # others may write, too
    try:
        with open(partial, mode, **text) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    """Put the new name on the disk, where folders can be opened for that."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


class AtomicCheckpointIO(TorchCheckpointIO):
    """Checkpoints written by :func:`write_atomically`, and checked before they are read.

    Lightning's own (2.6) are built in the folder for temporary files and moved: where that is
    another disk, a kill during the move leaves half a checkpoint in place of the one before.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None
    ) -> None:
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with write_atomically(path, "wb") as file:
                torch.save(checkpoint, file)
        except (OSError, RuntimeError) as error:
            # torch says of a full disk that its archive has an unexpected position.
            cause = error.__context__ if isinstance(error.__context__, OSError) else error
            raise OSError(f"{path} cannot be written: {cause}") from error

    def load_checkpoint(self, path: str | Path, **options: Any) -> dict[str, Any]:
        read_checkpoint(path)  # a better judge of what comes from a stranger
        return super().load_checkpoint(path, **options)
