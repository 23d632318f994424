"""Pictures during a run and at its end, and the page that shows them."""

import csv
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from matplotlib.figure import Figure
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import train
from datasets.tabular import Table
from flows import Flow, plots
from flows.recipes import RotationSplineFlow
from flows.training import DensityEstimator
from flows.training.pictures import COLUMNS, Pictures, _beside, _by_class, _evaluated
from flows.training.report import write_report
from flows.training.totals import Totals
from flows.transforms import InverseNotAvailable

ROOT = Path(train.__file__).parent
SHORT = [
    "--trainer.max_epochs=1",
    "--trainer.limit_train_batches=1",
    "--trainer.enable_progress_bar=false",
]
DIGITS = [f"--config={ROOT / 'configs/images/digits.yaml'}", "--model.flow.init_args.steps=1"]
TUMOURS = [
    "--data=datasets.tabular.BreastCancer",
    "--model.flow.init_args.features=30",
    "--model.flow.init_args.layers=1",
]


@pytest.mark.parametrize(
    "args, picture",
    {
        "a row per class": (
            [*DIGITS, "--data.init_args.labels=true", "--model.flow.init_args.classes=10"],
            "samples.png",
        ),
        "a model that is no flow": (
            [
                f"--config={ROOT / 'configs/images/digits.yaml'}",
                "--model.flow=flows.recipes.SylvesterVAE",
                "--model.flow.init_args.shape=[1,8,8]",
                "--model.flow.init_args.grey_levels=17",
            ],
            "samples.png",
        ),
        "a table": (TUMOURS, "marginals.png"),
    }.values(),
    ids=["classes", "vae", "table"],
)
def test_a_run_draws_what_suits_its_data(tmp_path, args, picture):
    train.main([*args, *SHORT, f"--trainer.default_root_dir={tmp_path}"])
    (folder,) = tmp_path.glob("*/*")
    pictures = {path.name for path in folder.glob("*.png")}
    assert pictures == {picture, "history.png"}


MOONS = [
    "--trainer.enable_progress_bar=false",
    "--trainer.max_epochs=5",
    "--model.flow.init_args.layers=1",
    "--model.ema_decay=0.9",
    "--data.init_args.batches_per_epoch=2",
    "--data.init_args.val_size=50",
    "--data.init_args.test_size=50",
]


def fit(root: Path, *args: str) -> Path:
    train.main([*MOONS, *args, f"--trainer.default_root_dir={root}"])
    (folder,) = root.glob("*/*")
    return folder


@pytest.fixture(scope="module")
def moons(tmp_path_factory) -> Path:
    return fit(tmp_path_factory.mktemp("moons"), "--pictures_every_n_epochs=1")


def epochs(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("pictures/*"))


def test_pictures_come_when_they_are_due_and_change_nothing(moons, tmp_path):
    # The last epoch is drawn by the end of the run.
    assert epochs(moons) == [
        "epoch-0001.png",
        "epoch-0002.png",
        "epoch-0003.png",
        "epoch-0004.png",
    ]
    often = fit(tmp_path / "often", "--pictures_every_n_epochs=3")
    assert epochs(often) == ["epoch-0003.png"]
    never = fit(tmp_path / "never", "--pictures_every_n_epochs=0")
    assert not (never / "pictures").exists() and (never / "report.html").exists()
    weights = [torch.load(f / "last.ckpt", weights_only=True) for f in (moons, often, never)]
    for other in weights[1:]:
        for name, value in weights[0]["state_dict"].items():
            assert torch.equal(value, other["state_dict"][name]), name
        live = other["parameter_average"]["live"]
        for name, value in weights[0]["parameter_average"]["live"].items():
            assert torch.equal(value, live[name]), name


def test_pictures_nobody_asked_for_take_a_tenth_of_the_time():
    pictures = Pictures(SimpleNamespace(seconds=100.0))
    assert [epoch for epoch in range(1, 20) if pictures._due(epoch)] == [1, 2, 4, 8, 16]
    pictures._seconds = 11.0
    assert not any(map(pictures._due, range(1, 20)))
    asked = Pictures(SimpleNamespace(seconds=1.0), every_n_epochs=2)
    asked._seconds = 11.0
    assert asked._due(4) and not asked._due(5)


def test_what_is_drawn_has_noise_of_its_own():
    model = DensityEstimator(RotationSplineFlow(2, layers=1)).train()
    torch.manual_seed(5)
    expected = torch.randn(3)
    torch.manual_seed(5)
    with _evaluated(SimpleNamespace(callbacks=[]), model):
        first = torch.randn(3)
        assert not model.flow.training
    assert torch.equal(torch.randn(3), expected) and model.flow.training
    with _evaluated(SimpleNamespace(callbacks=[]), model):
        assert torch.equal(torch.randn(3), first)


