"""Flows as programs that run without this library: ``torch.export`` and ONNX.

A program takes any number of rows. It is made of a copy of the flow for inference, in which
matrices that depend on parameters alone, such as those of rotations, are computed once.
"""

import copy
import math
import warnings
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.nn.utils import parametrize

from flows.distributions import Distribution
from flows.flow import Flow
from flows.transforms import (
    Householder1x1,
    HouseholderRotation,
    LULinear,
    Rotation,
    Rotation1x1,
)
from flows.transforms.base import Transform, check_features, preserves_volume

__all__ = ["freeze", "log_prob", "sampler", "save_onnx"]

# Rows of the examples that are traced. The program is that of any number of rows, but tracing
# one or none would take their number for a constant.
ROWS = 3

# Layers W x whose W depends on parameters alone, and those of them that act on the last axis.
LINEAR = (Rotation, Rotation1x1, HouseholderRotation, Householder1x1, LULinear)
LAST_AXIS = (Rotation, HouseholderRotation)


def freeze(flow: nn.Module) -> nn.Module:
    r"""A copy for inference: in eval mode, without gradients, with linear layers computed.

    The matrices W and :math:`W^{-1}` of every :class:`~flows.Rotation`,
    :class:`~flows.HouseholderRotation`, :class:`~flows.LULinear` and their kin for images are
    computed once, in float64, and kept in the flow's dtype; weights that
    :func:`~flows.orthogonal` keeps orthogonal become plain ones. Sampling and densities are then
    faster, most of all for few rows. The copy cannot be trained, and its ``state_dict`` is not
    that of ``flow``.

    Args:
        flow: A flow, or any other module with such layers; it stays as it is.

    Example:
        >>> import torch
        >>> from flows import export
        >>> from flows.recipes import RotationSplineFlow
        >>> flow = RotationSplineFlow(2, layers=1).eval()
        >>> x = torch.randn(3, 2)
        >>> torch.allclose(export.freeze(flow).log_prob(x), flow.log_prob(x), atol=1e-5)
        True
    """
    frozen = copy.deepcopy(flow)
    for module in list(frozen.modules()):
        if parametrize.is_parametrized(module):
            _make_plain(module)
    return _with_fixed_matrices(frozen, {}).eval().requires_grad_(False)


def log_prob(flow: nn.Module, inputs: Tensor, context: Tensor | None = None) -> ExportedProgram:
    r"""``flow.log_prob`` as a program: inputs, or inputs and context, to (batch,) in nats.

    ``program.module()`` is a module that is called as ``module(inputs)`` or, if the example has
    a context, ``module(inputs, context)``, with any number of rows; ``torch.export.save`` writes
    the program. Flows that dequantize draw noise from torch's generator, as they do by
    themselves. Inputs outside the unit interval, and labels out of range, raise RuntimeError.

    Args:
        flow: A flow, or another model whose ``forward`` is ``log_prob``.
        inputs: An example, (batch, ...): its shape, dtype and device count.
        context: An example, (batch, ...), for a conditional flow.

    Shape:
        inputs (batch, ...), context (batch, ...); the program's log_prob (batch,), in nats

    Raises:
        ValueError: If the examples hold no rows.

    Example:
        >>> import torch
        >>> from flows import export
        >>> from flows.recipes import GaussianizationFlow
        >>> flow = GaussianizationFlow(2, layers=1).eval()
        >>> program = export.log_prob(flow, torch.zeros(1, 2))
        >>> x = torch.randn(5, 2)
        >>> torch.allclose(program.module()(x), flow(x), atol=1e-5)
        True
    """
    return _exported(freeze(flow), _examples(inputs=inputs, context=context))


def sampler(flow: Flow, context: Tensor | None = None) -> ExportedProgram:
    r"""Samples as a program: noise, or noise and context, to samples.

    ``program.module()`` is a module that is called as ``module(noise)`` or
    ``module(noise, context)``. Noise is what the base distribution makes, a row per sample:
    ``flow.distribution.sample(n)``, which for a :class:`~flows.distributions.Normal` are
    standard normal numbers. The same noise gives the same samples.

    Flows whose inverse takes features one by one, :class:`~flows.recipes.MaskedSplineFlow` and
    :class:`~flows.Sylvester` layers, become programs that grow with their number.

    Args:
        flow: A flow with our base distributions.
        context: An example, (batch, ...), for a conditional flow.

    Shape:
        noise (batch, ...), as the base distribution makes it, and context (batch, ...) to
        samples (batch, ...)

    Raises:
        ValueError: If it is no :class:`~flows.Flow` with one of our base distributions, or the
            example holds no rows.
        InverseNotAvailable: If a layer has no inverse.

    Example:
        >>> import torch
        >>> from flows import export
        >>> from flows.recipes import GaussianizationFlow
        >>> flow = GaussianizationFlow(2, layers=1).eval()
        >>> export.sampler(flow).module()(torch.randn(5, 2)).shape
        torch.Size([5, 2])
    """
    return _exported(*_sampler_and_examples(flow, context))


