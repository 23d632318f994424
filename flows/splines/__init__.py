"""Rational-quadratic splines: plain functions on tensors."""

from flows.splines.dispatch import rational_quadratic_spline, spline_parameters

__all__ = ["rational_quadratic_spline", "spline_parameters"]
