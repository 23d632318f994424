"""Training by a bound of log Z, which sees no data."""

import csv
from functools import partial
from pathlib import Path

import pytest
import torch
import yaml
from torch import Tensor

import train
from datasets.base import DataModule
from datasets.posteriors import POSTERIORS
from datasets.toy import Checkerboard, TwoMeans, TwoMoons
from flows import AffineCoupling, Composite, Flow, siwae
from flows.distributions import GaussianMixture, Normal
from flows.nets import MLP
from flows.recipes import SylvesterVAE
from flows.training import DensityEstimator
from flows.training.variational import guarded_bound
from flows.transforms import Transform

ROOT = Path(train.__file__).parent
CONFIG = f"--config={ROOT / 'configs/toy/two_means.yaml'}"
SMALL = [
    CONFIG,
    "--trainer.max_epochs=3",
    "--trainer.enable_progress_bar=false",
    "--data.init_args.batches_per_epoch=20",
    "--data.init_args.val_size=500",
    "--data.init_args.test_size=500",
]


def mixture_flow(components: int = 3) -> Flow:
    return Flow(Composite([]), GaussianMixture(2, components))


def prepared(data: DataModule) -> DataModule:
    data.setup()
    return data


def test_a_run_reports_the_bound_and_the_truth(tmp_path):
    train.main([*SMALL, f"--trainer.default_root_dir={tmp_path}"])
    (folder,) = tmp_path.glob("*/*")
    with open(folder / "metrics.csv") as file:
        rows = list(csv.DictReader(file))
    objective = yaml.safe_load((folder / "config.yaml").read_text())["model"]["objective"]
    bounds = [float(row[f"train/{objective}"]) for row in rows]
    assert bounds[0] < bounds[-1] < POSTERIORS["two_means"].log_evidence
    assert float(rows[-1]["val/kl"]) < float(rows[0]["val/kl"])
    assert "train/nll" not in rows[0] and "val/nll" in rows[0]
    assert (folder / "history.png").exists() and (folder / "density.png").exists()


@pytest.mark.parametrize("objective", ["elbo", "iwae", "selbo", "siwae"])
def test_training_sees_no_data(objective, fit, monkeypatch):
    def trained(name: str) -> Tensor:
        _, model = fit(name, make_flow=mixture_flow, objective=objective, max_epochs=1)
        return torch.cat([p.detach().flatten() for p in model.parameters()])

    first, sample = trained("first"), TwoMoons.density.sample
    # Rows of another place; the density stays what it is.
    monkeypatch.setattr(TwoMoons.density, "sample", lambda *given: 5 - sample(*given))
    torch.manual_seed(0)
    start = torch.cat([p.detach().flatten() for p in mixture_flow().parameters()])
    assert torch.equal(first, trained("second")) and not torch.equal(first, start)


@pytest.mark.filterwarnings("ignore:The dirpath has changed")
def test_a_resumed_run_ends_like_an_uninterrupted_one(fit, tmp_path):
    options = {"objective": "siwae", "objective_samples": 2}
    _, whole = fit(**options)
    _, resumed = fit("resumed", checkpoint=tmp_path / "whole/epoch=1.ckpt", **options)
    for first, second in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(first, second)


def test_one_bound_for_every_row_and_samples_of_each():
    data, flow = TwoMeans(), mixture_flow(3)
    log_joint, seen = data.density.unnormalized_log_prob, []

    def log_target(x: Tensor) -> Tensor:
        seen.append(len(x))
        return log_joint(x)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data.density, "unnormalized_log_prob", log_target)
        torch.manual_seed(1)
        values = guarded_bound("siwae", flow, data, 4, 5, "training diverged")
    torch.manual_seed(1)
    assert torch.equal(values, siwae(log_joint, flow, 4, repeats=5)) and seen == [60]


class NoDensity(DataModule):
    """Two columns and nothing known of their law."""

    shape = (2,)

    def __init__(self, *context: Tensor) -> None:
        super().__init__(batch_size=4)
        rows = (torch.arange(16.0).view(8, 2), *context)
        self.splits = {"train": rows, "val": rows, "test": rows}


