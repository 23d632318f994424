"""Training with Lightning; ``import flows`` does not load this package."""

from flows.training.callbacks import EpochSeed, Recorder
from flows.training.module import DensityEstimator

__all__ = ["DensityEstimator", "EpochSeed", "Recorder"]
