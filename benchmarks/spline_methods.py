"""Rational-quadratic splines to compare, as bare functions and in layers: ours, nflows, zuko.

All take the same inputs and have parameters of the same sizes; coupling layers have the same
conditioner. zuko is imported when its turn comes: that changes torch.distributions for the
process, which no other method uses.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from flows.nets import MLP
from flows.splines import plain, rational_quadratic_spline
from flows.transforms import ElementwiseSpline, SplineCoupling

__all__ = ["KINDS", "OURS", "PLAIN", "Method", "methods"]

BOUND = 5.0
HIDDEN = 64
OURS, PLAIN = "ours", "ours, plain"
KINDS = {
    "own": "a spline for each number",
    "shared": "elementwise layer",
    "coupling": "coupling layer with MLP",
}

Map = Callable[[Tensor], tuple[Tensor, Tensor]]


class Method(NamedTuple):
    """A map and its inverse, each to values and log derivatives, and what they learn."""

    forward: Map
    inverse: Map
    parameters: list[Tensor]


def methods(
    kind: str, shape: tuple[int, ...], bins: int, device: str
) -> dict[str, Callable[[], Method]]:
    """Names to functions that make the methods; a missing package shows when they are called."""
    make = {"own": _own, "shared": _shared, "coupling": _coupling}[kind]
    return make(shape, bins, device)


# --- a spline for each number -------------------------------------------------------------------


def _own(shape: tuple[int, ...], bins: int, device: str) -> dict[str, Callable[[], Method]]:
    batch, features, *positions = shape
    count = 3 * bins - 1
    generator = torch.Generator().manual_seed(0)
    raw = torch.randn(batch, count * features, *positions, generator=generator).to(device)

    def leaf() -> Tensor:
        return raw.clone().requires_grad_()

    def ours(function: Callable) -> Method:
        # Laid out as our coupling layers do: a number of all features, then the next.
        parameters = leaf()

        def apply(x: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
            rows = parameters.unflatten(1, (count, features)).movedim(1, -1)
            return function(x, rows, tail_bound=BOUND, inverse=inverse)

        return Method(partial(apply, inverse=False), partial(apply, inverse=True), [parameters])

    def nflows() -> Method:
        from nflows.transforms.splines import unconstrained_rational_quadratic_spline

        parameters = leaf()

        def apply(x: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
            rows = parameters.unflatten(1, (features, count)).movedim(2, -1)
            widths, heights, slopes = rows.split([bins, bins, bins - 1], dim=-1)
            return unconstrained_rational_quadratic_spline(
                x, widths, heights, slopes, inverse=inverse, tail_bound=BOUND
            )

        return Method(partial(apply, inverse=False), partial(apply, inverse=True), [parameters])

    def zuko() -> Method:
        parameters = leaf()
        make = _zuko_spline(bins)

        def spline() -> object:
            return make(parameters.unflatten(1, (features, count)).movedim(2, -1))

        return Method(
            lambda x: spline().call_and_ladj(x),
            lambda y: spline().inv.call_and_ladj(y),
            [parameters],
        )

    return {
        OURS: lambda: ours(rational_quadratic_spline),
        PLAIN: lambda: ours(plain.spline),
        "nflows": nflows,
        "zuko": zuko,
    }


# --- layers -------------------------------------------------------------------------------------


def _shared(shape: tuple[int, ...], bins: int, device: str) -> dict[str, Callable[[], Method]]:
    features = shape[1]

    def nflows() -> Method:
        from nflows.transforms import PiecewiseRationalQuadraticCDF

        layer = PiecewiseRationalQuadraticCDF(
            features, num_bins=bins, tails="linear", tail_bound=BOUND
        )
        return _layer(layer, device)

    def zuko() -> Method:
        import zuko

        make = _zuko_spline(bins)
        raw = nn.Parameter(0.3 * torch.randn(features, 3 * bins - 1, device=device))

        def transform() -> object:
            return zuko.transforms.DependentTransform(make(raw), 1)

        return Method(
            lambda x: transform().call_and_ladj(x),
            lambda y: transform().inv.call_and_ladj(y),
            [raw],
        )

    ours = {OURS: lambda: _layer(ElementwiseSpline(features, bins=bins, tail_bound=BOUND), device)}
    return ours | {"nflows": nflows, "zuko": zuko}


def _coupling(shape: tuple[int, ...], bins: int, device: str) -> dict[str, Callable[[], Method]]:
    features = shape[1]
    kept = torch.arange(features) < features // 2

    def nflows() -> Method:
        from nflows.transforms import PiecewiseRationalQuadraticCouplingTransform

        def net(in_features: int, out_features: int) -> MLP:
            made = MLP(in_features, out_features, hidden_features=HIDDEN)
            made.hidden_features = HIDDEN  # by which nflows divides what goes into the softmax
            return made

        layer = PiecewiseRationalQuadraticCouplingTransform(
            ~kept, net, num_bins=bins, tails="linear", tail_bound=BOUND
        )
        return _layer(layer, device)

    def zuko() -> Method:
        import zuko

        make, moved = _zuko_spline(bins), features - features // 2
        net = _learned(
            MLP(features // 2, moved * (3 * bins - 1), hidden_features=HIDDEN).to(device)
        )

        def splines(x: Tensor) -> object:
            return zuko.transforms.DependentTransform(make(net(x).unflatten(-1, (moved, -1))), 1)

        layer = zuko.transforms.CouplingTransform(splines, kept.to(device))
        return Method(layer.call_and_ladj, layer.inv.call_and_ladj, list(net.parameters()))

    def ours() -> Method:
        net = partial(MLP, hidden_features=HIDDEN)
        return _layer(SplineCoupling(features, net, bins=bins, tail_bound=BOUND), device)

    return {OURS: ours, "nflows": nflows, "zuko": zuko}


def _layer(layer: nn.Module, device: str) -> Method:
    _learned(layer.to(device))
    return Method(layer, layer.inverse, list(layer.parameters()))


def _learned(module: nn.Module) -> nn.Module:
    """With parameters that do not make the identity."""
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3)
    return module


def _zuko_spline(bins: int) -> Callable[[Tensor], object]:
    from zuko.transforms import MonotonicRQSTransform

    def make(rows: Tensor) -> object:
        return MonotonicRQSTransform(*rows.split([bins, bins, bins - 1], dim=-1), bound=BOUND)

    return make
