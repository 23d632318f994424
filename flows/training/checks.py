"""Do data and flow fit? Found out before a run begins, and said with the config key to change."""

import torch
from pytorch_lightning import LightningDataModule
from torch import Tensor, nn

from flows.training.guard import culprit
from flows.transforms.base import InputOutsideDomain

__all__ = ["check_splits", "show_rows"]

# What layers raise for inputs or a context that they were not built for.
MISFITS = (ValueError, InputOutsideDomain, RuntimeError, TypeError, IndexError)


def check_splits(flow: nn.Module, data: LightningDataModule) -> None:
    """Refuse data that no flow, or not this flow, can be trained on; looks at no layer's output.

    Args:
        flow: What is to be trained.
        data: Set up, with ``splits``: see ``datasets.base.DataModule``.
    """
    if not getattr(data, "splits", None):
        raise ValueError(f"{_name(data)} must fill splits in setup, as datasets' modules do.")
    least = {"train": 2, "val": 1, "test": 1}
    for split, parts in data.splits.items():
        if len(parts[0]) < least.get(split, 1):
            raise ValueError(
                f"{_name(data)} must have at least {least.get(split, 1)} rows in its {split} "
                f"split, got {len(parts[0])}."
            )
        for name, tensor in zip(("inputs", "context"), parts, strict=False):
            if isinstance(tensor, Tensor) and not tensor.isfinite().all():
                row, *feature = (~tensor.isfinite()).nonzero()[0].tolist()
                raise ValueError(
                    f"{_name(data)} must be finite, got {tensor[(row, *feature)].item()} in its "
                    f"{split} split: {name}, row {row}, feature {', '.join(map(str, feature))}."
                )
        _check_labels(flow, data, split, parts[1:])
        _check_grey_levels(data, split, parts[0])
    levels = getattr(data, "grey_levels", None)
    for path, module in flow.named_modules():
        expected = getattr(module, "grey_levels", levels)
        if expected != levels:
            of = f"{path} ({type(module).__name__})" if path else type(module).__name__
            raise ValueError(
                f"{of} in model.flow has grey_levels {expected}, the data, {_name(data)}, "
                f"{levels}: they must be the same."
            )


def _check_labels(
    flow: nn.Module, data: LightningDataModule, split: str, context: tuple[Tensor, ...]
) -> None:
    classes = getattr(data, "classes", None)
    if classes is None or not context:
        return
    low, high = context[0][:].min().item(), context[0][:].max().item()
    if not 0 <= low <= high < classes:
        raise ValueError(
            f"{_name(data)} has {classes} classes, so labels must be 0 to {classes - 1}, "
            f"got {low} to {high} in its {split} split."
        )
    embedding = getattr(flow, "embedding_net", None)
    known = None if isinstance(embedding, nn.Identity) else getattr(embedding, "classes", classes)
    if known != classes:
        raise ValueError(
            f"model.flow must have classes {classes} for the labels of {_name(data)}, "
            f"got {known}; or leave the labels out of the data."
        )


def _check_grey_levels(data: LightningDataModule, split: str, images: Tensor) -> None:
    levels = getattr(data, "grey_levels", None)
    if levels is None:
        return
    # Images kept as bytes, which become numbers when asked for, are right by construction.
    for rows in images.split(1000) if isinstance(images, Tensor) else [images[:100]]:
        pixels = rows.double() * levels
        off = (pixels - pixels.round()).abs().max().item()
        if not (off < 1e-3 and -0.5 < pixels.min() and pixels.max() < levels - 0.5):
            low, high = pixels.min().item() / levels, pixels.max().item() / levels
            raise ValueError(
                f"{_name(data)} has {levels} grey levels, so pixels must be k / {levels} with "
                f"k = 0 to {levels - 1}, got other values between {low:.4g} and {high:.4g} in "
                f"its {split} split."
            )


@torch.no_grad()
def show_rows(flow: nn.Module, data: LightningDataModule, rows: int) -> None:
    """Run the first training rows through the flow, which initializes layers that need data."""
    batch = tuple(tensor[:rows] for tensor in data.splits["train"])
    try:
        log_prob = flow(*batch)
    except MISFITS as error:
        reason = " ".join(str(error).split())
        advice = ""
        if any(tensor.dtype == torch.float64 for tensor in batch):
            advice = (
                " float32 cannot hold them well: rescale the columns, or begin the flow with "
                "Standardize and its embedding_net with StandardizedContext."
            )
        raise ValueError(
            f"model.flow does not fit the data: {reason.rstrip('.')}. "
            f"{_description(data, batch)}{advice}"
        ) from error
    if not log_prob.isfinite().all():
        raise ValueError(f"model.flow cannot start on {_name(data)}: {culprit(flow, batch)}.")
    if len(batch) > 1 and _works_without_context(flow, batch[0][:2]):
        raise ValueError(
            f"model.flow takes no context, but {_description(data, batch)} Build it with "
            "classes or context_features, or leave the context out of the data."
        )


def _works_without_context(flow: nn.Module, inputs: Tensor) -> bool:
    try:
        flow(inputs)
    except MISFITS:
        return False
    return True


def _description(data: LightningDataModule, batch: tuple[Tensor, ...]) -> str:
    given = "no context"
    if len(batch) > 1:
        classes = getattr(data, "classes", None)
        given = f"a context of {batch[1].shape[-1]} columns" if classes is None else "labels"
    return f"{_name(data)} gives samples of shape {tuple(batch[0].shape[1:])} and {given}."


def _name(data: LightningDataModule) -> str:
    return type(data).__name__
