"""Normalizing flows built on exact rotations parametrized by angles."""

from flows import distributions, givens, householder, nets, recipes, transforms
from flows.flow import Flow, load
from flows.objectives import bits_per_dim
from flows.parametrize import orthogonal
from flows.transforms import (
    ActNorm,
    AdditiveCoupling,
    AffineCoupling,
    Composite,
    ConditionalRotation,
    Dequantize,
    ElementwiseSpline,
    EmpiricalCDF,
    HouseholderRotation,
    IncompressibleCoupling,
    Logit,
    MaskedAutoregressiveAffine,
    MaskedAutoregressiveSpline,
    Multiscale,
    Rotation,
    Rotation1x1,
    RotationCoupling,
    SplineCoupling,
    Squeeze,
    Standardize,
    SVDCoupling,
    SVDLinear,
    Sylvester,
)

__version__ = "0.1.0"

__all__ = [
    "ActNorm",
    "AdditiveCoupling",
    "AffineCoupling",
    "Composite",
    "ConditionalRotation",
    "Dequantize",
    "ElementwiseSpline",
    "EmpiricalCDF",
    "Flow",
    "HouseholderRotation",
    "IncompressibleCoupling",
    "Logit",
    "MaskedAutoregressiveAffine",
    "MaskedAutoregressiveSpline",
    "Multiscale",
    "Rotation",
    "Rotation1x1",
    "RotationCoupling",
    "SVDCoupling",
    "SVDLinear",
    "SplineCoupling",
    "Squeeze",
    "Standardize",
    "Sylvester",
    "bits_per_dim",
    "distributions",
    "givens",
    "householder",
    "load",
    "nets",
    "orthogonal",
    "recipes",
    "transforms",
]
