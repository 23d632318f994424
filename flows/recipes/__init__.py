"""Whole models, composed of the layers of this library."""

from flows.recipes.gaussianization import GaussianizationFlow
from flows.recipes.glow import Glow
from flows.recipes.masked_spline import MaskedSplineFlow
from flows.recipes.rotation_spline import RotationSplineFlow
from flows.recipes.spline_coupling import SplineCouplingFlow
from flows.recipes.sylvester_vae import SylvesterVAE
from flows.recipes.volume_preserving import VolumePreservingFlow
from flows.recipes.volume_preserving_glow import VolumePreservingGlow

__all__ = [
    "GaussianizationFlow",
    "Glow",
    "MaskedSplineFlow",
    "RotationSplineFlow",
    "SplineCouplingFlow",
    "SylvesterVAE",
    "VolumePreservingFlow",
    "VolumePreservingGlow",
]
