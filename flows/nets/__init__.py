"""Conditioners: ``Net(in_features, out_features, ...)``, called as ``net(inputs, context)``."""

from flows.nets.convnet import ConvNet
from flows.nets.mlp import MLP

__all__ = ["MLP", "ConvNet"]
