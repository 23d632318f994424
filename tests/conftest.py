"""Every test starts from the same seed and reaches no network."""

import os

import pytest
import torch

os.environ.setdefault("WANDB_MODE", "offline")


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
