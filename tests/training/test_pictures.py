"""The pictures at the end of a run."""

from pathlib import Path

import pytest
import torch

import train
from datasets.tabular import Table
from flows import plots
from flows.training.run import COLUMNS, _beside, _by_class

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
