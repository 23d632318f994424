"""Optimizers that see weights as matrices, for conditioners of flows and other networks."""

from flows.optim.layers import param_groups_for
from flows.optim.ngplus import NGPlus
from flows.optim.proxprop import ProxProp
from flows.optim.seng import SENG

__all__ = ["NGPlus", "ProxProp", "SENG", "param_groups_for"]
