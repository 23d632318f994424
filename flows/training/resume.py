"""What a checkpoint must be for a run to go on from it, or for a test of it to mean anything."""

from pathlib import Path
from typing import Any

from flows.checkpoint import read_checkpoint

__all__ = ["barely_begun", "check_architecture", "check_data", "check_resumable", "checkpoint_at"]


def checkpoint_at(path: Path, *, resume: bool) -> Path:
    """The checkpoint that a path means: in a run folder the last one to resume, else the best."""
    path = path.expanduser().resolve()
    if path.is_dir():
        return path / ("last.ckpt" if resume else "best.ckpt")
    return path


def barely_begun(folder: Path) -> bool:
    """Whether a run folder is that of a run killed before its first checkpoint was whole."""
    table = folder / "metrics.csv"
    epochs = len(table.read_text().splitlines()) - 1 if table.exists() else 0
    return epochs <= 1 and not any((folder / n).exists() for n in ("last.ckpt", "summary.json"))


def check_architecture(path: Path, expected: dict[str, Any]) -> None:
    """Refuse a checkpoint whose flow was built by another config."""
    found = read_checkpoint(path).get("flow_config")
    if found != expected:
        raise ValueError(
            f"{path} belongs to another architecture: expected {_short(expected)}, "
            f"got {_short(found)}."
        )


def check_data(path: Path, saved: dict[str, Any] | None, asked: dict[str, Any] | None) -> None:
    """Refuse other data than the run's, for its numbers would belong to neither."""
    if saved != asked:
        raise ValueError(
            f"{path} was trained on other data: expected {_short(saved)}, got {_short(asked)}; "
            "start a new run instead."
        )


def check_resumable(path: Path, *, max_epochs: int, ema_decay: float) -> None:
    """Refuse a checkpoint without what training needs, or one that lies behind its end.

    Args:
        path: The checkpoint.
        max_epochs: Of the trainer; -1 for no end.
        ema_decay: Of the model.
    """
    checkpoint = read_checkpoint(path)
    missing = {"optimizer_states", "loops"} - set(checkpoint)
    if missing:
        names = ", ".join(sorted(missing))
        raise ValueError(f"{path} cannot be resumed: it lacks {names}.")
    try:
        epochs = int(checkpoint["loops"]["fit_loop"]["epoch_progress"]["current"]["processed"])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} cannot be resumed: its loops lack {error}.") from None
    if 0 <= max_epochs < epochs:
        raise ValueError(
            f"{path} has {epochs} epochs behind it: expected at least as many for "
            f"trainer.max_epochs, got {max_epochs}."
        )
    if "parameter_average" in checkpoint and not ema_decay:
        raise ValueError(
            f"{path} was trained with averaged parameters: expected a model.ema_decay greater "
            "than 0 to go on, got 0."
        )


def _short(config: dict[str, Any] | None) -> str:
    if not isinstance(config, dict) or "class_path" not in config:
        return "nothing" if config is None else repr(config)[:80]
    arguments = ", ".join(f"{k}={v!r}" for k, v in (config.get("init_args") or {}).items())
    return f"{config['class_path'].rpartition('.')[2]}({arguments})"
