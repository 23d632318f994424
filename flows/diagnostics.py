"""Is a flow what it claims to be? Its inverse, log-determinant, orthogonality and integral."""

import copy
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from nflows.transforms.base import CompositeTransform
from torch import Tensor, nn
from torch.nn.utils import parametrize

from flows.checks import check_at_least
from flows.flow import Flow
from flows.random_state import random_state, set_random_state
from flows.transforms import Composite
from flows.transforms.base import InverseNotAvailable, Transform, preserves_volume

__all__ = ["Audit", "Finding", "audit"]

# Backward passes for an exact Jacobian that nobody minds to wait for.
MOST_FEATURES = 1024
# Points of the grid along an axis, and at a time.
GRID, CHUNK = 1025, 2**16
INTEGRAL = 1e-3


@dataclass(frozen=True)
class Finding:
    """One line of an audit.

    Args:
        name: What was looked at.
        value: What came out; None where it does not apply.
        bound: What it must not exceed.
        words: What that means.

    Example:
        >>> from flows.diagnostics import Finding
        >>> Finding("inverse", value=2e-6, bound=1e-3, words="to noise and back").ok
        True
    """

    name: str
    value: float | None
    bound: float
    words: str

    @property
    def ok(self) -> bool | None:
        """Whether the value is within the bound; None where nothing was measured."""
        return None if self.value is None else self.value <= self.bound


@dataclass(frozen=True)
class Audit:
    """What :func:`audit` found; ``str()`` is a table.

    Args:
        findings: The lines.

    Example:
        >>> from flows.diagnostics import Audit, Finding
        >>> report = Audit((Finding("inverse", value=0.1, bound=1e-3, words="there and back"),))
        >>> print(report)
        inverse        FAILS  1.0e-01 <= 1e-03  there and back
        Out of bounds: inverse.
        >>> report["inverse"].value, report.ok
        (0.1, False)
    """

    findings: tuple[Finding, ...]

    @property
    def ok(self) -> bool:
        """Whether nothing that was measured is out of bounds."""
        return all(finding.ok is not False for finding in self.findings)

    def __getitem__(self, name: str) -> Finding:
        return next(finding for finding in self.findings if finding.name == name)

    def __str__(self) -> str:
        verdicts = {True: "ok", False: "FAILS", None: "-"}
        lines = []
        for finding in self.findings:
            value = bound = ""
            if finding.value is not None:
                value, bound = f"{finding.value:.1e}", f"<= {finding.bound:.0e}"
            verdict = verdicts[finding.ok]
            lines.append(f"{finding.name:14}{verdict:>6}{value:>9} {bound:9} {finding.words}")
        failed = [finding.name for finding in self.findings if finding.ok is False]
        end = f"Out of bounds: {', '.join(failed)}." if failed else "Everything is in bounds."
        return "\n".join([*lines, end])


@torch.inference_mode(False)
@torch.no_grad()
def audit(
    flow: nn.Module,
    inputs: Tensor,
    context: Tensor | None = None,
    *,
    jacobian_rows: int | None = None,
) -> Audit:
    r"""Measure whether a trained flow is what its numbers rest on.

    * ``finite``: share of inputs and samples whose values or log densities are not finite.
    * ``inverse``: largest :math:`|x - f^{-1}(f(x))|_\infty / \max(1, |x|_\infty)`; the layer that
      is worst by itself is named where that is too much.
    * ``log-det``: largest difference between the :math:`\log |\det J|` that the flow reports
      and that of autograd's Jacobian of a float64 copy, in nats per feature.
    * ``precision``: largest error of log_prob in the flow's own dtype, against the copy, in
      nats per feature.
    * ``orthogonality``: largest entry of :math:`|W^T W - I|` of rotations and of orthogonal
      weights.
    * ``integral``: :math:`|\int p - 1|` over a grid, for flows of two features; with a context
      that of the first row.

    Noise that dequantizes images is drawn once; then everything is measured from there on.
    Nothing changes in the flow, its mode and the random state included.

    Args:
        flow: A :class:`flows.Flow`, in float32 or float64. Of other models with ``log_prob``
            and ``sample`` only ``finite``, ``orthogonality`` and ``integral`` are measured.
        inputs: Some rows of data, (batch, ...), best of a test set.
        context: Their context, (batch, ...), if the flow has one.
        jacobian_rows: Rows for ``log-det``, each of as many backward passes as features. By
            default up to 8, fewer for many features, and none above 1,024.

    Shape:
        inputs (batch, ...), context (batch, ...)

    Returns:
        A report; ``print`` shows it as a table.

    Raises:
        ValueError: If there are no inputs.

    Example:
        >>> import torch
        >>> from flows import Flow, Rotation
        >>> from flows.diagnostics import audit
        >>> from flows.distributions import Normal
        >>> report = audit(Flow(Rotation(4, init="haar"), Normal(4)), torch.randn(16, 4))
        >>> report.ok, report["orthogonality"].value < 1e-5
        (True, True)
    """
    check_at_least(1, **{"len(inputs)": len(inputs)})
    if jacobian_rows is not None:
        check_at_least(0, jacobian_rows=jacobian_rows)
    inputs = inputs.clone()
    context = None if context is None else context.clone()
    modes = {module: module.training for module in flow.modules()}
    device = inputs.device
    state = random_state(device)
    try:
        flow.eval()
        findings = list(_findings(flow, inputs, context, jacobian_rows))
    finally:
        for module, training in modes.items():
            module.training = training
        set_random_state(device, state)
    return Audit(tuple(findings))


