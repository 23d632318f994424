"""Invertible layers, each an nflows ``Transform``."""

from flows.transforms.actnorm import ActNorm
from flows.transforms.autoregressive import (
    MaskedAutoregressiveAffine,
    MaskedAutoregressiveSpline,
)
from flows.transforms.base import InputOutsideDomain, InverseNotAvailable, Transform
from flows.transforms.composite import Composite
from flows.transforms.coupling import AffineCoupling, Coupling, SplineCoupling
from flows.transforms.dequantize import Dequantize
from flows.transforms.empirical_cdf import EmpiricalCDF
from flows.transforms.householder import HouseholderRotation
from flows.transforms.logit import Logit
from flows.transforms.multiscale import Multiscale, Squeeze
from flows.transforms.permutation import Permutation
from flows.transforms.rotation import Rotation, Rotation1x1
from flows.transforms.spline import ElementwiseSpline

__all__ = [
    "ActNorm",
    "AffineCoupling",
    "Composite",
    "Coupling",
    "Dequantize",
    "ElementwiseSpline",
    "EmpiricalCDF",
    "HouseholderRotation",
    "InputOutsideDomain",
    "InverseNotAvailable",
    "Logit",
    "MaskedAutoregressiveAffine",
    "MaskedAutoregressiveSpline",
    "Multiscale",
    "Permutation",
    "Rotation",
    "Rotation1x1",
    "SplineCoupling",
    "Squeeze",
    "Transform",
]
