"""Base distributions: ``log_prob`` and ``sample``, on the module's device and in its dtype."""

from flows.distributions.base import Distribution
from flows.distributions.diagonal_normal import DiagonalNormal
from flows.distributions.logistic import Logistic
from flows.distributions.mixture import GaussianMixture
from flows.distributions.normal import Normal
from flows.distributions.uniform import Uniform

__all__ = [
    "DiagonalNormal",
    "Distribution",
    "GaussianMixture",
    "Logistic",
    "Normal",
    "Uniform",
]