class Labelled(NoDensity):
    density = POSTERIORS["two_means"]


class OneWay(Transform):
    """The identity, which knows no way back."""

    def forward(self, inputs: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return inputs.clone(), inputs.new_zeros(len(inputs))


def conditional() -> Flow:
    net = partial(MLP, context_features=1, hidden_features=4, blocks=0)
    return Flow(AffineCoupling(2, net), Normal(2))


@pytest.mark.parametrize(
    "flow, data, words",
    {
        "no density": (mixture_flow(), NoDensity(), "data with a density, .* NoDensity has none"),
        "context": (conditional(), Labelled(torch.ones(8, 1)), "Labelled has some"),
        "no inverse": (Flow(OneWay(), Normal(2)), prepared(TwoMeans()), "has no inverse"),
    }.values(),
    ids=["no density", "context", "no inverse"],
)
def test_what_has_no_bound_is_refused_before_the_run(flow, data, words):
    with pytest.raises(ValueError, match=f"^model.objective siwae .*{words}"):
        DensityEstimator(flow, objective="siwae").initialize(data)
    if words == "has no inverse":
        DensityEstimator(flow).initialize(data)


def test_a_model_that_only_bounds_its_density_is_refused():
    vae = SylvesterVAE((1, 8, 8), grey_levels=17, latent_features=2, layers=0)
    images = NoDensity()
    images.splits = dict.fromkeys(("train", "val", "test"), (torch.zeros(4, 1, 8, 8),))
    images.grey_levels = 17
    with pytest.raises(ValueError, match="^model.objective elbo needs a Flow .* got SylvesterVAE"):
        DensityEstimator(vae, objective="elbo").initialize(images)


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match="^objective must be None or one of elbo, .* got 'kl'"):
        DensityEstimator(mixture_flow(), objective="kl")
    with pytest.raises(ValueError, match="^objective_samples must be at least 1, got 0"):
        DensityEstimator(mixture_flow(), objective="elbo", objective_samples=0)


@pytest.mark.parametrize(
    "args, words",
    {
        "unknown": (["--model.objective=kl"], ["model.objective", "siwae"]),
        "no density": (
            [f"--config={ROOT / 'configs/tabular/breast_cancer.yaml'}", "--model.objective=elbo"],
            ["model.objective elbo needs data with a density", "BreastCancer has none"],
        ),
    }.values(),
    ids=["unknown", "no density"],
)
def test_the_command_line_says_so_in_one_line(args, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as exit:
        train.main(args)
    assert exit.value.code == 2
    printed = capsys.readouterr().err
    assert printed.startswith("error: ") and printed.count("\n") == 1, printed
    assert all(word in printed for word in words)
    assert not list(tmp_path.iterdir())


def test_samples_where_the_density_is_zero_end_the_run():
    data = prepared(Checkerboard(val_size=5, test_size=5))
    wide = mixture_flow()
    with torch.no_grad():
        wide.distribution.raw_scales.fill_(4.0)
    for name, advice in (("elbo", "take iwae or siwae"), ("selbo", "take iwae or siwae")):
        with pytest.raises(FloatingPointError, match=f"^here: {name} is -inf, .*; {advice}$"):
            guarded_bound(name, wide, data, 1, 500, "here")
    assert guarded_bound("siwae", wide, data, 50, 5, "here").isfinite().all()
    with torch.no_grad():
        wide.distribution.means.fill_(100.0)
        wide.distribution.raw_scales.fill_(-9.0)
    with pytest.raises(FloatingPointError, match="^here: iwae is -inf, .*; widen the base$"):
        guarded_bound("iwae", wide, data, 2, 3, "here")


def test_divergence_says_where(fit):
    with pytest.raises(FloatingPointError, match="^training diverged in epoch [0-9], step [0-9]"):
        fit(objective="elbo", lr=1e30, make_flow=mixture_flow)
