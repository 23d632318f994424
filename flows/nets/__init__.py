"""Conditioners: ``Net(in_features, out_features, ...)``, called as ``net(inputs, context)``.

With ``context_features=0`` a conditioner ignores any context, so that a chain can hold layers
with and without; otherwise it insists on one of that width.
"""

from flows.nets.convnet import ConvNet
from flows.nets.mlp import MLP
from flows.nets.standardized_context import StandardizedContext

__all__ = ["MLP", "ConvNet", "StandardizedContext"]
