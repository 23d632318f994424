"""Optimizers that see a layer's weight as a matrix, for conditioners of flows and other networks."""

from flows.optim.layers import param_groups_for
from flows.optim.ngplus import NGPlus

__all__ = ["NGPlus", "param_groups_for"]
