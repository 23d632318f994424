"""Normalizing flows built on exact rotations parametrized by angles."""

from flows import distributions, givens, nets, recipes, transforms
from flows.flow import Flow, load
from flows.objectives import bits_per_dim
from flows.transforms import (
    ActNorm,
    AffineCoupling,
    Composite,
    Dequantize,
    ElementwiseSpline,
    EmpiricalCDF,
    Logit,
    Multiscale,
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
    "Logit",
    "Multiscale",
    "Rotation",
    "Rotation1x1",
    "SplineCoupling",
    "Squeeze",
    "bits_per_dim",
    "distributions",
    "givens",
    "load",
    "nets",
    "recipes",
    "transforms",
]