def test_pictures_show_the_averaged_parameters(tmp_path, monkeypatch):
    seen = []

    def density(flow, truth):
        (last,) = tmp_path.glob("*/*/last.ckpt")
        parameters = {name: value.clone() for name, value in flow.named_parameters()}
        seen.append((parameters, torch.load(last, weights_only=True)))
        assert not flow.training
        return Figure()

    monkeypatch.setattr(plots, "density", density)
    fit(tmp_path, "--trainer.max_epochs=2", "--model.ema_decay=0.99")
    shown, saved = seen[0]
    live = saved["parameter_average"]["live"]
    for name, value in shown.items():
        # Checkpoints hold the average as the weights.
        assert torch.equal(value, saved["state_dict"][f"flow.{name}"]), name
    assert any(not torch.equal(value, live[f"flow.{name}"]) for name, value in shown.items())


def test_a_picture_that_cannot_be_drawn_does_not_end_a_run(tmp_path, monkeypatch):
    real, calls = plots.density, []

    def density(*args):
        calls.append(args)
        if len(calls) == 1:
            raise ValueError("no room for points")
        return real(*args)

    monkeypatch.setattr(plots, "density", density)
    with pytest.warns(UserWarning, match="no picture of what was learned: no room for points"):
        folder = fit(tmp_path, "--trainer.max_epochs=2")
    assert not epochs(folder) and (folder / "density.png").exists()


def test_tensorboard_gets_the_pictures(tmp_path):
    logger = ["--trainer.logger=TensorBoardLogger", "--trainer.logger.save_dir=."]
    often = ["--trainer.max_epochs=3", "--pictures_every_n_epochs=1"]
    folder = fit(tmp_path, *logger, *often)
    found = EventAccumulator(str(folder / "lightning_logs/version_0")).Reload()
    assert set(found.Tags()["images"]) == {"density", "losses"}
    assert [image.step for image in found.Images("density")] == [2, 4, 6]


def test_wandb_gets_the_pictures(tmp_path):
    often = ["--trainer.max_epochs=3", "--pictures_every_n_epochs=1"]
    folder = fit(tmp_path, "--trainer.logger=WandbLogger", *often)
    names = [path.name for path in folder.glob("wandb/offline-run-*/files/media/images/*.png")]
    assert sum(name.startswith("density_") for name in names) == 3
    assert sum(name.startswith("losses_") for name in names) == 3


