"""Every test starts from the same seed and reaches no network."""

import importlib
import os

import pytest
import torch
from torch.distributions import Distribution, transforms

os.environ.setdefault("WANDB_MODE", "offline")


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture
def undrawn(monkeypatch):
    """Runs end without pictures and report, which take longer than a few steps of training."""
    from flows.training import run

    monkeypatch.setattr(run, "draw_if_possible", lambda flow, data, split: ("", None))
    monkeypatch.setattr(run, "publish", lambda trainer, pictures: None)
    monkeypatch.setattr(run, "write_report", lambda folder, rows, summary: None)


@pytest.fixture
def zuko():
    """zuko; what its import changes in torch is put back for the other tests."""
    inverse = transforms._InverseTransform
    before = Distribution._validate_args, Distribution.arg_constraints, inverse.__name__
    module = importlib.import_module("zuko")
    Distribution._validate_args, Distribution.arg_constraints = False, {}
    yield module
    Distribution._validate_args, Distribution.arg_constraints, inverse.__name__ = before
