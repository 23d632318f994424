"""The comparison of bounds: it measures what it says, in runs of a moment."""

import json
import sys

import pytest
import torch

from benchmarks import race, timing, variational
from datasets.densities import GaussianMixture as Truth
from flows import Composite, Flow
from flows.distributions import DiagonalNormal, GaussianMixture


def test_it_trains_by_bounds_that_share_the_time(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(timing, "RESULTS", tmp_path)
    monkeypatch.setattr(race, "LOGS", tmp_path)
    options = ["--flows", "splines", "--seeds", "0", "--seconds", "0.2", "--threads", "1"]
    options += ["--objectives", "siwae then selbo"]
    monkeypatch.setattr(sys, "argv", ["variational", *options])
    variational.main()
    (file,) = tmp_path.glob("*.json")
    (row,) = json.loads(file.read_text())["rows"]
    assert row["steps"] >= 2 and row["standard_error"] > 0 and 0 < row["efficiency"] <= 1
    assert f"{row['kl']:.4f}" in capsys.readouterr().out


@pytest.mark.parametrize("components", [1, 2])
def test_what_it_measures_is_known_for_normals(components):
    truth = Truth([(0.0, 0.0)], 0.5 * torch.eye(2).numpy())
    base = DiagonalNormal(2) if components == 1 else GaussianMixture(2, components)
    with torch.no_grad():
        for name, parameter in base.named_parameters():
            parameter.zero_() if "mean" in name else parameter
        scale = base.state_dict()["raw_scale" if components == 1 else "raw_scales"]
        scale.fill_(torch.tensor(1.0 - 1e-3).expm1().log())  # a deviation of 1
    found = variational.measure(Flow(Composite([]), base), truth)
    # KL of centred normals in two dimensions: 2 (log(s / r) + r^2 / (2 s^2) - 1/2).
    forward, reverse = (2 * (torch.tensor(s).log() + 0.5 / s**2 - 0.5) for s in (2.0, 0.5))
    assert abs(found["kl"] - forward.item()) < 5 * found["standard_error"]
    assert abs(found["reverse_kl"] - reverse.item()) < 0.1
    # In each dimension E w^2 = 1 / (r sqrt(2 - r^2)), r = 1/2 the deviation of the truth.
    assert found["efficiency"] == pytest.approx(7 / 16, abs=0.05)
    assert found["smaller_mode"] == pytest.approx(0.5, abs=0.02)