class Page(HTMLParser):
    """The text of a page, and what it loads or links to."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.text, self.sources, self.tags = "", [], []
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.sources += [value for name, value in attributes if name in ("src", "href")]

    def handle_data(self, data):
        self.text += data


def test_the_report_is_one_page_with_everything(moons):
    text = (moons / "report.html").read_text()
    page = Page(text)
    # Four epochs, the best checkpoint, the losses; nothing from elsewhere.
    assert len(page.sources) == 6 == page.tags.count("img")
    assert all(source.startswith("data:image/") for source in page.sources)
    assert "http" not in re.sub(r"base64,[\w+/=]+", "", text)
    summary = json.loads((moons / "summary.json").read_text())
    for number in (f"{summary['test/kl']:.4f}", f"{summary['parameters']:,}", "max_epochs"):
        assert number in page.text
    assert (moons / "config.yaml").read_text() in page.text
    with open(moons / "metrics.csv") as file:
        for row in csv.DictReader(file):
            assert f"{float(row['val/kl']):.6g}" in page.text


def test_the_report_knows_the_epochs_after_the_best(tmp_path, monkeypatch):
    values = iter([1.0, 2.0, 3.0])  # the first epoch is the best
    evaluate = DensityEstimator._report

    def report(model, split):
        if split == "val":
            model._totals["val"] = Totals()
            model._totals["val"].add("nll", torch.tensor([next(values)]))
        evaluate(model, split)

    monkeypatch.setattr(DensityEstimator, "_report", report)
    folder = fit(tmp_path, "--trainer.max_epochs=3", "--pictures_every_n_epochs=0")
    page = Page((folder / "report.html").read_text())
    assert page.tags.count("tr") == 1 + 3 == len((folder / "metrics.csv").read_text().splitlines())


def test_the_report_says_why_a_run_failed(tmp_path):
    with pytest.raises(SystemExit):
        fit(tmp_path, "--model.lr=1e12", "--model.warmup_steps=0")
    (path,) = tmp_path.glob("*/*/report.html")
    assert "training diverged" in Page(path.read_text()).text


def test_a_flow_without_an_inverse_ends_its_run_without_a_picture(tmp_path, monkeypatch):
    def sample(*args, **options):
        raise InverseNotAvailable()

    monkeypatch.setattr(Flow, "sample", sample)
    with pytest.warns(UserWarning, match="no picture .* InverseNotAvailable"):
        folder = fit(tmp_path, "--trainer.max_epochs=1")
    assert (folder / "summary.json").exists() and (folder / "report.html").exists()


def test_the_report_of_a_run_that_goes_on_or_was_interrupted(tmp_path):
    folder = tmp_path / "a<b" / "now"
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text("name: <script>alert(1)</script>\n")
    rows = [{"epoch": 0, "step": 3, "train/nll": 2.5, "val/nll": 2.25}]
    running = Page(write_report(folder, rows).read_text())
    assert "still running after epoch 1, " in running.text and "2.2500" in running.text
    assert running.tags.count("script") == 1 and "<script>alert(1)</script>" in running.text
    summary = {"interrupted": True, "stopped_by": "SIGTERM", "epochs": 1}
    stopped = Page(write_report(folder, rows, summary).read_text())
    assert "interrupted by SIGTERM" in stopped.text


def test_a_table_given_a_context_draws_for_its_rows(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = torch.randn(60, 3)
    lines = [",".join(f"{value:.4f}" for value in row) for row in rows.tolist()]
    Path("t.csv").write_text("\n".join(["a,b,c", *lines]))
    args = ["--data=datasets.tabular.Table", "--data.init_args.path=t.csv"]
    args += ["--data.init_args.context=[c]", "--model.flow.init_args.context_features=1"]
    train.main([*args, *SHORT, "--model.flow.init_args.layers=1"])
    (picture,) = Path("runs").glob("*/*/marginals.png")
    Path("rows.csv").write_text("c\n0.5\n-1\n")
    sample = ["sample", "--context=rows.csv", "--num_samples=30", "--output=s.csv"]
    train.main([*sample, f"--ckpt_path={picture.parent}"])
    # A table of the same columns, which can be trained on in turn.
    again = Table("s.csv", features=["a", "b"])
    again.setup()
    assert sum(len(inputs) for (inputs,) in again.splits.values()) == 2 * 30


def test_samples_beside_a_table_keep_their_digits(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("t.csv").write_text("a,b\n" + "".join(f"{1_700_000_000 + i},{-i}\n" for i in range(60)))
    drawn = []
    marginals = plots.marginals
    monkeypatch.setattr(
        plots, "marginals", lambda x, *rest: drawn.append(x) or marginals(x, *rest)
    )
    train.main(["--data=datasets.tabular.Table", "--data.init_args.path=t.csv", *SHORT])
    assert len(drawn[0][:, 0].unique()) > 1000


def test_each_row_shows_one_class():
    images = torch.arange(12.0).view(12, 1, 1, 1)
    grid = _by_class(images, torch.tensor([0, 2] * 6), 3).view(3, COLUMNS)
    assert grid[0].tolist() == [0, 2, 4, 6, 8, 10, 1, 1]  # 1 is white
    assert grid[1].tolist() == [1] * 8
    assert grid[2].tolist() == [1, 3, 5, 7, 9, 11, 1, 1]


def test_a_sample_is_drawn_for_the_context_of_each_row():
    class Echo(torch.nn.Module):
        def sample(self, num_samples, context):
            return context.unsqueeze(1).repeat_interleave(num_samples, 1)

    context = torch.randn(5, 2)
    assert torch.equal(_beside(Echo(), 3, [context]), context[:3])


def test_marginals_are_histograms_of_both():
    real, drawn = torch.rand(2000, 3), 2 * torch.rand(1000, 3)
    figure = plots.marginals(drawn, real)
    panels = [axis for axis in figure.axes if axis.get_title()]
    assert [axis.get_title() for axis in panels] == ["feature 0", "feature 1", "feature 2"]
    data, samples = (patch.get_data() for patch in panels[0].patches)
    width = data.edges[1] - data.edges[0]
    assert data.values.sum() * width == pytest.approx(1, abs=0.01)
    assert samples.values.sum() * width == pytest.approx(0.5, abs=0.05)


def test_marginals_bear_the_names_of_the_columns():
    figure = plots.marginals(torch.randn(9, 20), torch.randn(9, 20), list(map(str, range(20))))
    assert [axis.get_title() for axis in figure.axes] == list(map(str, range(16)))


def test_marginals_of_a_constant_column_are_drawn():
    plots.marginals(torch.randn(5, 1), torch.ones(5, 1))


def test_clouds_have_a_panel_each():
    figure = plots.clouds(torch.randn(5, 7, 2), list("abcde"))
    assert [axis.get_title() for axis in figure.axes][:5] == list("abcde")
    assert len(figure.axes) == 8


def test_few_points_are_larger_than_thousands():
    few, many = (plots.samples(torch.randn(n, 2)).axes[0].collections[0] for n in (64, 5000))
    assert few.get_sizes().item() > 5 * many.get_sizes().item()


def test_columns_of_other_units_fill_the_picture(tmp_path):
    drawn = torch.randn(2, 50, 2)
    for scale, aspect in ((1, 1), (1e-12, "auto")):
        figure = plots.clouds(drawn * torch.tensor([1, scale]), "ab")
        assert all(axis.get_aspect() == aspect for axis in figure.axes)
        plots.save(figure, tmp_path / "x.png")


def test_the_history_of_one_epoch_can_be_seen():
    figure = plots.history([{"epoch": 0, "train/nll": 2.0, "val/nll": 1.9, "val/kl": 0.1}])
    lines = [line for axis in figure.axes for line in axis.lines]
    assert len(lines) == 3 and all(line.get_marker() == "o" for line in lines)
