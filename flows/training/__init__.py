"""Training with Lightning; ``import flows`` does not load this package."""

from flows.training.averaging import ParameterAverage
from flows.training.callbacks import BatchSeed, Recorder
from flows.training.module import DensityEstimator
from flows.training.recenter import Recenter
from flows.training.stopping import Patience

__all__ = [
    "BatchSeed",
    "DensityEstimator",
    "ParameterAverage",
    "Patience",
    "Recenter",
    "Recorder",
]
