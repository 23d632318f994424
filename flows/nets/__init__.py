"""Conditioners: ``Net(in_features, out_features, ...)``, called as ``net(inputs, context)``.

That of autoregressive layers is :class:`MADE`, which has so many outputs for each feature.

With ``context_features=0`` a conditioner ignores any context, so that a chain can hold layers
with and without; otherwise it insists on one of that width.
"""

from flows.nets.autoencoder import ConvDecoder, ConvEncoder
from flows.nets.convnet import ConvNet
from flows.nets.hats import Hats
from flows.nets.labels import OneHot
from flows.nets.made import MADE
from flows.nets.mlp import MLP
from flows.nets.randomized import randomize
from flows.nets.standardized_context import StandardizedContext

__all__ = [
    "MADE",
    "MLP",
    "ConvDecoder",
    "ConvEncoder",
    "ConvNet",
    "Hats",
    "OneHot",
    "StandardizedContext",
    "randomize",
]
