"""Data and flows that do not fit are found before a run begins."""

from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import train
from datasets.base import DataModule
from datasets.images import GreyLevels
from flows import ActNorm, AffineCoupling, Composite, Dequantize, Flow, Logit, Rotation
from flows.distributions import Normal
from flows.nets import MLP, OneHot
from flows.recipes import SylvesterVAE
from flows.training import DensityEstimator

ROOT = Path(train.__file__).parent


class Fixed(DataModule):
    """The given tensors as every split, or other ones for some."""

    def __init__(self, *tensors: Tensor, **splits: tuple[Tensor, ...]) -> None:
        super().__init__(batch_size=4)
        self.shape = tuple(tensors[0][:1].shape[1:])
        self.splits = {"train": tensors, "val": tensors, "test": tensors} | splits


def with_attributes(data: Fixed, **attributes: object) -> Fixed:
    for name, value in attributes.items():
        setattr(data, name, value)
    return data


def plain() -> Flow:
    return Flow(Composite([ActNorm(2), Rotation(2)]), Normal(2))


def conditional(context_features: int, embedding: nn.Module | None = None) -> Flow:
    net = partial(MLP, context_features=context_features)
    return Flow(AffineCoupling(2, net), Normal(2), embedding)


def levels(grey_levels: int) -> Flow:
    return Flow(Composite([Dequantize(grey_levels), Logit()]), Normal((1, 4, 4)))


X = torch.randn(8, 2, generator=torch.Generator().manual_seed(0))
ROWS = torch.arange(16.0).view(8, 2)
LABELS = torch.arange(8) % 3
PIXELS = torch.arange(8 * 16).view(8, 1, 4, 4) % 17 / 17


def but(tensor: Tensor, index: tuple[int, ...], value: float) -> Tensor:
    tensor = tensor.clone()
    tensor[index] = value
    return tensor


MISFITS = {
    "width": (plain(), Fixed(torch.randn(8, 3)), ["2 features", "shape (3,) and no context"]),
    "shape": (plain(), Fixed(PIXELS), ["2 features", "shape (1, 4, 4)"]),
    "NaN": (plain(), Fixed(but(X, (5, 1), torch.nan)), ["nan in its train split: inputs, row 5"]),
    "infinite validation": (
        plain(),
        Fixed(X, val=(but(X, (3, 0), torch.inf),)),
        ["inf in its val split: inputs, row 3, feature 0"],
    ),
    "NaN in the context": (
        conditional(2),
        Fixed(X, but(ROWS, (7, 1), torch.nan)),
        ["nan in its train split: context, row 7, feature 1"],
    ),
    "one row": (plain(), Fixed(X[:1]), ["at least 2 rows in its train split, got 1"]),
    "no validation": (plain(), Fixed(X, val=(X[:0],)), ["1 rows in its val split, got 0"]),
    "grey levels": (
        levels(256),
        with_attributes(Fixed(PIXELS), grey_levels=17),
        ["transform.transforms.0 (Dequantize)", "grey_levels 256", "Fixed, 17"],
    ),
    "grey levels of a model that is no flow": (
        SylvesterVAE((1, 4, 4), grey_levels=16),
        with_attributes(Fixed(PIXELS), grey_levels=17),
        ["SylvesterVAE in model.flow has grey_levels 16", "17"],
    ),
    "no grey levels": (levels(17), Fixed(PIXELS), ["grey_levels 17", "Fixed, None"]),
    "pixels from -1 to 1": (
        levels(17),
        with_attributes(Fixed(2 * PIXELS - 1), grey_levels=17),
        ["k / 17", "between -1 and 0.8824 in its train split"],
    ),
    "pixels up to 1": (
        levels(17),
        with_attributes(Fixed(PIXELS, test=(PIXELS * 17 / 16,)), grey_levels=17),
        ["k / 17", "between 0 and 1 in its test split"],
    ),
    "pixels between the levels": (
        levels(17),
        with_attributes(Fixed(0.9 * PIXELS), grey_levels=17),
        ["k / 17"],
    ),
    "pixels from 1 / 17 to 1": (
        levels(17),
        with_attributes(Fixed(PIXELS + 1 / 17), grey_levels=17),
        ["k / 17", "between 0.05882 and 1"],
    ),
    "one late pixel": (
        levels(17),
        with_attributes(
            Fixed(but(PIXELS.repeat(300, 1, 1, 1), (-1, 0, 3, 3), 1.5)), grey_levels=17
        ),
        ["k / 17", "1.5 in its train split"],
    ),
    "float64 without Standardize": (
        Flow(Composite([AffineCoupling(2, MLP), Rotation(2)]), Normal(2)),
        Fixed(1e9 + X.double()),
        ["rescale the columns, or begin the flow with Standardize"],
    ),
    "outside the range of a layer": (
        Flow(Logit(), Normal(2)),
        Fixed(X),
        ["inputs must lie in [0, 1]", "Fixed gives samples of shape (2,)"],
    ),
    "labels out of range": (
        conditional(3, OneHot(3)),
        with_attributes(Fixed(X, LABELS, test=(X, LABELS + 1)), classes=3),
        ["labels must be 0 to 2, got 1 to 3 in its test split"],
    ),
    "another number of classes": (
        conditional(4, OneHot(4)),
        with_attributes(Fixed(X, LABELS), classes=3),
        ["must have classes 3 for the labels", "got 4"],
    ),
    "labels without an embedding": (
        plain(),
        with_attributes(Fixed(X, LABELS), classes=3),
        ["must have classes 3 for the labels", "got None"],
    ),
    "context that is ignored": (plain(), Fixed(X, ROWS), ["takes no context", "of 2 columns"]),
    "context that is missing": (
        conditional(2),
        Fixed(X),
        ["context must have 2 features, got None", "no context"],
    ),
    "labels that are missing": (
        conditional(3, OneHot(3)),
        Fixed(X),
        ["context must have 3 features, got None"],
    ),
    "context of another width": (
        conditional(3),
        Fixed(X, ROWS),
        ["context must have 3 features, got (8, 2)", "a context of 2 columns"],
    ),
    "context for a model without": (
        SylvesterVAE((1, 4, 4), grey_levels=17),
        with_attributes(Fixed(PIXELS, torch.randn(8, 2)), grey_levels=17),
        ["takes no context"],
    ),
    "a start that is not finite": (
        Flow(Rotation(2), Normal(2)),
        Fixed(X * 1e30),
        ["cannot start on Fixed: the layers are finite, but Normal, the base distribution"],
    ),
}


