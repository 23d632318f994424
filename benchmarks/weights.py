"""Orthogonal weights to compare: ours by every engine, and what others offer.

All are made in float64, so that what they hold fixed is exact in both precisions, and start at
random parameters that give matrices far from the identity: angles and reflection vectors are
standard normal, skew matrices have the norm that the logarithm of a random rotation has (the
exponential of a small matrix would be cheaper, and more exact, than in training).
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import orthogonal

from benchmarks.loop import plain_loop
from benchmarks.timing import FAILURES
from flows import givens, householder

__all__ = ["Weight", "dense", "double_by_default", "impls", "weights"]

# Schedules without a product form are for small matrices, and the definition is no engine.
ROUNDS_TO = 64
REFERENCE_TO = 12


class Weight(nn.Module):
    """An orthogonal matrix made from parameters, and its product with a batch."""

    def times(self, x: Tensor) -> Tensor:
        return x @ self().mT


class _Made(Weight):
    """The value of a function of parameters."""

    def __init__(self, make: Callable[[Tensor], Tensor], parameter: Tensor) -> None:
        super().__init__()
        self.make, self.parameter = make, nn.Parameter(parameter)

    def forward(self) -> Tensor:
        return self.make(self.parameter)


class _Parametrized(Weight):
    """The weight of a layer that has a parametrization."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.layer = layer

    def forward(self) -> Tensor:
        return self.layer.weight


class _Steps(Weight):
    """What turns a batch step by step: the matrix is what it makes of the identity."""

    def __init__(self, make: Callable[[Tensor, Tensor], Tensor], n: int, parameter: Tensor):
        super().__init__()
        self.make, self.n, self.parameter = make, n, nn.Parameter(parameter)

    def forward(self) -> Tensor:
        like = self.parameter
        return self.times(torch.eye(self.n, dtype=like.dtype, device=like.device)).mT

    def times(self, x: Tensor) -> Tensor:
        return self.make(x, self.parameter)


@contextmanager
def double_by_default() -> Iterator[None]:
    """New tensors are float64: some packages offer no other way to ask for it."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def dense(n: int, device: str) -> Weight:
    """The floor: a matrix that is its own parameter."""
    return _Made(lambda weight: weight, torch.randn(n, n, device=device) / n**0.5)


def weights(n: int, device: str) -> Iterator[tuple[str, Callable[[], Weight]]]:
    """Names and constructors of everything compared at size n, ours first.

    Call a constructor within ``double_by_default()``; it raises ImportError if the package
    behind it is not installed.
    """
    for make in (givens.crossing, givens.cosine_sine, givens.odd_even):
        if make is not givens.odd_even or n <= ROUNDS_TO:
            for impl in impls(n, device):
                yield f"{make.__name__}, {impl}", lambda m=make, i=impl: _ours(m(n), i, device)
    yield "our CWY", lambda: _Made(householder.cwy, torch.randn(n, n, device=device))
    for kind in ("matrix_exp", "cayley", "householder"):
        yield f"torch {kind}", lambda kind=kind: _torch(n, kind, device)
    for kind in ("expm", "cayley"):
        yield f"GeoTorch {kind}", lambda kind=kind: _geotorch(n, kind, device)
    yield "nflows Householder", lambda: _nflows(n, device)
    yield "loop over rounds", lambda: _loop(n, device)


def impls(n: int, device: str) -> Iterator[str]:
    """Engines that run on the device."""
    schedule = givens.crossing(2)
    for impl in givens.IMPLS:
        if impl == "reference" and n > REFERENCE_TO:
            continue
        try:
            givens.matrix(torch.zeros(1, device=device), schedule, impl=impl)
        except FAILURES:
            continue
        yield impl


def _ours(schedule: givens.Schedule, impl: str, device: str) -> Weight:
    angles = torch.randn(schedule.num_angles, device=device)
    return _Made(lambda angles: givens.matrix(angles, schedule, impl=impl), angles)


def _torch(n: int, kind: str, device: str) -> Weight:
    layer = nn.Linear(n, n, bias=False, device=device)
    orthogonal(layer, orthogonal_map=kind)
    if kind != "householder":
        return _Parametrized(_like_a_random_rotation(layer))
    with torch.no_grad():  # the diagonal holds signs, the columns below it the reflections
        vectors = torch.randn(n, n, device=device).tril(-1) / n**0.5
        layer.parametrizations.weight.original.add_(vectors)
    return _Parametrized(layer)


def _geotorch(n: int, kind: str, device: str) -> Weight:
    import geotorch

    layer = nn.Linear(n, n, bias=False, device=device)
    geotorch.orthogonal(layer, "weight", triv=kind)
    return _Parametrized(_like_a_random_rotation(layer))


def _like_a_random_rotation(layer: nn.Linear) -> nn.Linear:
    # Turns by angles uniform in (-pi, pi) have this root mean square entry in the logarithm.
    std = math.pi / (3 * len(layer.weight)) ** 0.5
    nn.init.normal_(layer.parametrizations.weight.original, std=std)
    return layer


def _nflows(n: int, device: str) -> Weight:
    from nflows.transforms.orthogonal import HouseholderSequence

    apply = HouseholderSequence._apply_transforms  # the layer itself starts at the identity
    return _Steps(lambda x, vectors: apply(x, vectors)[0], n, torch.randn(n, n, device=device))


def _loop(n: int, device: str) -> Weight:
    schedule = givens.round_robin(n)
    angles = torch.randn(schedule.num_angles, device=device)
    return _Steps(plain_loop(schedule, device), n, angles)