def _findings(
    flow: nn.Module, inputs: Tensor, context: Tensor | None, jacobian_rows: int | None
) -> Iterator[Finding]:
    precise = next((p.dtype for p in flow.parameters()), inputs.dtype) == torch.float64
    yield _finite(flow, inputs, context)
    if isinstance(flow, Flow):
        given = flow._embed(context)
        layers = _layers(flow.transform)
        noisy = [i for i, layer in enumerate(layers) if hasattr(layer, "grey_levels")]
        first = noisy[-1] + 1 if noisy else 0
        x, _ = Composite(layers[:first])(inputs, given)
        layers = layers[first:]
        yield _inverse(layers, x, given, 1e-8 if precise else 1e-3)
        yield from _log_dets(flow, layers, x, given, jacobian_rows, precise)
    else:
        yield Finding("inverse", None, 0.0, f"{type(flow).__name__} has no transform")
    yield _orthogonality(flow, 1e-10 if precise else 1e-5)
    if inputs.shape[1:] == (2,) and not _has_noise(flow):
        yield _integral(flow, inputs, context)


def _layers(transform: Transform) -> list[Transform]:
    """The layers of a chain, of chains in it as well."""
    if isinstance(transform, Composite):
        chain = transform.transforms
    elif isinstance(transform, CompositeTransform):
        chain = transform._transforms
    else:
        return [transform]
    return [layer for part in chain for layer in _layers(part)]


def _has_noise(flow: nn.Module) -> bool:
    return not isinstance(flow, Flow) or any(hasattr(m, "grey_levels") for m in flow.modules())


def _finite(flow: nn.Module, inputs: Tensor, context: Tensor | None) -> Finding:
    rows = min(len(inputs), 256)
    given = None if context is None else context[:rows]
    good = flow.log_prob(inputs, context).isfinite()
    words = f"log_prob of {len(inputs)} inputs"
    try:
        samples = flow.sample(rows) if given is None else flow.sample(1, given)[:, 0]
    except InverseNotAvailable:
        words += "; without an inverse there are no samples"
    else:
        found = flow.log_prob(samples.to(inputs.dtype), given).isfinite()
        good = torch.cat((good, found & samples.flatten(1).isfinite().all(1)))
        words += f", and {rows} samples with theirs"
    bad = int((~good).sum())
    if bad:
        words += f": {bad} are not finite"
    return Finding("finite", bad / len(good), 0.0, words)


def _inverse(layers: list[Transform], x: Tensor, context: Tensor | None, bound: float) -> Finding:
    chain = Composite(layers)
    z, _ = chain(x, context)
    try:
        back, _ = chain.inverse(z, context)
    except InverseNotAvailable:
        return Finding("inverse", None, bound, "a layer has none")
    error = _relative(back, x)
    words = f"{len(x)} inputs to noise and back"
    if not error <= bound:
        words += f"; {_worst(layers, x, context)}"
    return Finding("inverse", error, bound, words)


def _worst(layers: list[Transform], x: Tensor, context: Tensor | None) -> str:
    errors = []
    for layer in layers:
        y, _ = layer(x, context)
        errors.append(_relative(layer.inverse(y, context)[0], x))
        x = y
    where = max(range(len(layers)), key=errors.__getitem__)
    return f"worst by itself layer {where}, {type(layers[where]).__name__}: {errors[where]:.1e}"


def _relative(found: Tensor, expected: Tensor) -> float:
    """The largest error, in units of a row's largest entry or 1."""
    unit = expected.flatten(1).abs().amax(1).clamp_min(1)
    return _largest((found - expected).flatten(1).abs().amax(1) / unit)