@pytest.mark.parametrize("flow, data, words", MISFITS.values(), ids=MISFITS.keys())
def test_what_does_not_fit_is_refused(flow, data, words):
    with pytest.raises(ValueError) as error:
        DensityEstimator(flow).initialize(data)
    for word in words:
        assert word in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "flow, data",
    {
        "plain": (plain(), Fixed(X)),
        "context": (conditional(2), Fixed(X, ROWS)),
        "labels": (conditional(3, OneHot(3)), with_attributes(Fixed(X, LABELS), classes=3)),
        "labels, an embedding of its own": (
            conditional(5, nn.Embedding(3, 5)),
            with_attributes(Fixed(X, LABELS), classes=3),
        ),
        "pixels": (levels(17), with_attributes(Fixed(PIXELS), grey_levels=17)),
        "pixels kept as bytes": (
            levels(256),
            with_attributes(
                Fixed(GreyLevels(torch.arange(128, 256, dtype=torch.uint8).view(8, 1, 4, 4))),
                grey_levels=256,
            ),
        ),
        "a model that is no flow": (
            SylvesterVAE((1, 4, 4), grey_levels=17),
            with_attributes(Fixed(PIXELS), grey_levels=17),
        ),
    }.values(),
)
def test_what_fits_is_not(flow, data):
    DensityEstimator(flow).initialize(data)


@pytest.mark.parametrize("model", [Rotation(2), Normal(2), nn.Linear(2, 2)], ids=repr)
def test_what_is_no_density_is_refused(model):
    name = type(model).__name__
    with pytest.raises(ValueError, match=f"must be a Flow, or a module .* got {name}"):
        DensityEstimator(model)


def test_data_without_splits_are_refused():
    data = with_attributes(Fixed(X), splits={})
    with pytest.raises(ValueError, match="Fixed must fill splits in setup"):
        DensityEstimator(plain()).initialize(data)


DIGITS = f"--config={ROOT / 'configs/images/digits.yaml'}"


@pytest.mark.parametrize(
    "args, words",
    {
        "grey levels": ([DIGITS, "--model.flow.init_args.grey_levels=256"], ["256", "Digits, 17"]),
        "classes": (
            [DIGITS, "--model.flow.init_args.classes=9", "--data.init_args.labels=true"],
            ["classes 10", "got 9"],
        ),
        "labels nobody wants": ([DIGITS, "--data.init_args.labels=true"], ["classes 10", "None"]),
        "labels nobody gives": (
            [DIGITS, "--model.flow.init_args.classes=10"],
            ["10 features, got None", "no context"],
        ),
        "context nobody gives": (
            ["--model.flow.init_args.context_features=2"],
            ["2 features, got None", "TwoMoons gives samples of shape (2,) and no context"],
        ),
        "no model": (
            ["--model.flow=flows.Rotation", "--model.flow.init_args.features=2"],
            ["model.flow", "flows.Rotation does not correspond to a subclass of DensityModel"],
        ),
        "averaging": (["--model.ema_decay=1"], ["ema_decay must lie in [0, 1), got 1.0"]),
        "patience without validation": (
            ["--model.early_stopping_patience=2", "--trainer.limit_val_batches=0"],
            ["early_stopping_patience needs validation"],
        ),
    }.values(),
    ids=lambda value: " ".join(value)[-40:],
)
def test_the_command_line_says_so_in_one_line(args, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as exit:
        train.main(args)
    assert exit.value.code == 2
    printed = capsys.readouterr().err
    assert printed.startswith("error: ") and printed.count("\n") == 1, printed
    for word in words:
        assert word in printed
    assert not list(tmp_path.iterdir())
