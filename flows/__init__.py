"""Normalizing flows built on exact rotations parametrized by angles."""

from flows import distributions, givens, householder, nets, recipes, transforms
from flows.flow import Flow, load
from flows.objectives import bits_per_dim
from flows.parametrize import orthogonal
from flows.transforms import (
    ActNorm,
    AffineCoupling,
    Composite,
    Dequantize,
    ElementwiseSpline,
    EmpiricalCDF,
    HouseholderRotation,
    Logit,
    MaskedAutoregressiveAffine,
    MaskedAutoregressiveSpline,
    Multiscale,
    Permutation,
    Rotation,
    Rotation1x1,
    SplineCoupling,
    Squeeze,
)

__version__ = "0.1.0"

__all__ = [
    "ActNorm",
    "AffineCoupling",
    "Composite",
    "Dequantize",
    "ElementwiseSpline",
    "EmpiricalCDF",
    "Flow",
    "HouseholderRotation",
    "Logit",
    "MaskedAutoregressiveAffine",
    "MaskedAutoregressiveSpline",
    "Multiscale",
    "Permutation",
    "Rotation",
    "Rotation1x1",
    "SplineCoupling",
    "Squeeze",
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