def _log_dets(
    flow: Flow,
    layers: list[Transform],
    x: Tensor,
    context: Tensor | None,
    rows: int | None,
    precise: bool,
) -> Iterator[Finding]:
    """The finding on the log-det and, below float64, that on precision."""
    features = x[0].numel()
    if rows is None:
        rows = 0 if features > MOST_FEATURES else max(1, min(8, 2048 // features))
    if rows == 0:
        words = f"not measured: {features} features; jacobian_rows=1 takes as many backward passes"
        yield Finding("log-det", None, 0.0, words)
    else:
        few = x[:rows].double()
        given = None if context is None else _double(context[:rows])
        exact = copy.deepcopy(nn.ModuleList(layers)).double()
        found, expected = _log_dets_of(Composite(exact), few, given)
        error = _largest(found - expected) / features
        words = f"against autograd's Jacobian, {len(few)} rows in float64, nats per feature"
        yield Finding("log-det", error, 1e-6, words)
    if not precise:
        here = nn.ModuleList([*layers, flow.distribution])
        exact = copy.deepcopy(here).double()
        log_prob = _log_prob(here, x, context)
        right = _log_prob(exact, x.double(), _double(context))
        error = _largest(log_prob.double() - right) / features
        words = f"log_prob of {len(x)} inputs in {x.dtype}, nats per feature".replace("torch.", "")
        yield Finding("precision", error, 1e-3, words)


def _log_prob(flow: nn.ModuleList, x: Tensor, context: Tensor | None) -> Tensor:
    *layers, distribution = flow
    z, logabsdet = Composite(layers)(x, context)
    return distribution.log_prob(z, context) + logabsdet


def _log_dets_of(transform: Transform, x: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
    """The log-det that a transform reports, and that of its Jacobian; (rows,) each."""
    with torch.enable_grad():
        x = x.requires_grad_()
        z, logabsdet = transform(x, context)
        z = z.flatten(1)
        # A row of z depends on its own row of x alone.
        rows = [
            torch.autograd.grad(z[:, i].sum(), x, retain_graph=True)[0].flatten(1)
            for i in range(z.shape[1])
        ]
    return logabsdet.detach(), torch.stack(rows, 1).slogdet().logabsdet


def _double(context: Tensor | None) -> Tensor | None:
    floating = context is not None and context.is_floating_point()
    return context.double() if floating else context


def _orthogonality(flow: nn.Module, bound: float) -> Finding:
    matrices = [
        module.matrix()
        for module in flow.modules()
        if isinstance(module, Transform) and hasattr(module, "matrix") and preserves_volume(module)
    ]
    for module in flow.modules():
        if parametrize.is_parametrized(module):
            matrices += [
                getattr(module, name)
                for name, chain in module.parametrizations.items()
                if any(type(part).__module__ == "flows.parametrize" for part in chain)
            ]
    if not matrices:
        return Finding("orthogonality", None, bound, "no layer is a rotation")
    error = max(_off_orthogonal(matrix) for matrix in matrices)
    return Finding("orthogonality", error, bound, f"W^T W - I of {len(matrices)} rotations")


def _off_orthogonal(matrix: Tensor) -> float:
    w = matrix.detach().double().flatten(1)  # of a convolution, too
    w = w if w.shape[-2] >= w.shape[-1] else w.mT
    return _largest(w.mT @ w - torch.eye(w.shape[-1], dtype=w.dtype, device=w.device))


def _integral(flow: Flow, inputs: Tensor, context: Tensor | None) -> Finding:
    """By the trapezoidal rule over a box around all samples, on two grids."""
    given = None if context is None else context[:1]
    try:
        samples = flow.sample(10_000, given).reshape(-1, 2).to(inputs)
    except InverseNotAvailable:
        words = "not measured: samples, of which there are none, say where to look"
        return Finding("integral", None, INTEGRAL, words)
    low, high = samples.min(0).values, samples.max(0).values
    margin = 0.5 * (high - low)
    x, y = (
        torch.linspace(a, b, GRID, dtype=inputs.dtype, device=inputs.device)
        for a, b in zip((low - margin).tolist(), (high + margin).tolist(), strict=True)
    )
    density = []
    for points in torch.cartesian_prod(x, y).split(CHUNK):
        rows = None if given is None else given.expand(len(points), *given.shape[1:])
        density.append(flow.log_prob(points, rows).double().exp())
    density = torch.cat(density).view(GRID, GRID)
    x, y = x.double(), y.double()
    coarse, fine = (
        torch.trapezoid(torch.trapezoid(density[::n, ::n], y[::n]), x[::n]).item() for n in (2, 1)
    )
    words = f"of the density over a grid of {GRID} x {GRID} is {fine:.5f}"
    if abs(fine - coarse) > INTEGRAL:
        words += f", of {GRID // 2 + 1} x {GRID // 2 + 1} {coarse:.5f}: too coarse to tell"
        return Finding("integral", None, INTEGRAL, words)
    return Finding("integral", math.inf if math.isnan(fine) else abs(fine - 1), INTEGRAL, words)


def _largest(values: Tensor) -> float:
    error = values.abs().max().item() if values.numel() else 0.0
    return math.inf if math.isnan(error) else error
