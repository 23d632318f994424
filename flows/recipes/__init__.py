"""Whole models, composed of the layers of this library."""

from flows.recipes.glow import Glow
from flows.recipes.rotation_spline import RotationSplineFlow
from flows.recipes.sylvester_vae import SylvesterVAE

__all__ = ["Glow", "RotationSplineFlow", "SylvesterVAE"]
