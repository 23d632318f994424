"""Invertible layers, each an nflows ``Transform``."""

from flows.transforms.actnorm import ActNorm
from flows.transforms.autoregressive import (
    MaskedAutoregressiveAffine,
    MaskedAutoregressiveSpline,
)
from flows.transforms.base import InputOutsideDomain, InverseNotAvailable, Transform
from flows.transforms.composite import Composite
from flows.transforms.conditional_rotation import ConditionalRotation
from flows.transforms.coupling import (
    AdditiveCoupling,
    AffineCoupling,
    Coupling,
    IncompressibleCoupling,
    SplineCoupling,
)
from flows.transforms.dequantize import Dequantize
from flows.transforms.empirical_cdf import EmpiricalCDF
from flows.transforms.householder import Householder1x1, HouseholderRotation
from flows.transforms.logit import Logit
from flows.transforms.lu_linear import LULinear
from flows.transforms.multiscale import Multiscale, Squeeze
from flows.transforms.permutation import Permutation
from flows.transforms.rotation import Rotation, Rotation1x1
from flows.transforms.rotation_coupling import RotationCoupling
from flows.transforms.spline import ElementwiseSpline
from flows.transforms.standardize import Standardize
from flows.transforms.svd_coupling import SVDCoupling
from flows.transforms.svd_linear import SVDLinear
from flows.transforms.sylvester import Sylvester
from flows.transforms.twist import Twist
from flows.transforms.variational_dequantize import VariationalDequantize

__all__ = [
    "ActNorm",
    "AdditiveCoupling",
    "AffineCoupling",
    "Composite",
    "ConditionalRotation",
    "Coupling",
    "Dequantize",
    "ElementwiseSpline",
    "EmpiricalCDF",
    "Householder1x1",
    "HouseholderRotation",
    "IncompressibleCoupling",
    "InputOutsideDomain",
    "InverseNotAvailable",
    "LULinear",
    "Logit",
    "MaskedAutoregressiveAffine",
    "MaskedAutoregressiveSpline",
    "Multiscale",
    "Permutation",
    "Rotation",
    "Rotation1x1",
    "RotationCoupling",
    "SVDCoupling",
    "SVDLinear",
    "SplineCoupling",
    "Squeeze",
    "Standardize",
    "Sylvester",
    "Transform",
    "Twist",
    "VariationalDequantize",
]