def save_onnx(flow: Flow, path: str | Path, context: Tensor | None = None) -> None:
    """The program of :func:`sampler` as an ONNX file: ``noise``, ``context`` to ``samples``.

    Args:
        flow: As in :func:`sampler`.
        path: The file to write.
        context: As in :func:`sampler`.

    Shape:
        As in :func:`sampler`; the file takes any batch.

    Raises:
        ValueError: As :func:`sampler`, or if a layer does what ONNX has no operator for.
        ImportError: Without the packages onnx and onnxscript.

    Example:
        >>> import os, tempfile
        >>> from flows import export
        >>> from flows.recipes import GaussianizationFlow
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = os.path.join(folder, "sampler.onnx")
        ...     export.save_onnx(GaussianizationFlow(2, layers=1, bins=3), path)
        ...     os.listdir(folder)
        ['sampler.onnx']
    """
    if not (find_spec("onnx") and find_spec("onnxscript")):
        raise ImportError(
            "ONNX files need the onnx and onnxscript packages: pip install 'givens-flows[export]'"
        )
    module, examples = _sampler_and_examples(flow, context)
    with warnings.catch_warnings():
        # Of torch about itself, and about rows of noise and of context being as many.
        warnings.filterwarnings("ignore", message=".*isinstance\\(treespec, LeafSpec\\)")
        warnings.filterwarnings("ignore", message=".*The axis name: rows will not be used")
        try:
            torch.onnx.export(
                module,
                tuple(examples.values()),
                Path(path).expanduser(),
                input_names=list(examples),
                output_names=["samples"],
                dynamic_shapes=_free_rows(examples),
                external_data=False,
                verbose=False,
            )
        except torch.onnx.OnnxExporterError as error:
            reason = str(error.__cause__ or error).split("\n")[0]
            raise ValueError(f"this flow has no ONNX form: {reason}") from error


class _Sampler(nn.Module):
    """Samples from noise."""

    def __init__(self, flow: Flow) -> None:
        super().__init__()
        self.transform = flow.transform
        self.embedding_net = flow.embedding_net

    def forward(self, noise: Tensor, context: Tensor | None = None) -> Tensor:
        context = None if context is None else self.embedding_net(context)
        return self.transform.inverse(noise, context)[0]


def _sampler_and_examples(
    flow: Flow, context: Tensor | None
) -> tuple[nn.Module, dict[str, Tensor]]:
    if not (isinstance(flow, Flow) and isinstance(flow.distribution, Distribution)):
        kind = type(getattr(flow, "distribution", flow)).__name__
        raise ValueError(f"a sampler needs a Flow with one of our distributions, got {kind}.")
    anchor = flow.distribution.anchor
    noise = anchor.new_zeros(1, *flow.distribution.shape)
    return _Sampler(freeze(flow)).eval(), _examples(noise=noise, context=context)


def _examples(**tensors: Tensor | None) -> dict[str, Tensor]:
    """Rows to trace, of what is given."""
    examples = {name: value for name, value in tensors.items() if value is not None}
    for name, value in examples.items():
        if value.ndim == 0 or value.shape[0] == 0:
            raise ValueError(f"{name} must hold at least one row, got {tuple(value.shape)}.")
        examples[name] = value[:1].detach().repeat_interleave(ROWS, dim=0)
    return examples


def _free_rows(examples: dict[str, Tensor]) -> tuple[dict[int, object], ...]:
    """Says that all the examples may have any number of rows, the same for all."""
    rows = Dim("rows")
    return tuple({0: rows} for _ in examples)


def _exported(module: nn.Module, examples: dict[str, Tensor]) -> ExportedProgram:
    return torch.export.export(
        module, tuple(examples.values()), dynamic_shapes=_free_rows(examples)
    )


def _make_plain(module: nn.Module) -> None:
    """Make parametrized weights plain parameters."""
    weights = {name: getattr(module, name).detach().clone() for name in module.parametrizations}
    # Torch's remove_parametrizations changes the class, which a copy shares with the original.
    module.__class__ = parametrize.type_before_parametrizations(module)
    del module.parametrizations
    for name, weight in weights.items():
        module.register_parameter(name, nn.Parameter(weight))


def _with_fixed_matrices(module: nn.Module | None, done: dict[int, nn.Module]) -> nn.Module | None:
    """The module with its linear layers replaced, in place; shared ones stay shared."""
    if module is None:  # such as a conditioner that is not there
        return None
    if type(module) in LINEAR:  # a subclass may do more
        if id(module) not in done:
            done[id(module)] = _FixedLinear(module)
        return done[id(module)]
    # Unlike named_children() this names a shared child every time.
    for name, child in module._modules.items():
        setattr(module, name, _with_fixed_matrices(child, done))
    return module


class _FixedLinear(Transform):
    """What a linear layer does, with its matrix and the inverse as buffers."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        with torch.no_grad():
            dtype = layer.matrix().dtype
            weight = copy.deepcopy(layer).double().matrix()
            inverse = weight.inverse()
            volume = 0.0 if preserves_volume(layer) else weight.slogdet()[1].item()
        self.register_buffer("weight", weight.to(dtype).contiguous())
        self.register_buffer("inverse_weight", inverse.to(dtype).contiguous())
        self.log_volume = volume
        self.volume_preserving = preserves_volume(layer)
        self.axis = -1 if isinstance(layer, LAST_AXIS) else 1

    def forward(self, inputs: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self._mix(inputs, self.weight, self.log_volume)

    def inverse(self, inputs: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self._mix(inputs, self.inverse_weight, -self.log_volume)

    def _mix(self, inputs: Tensor, weight: Tensor, log_volume: float) -> tuple[Tensor, Tensor]:
        check_features(inputs, len(weight), axis=self.axis)
        rows = inputs.movedim(self.axis, -1)
        outputs = (rows @ weight.mT.to(inputs.dtype)).movedim(-1, self.axis)
        positions = math.prod(inputs.shape[2:])
        return outputs, inputs.new_full((inputs.shape[0],), positions * log_volume)

    def extra_repr(self) -> str:
        return f"features={len(self.weight)}"
