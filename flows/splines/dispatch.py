"""The public door of ``flows.splines``: checks the arguments, chooses, calls."""

from importlib.util import find_spec

import torch
from torch import Tensor

from flows.checks import check_at_least, check_positive
from flows.splines import autograd, plain

__all__ = ["rational_quadratic_spline", "spline_parameters"]

HAS_NUMBA = find_spec("numba") is not None


def spline_parameters(bins: int) -> int:
    """Unconstrained parameters of one spline: widths, heights and the inner knots' slopes.

    Args:
        bins: Number of bins, at least 2.

    Raises:
        ValueError: If ``bins`` is below 2.

    Example:
        >>> from flows.splines import spline_parameters
        >>> spline_parameters(8)  # 8 widths, 8 heights, 7 slopes
        23
    """
    check_at_least(2, bins=bins)
    return 3 * bins - 1


def rational_quadratic_spline(
    inputs: Tensor, parameters: Tensor, *, tail_bound: float, inverse: bool = False
) -> tuple[Tensor, Tensor]:
    r"""Elementwise spline on [-B, B] with slope 1 at both ends, the identity outside.

    In a bin of width w, height h and slope m = h / w, whose left knot is :math:`(x_k, y_k)`
    and whose knots have slopes :math:`d_k, d_{k+1}`, with :math:`\xi = (x - x_k) / w`:

    .. math::
        y = y_k + h \frac{m \xi^2 + d_k \xi (1 - \xi)}
                         {m + (d_k + d_{k+1} - 2 m)\, \xi (1 - \xi)}

    All-zero parameters give the identity. Gradients outside the interval are safe: the
    spline is evaluated at the clamped input and then discarded. On the CPU, with numba,
    compiled code does the work and keeps inputs and parameters alone for the backward pass.

    Args:
        inputs: Values, any shape.
        parameters: Unconstrained, shape ``(*inputs.shape, 3 * bins - 1)`` or broadcasting to it;
            on the last axis raw widths, raw heights, raw slopes.
        tail_bound: Half-width B of the interval.
        inverse: Apply the inverse function.

    Shape:
        inputs (...), parameters (..., 3 * bins - 1), to outputs (...) and log derivatives (...)

    Returns:
        Outputs and the elementwise log derivative in nats, both of the shape of inputs.

    Raises:
        ValueError: If the shape of the parameters or ``tail_bound`` does not fit.

    Reference:
        Durkan et al. (2019), Neural Spline Flows, arXiv 1906.04032

    Example:
        >>> import torch
        >>> from flows.splines import rational_quadratic_spline, spline_parameters
        >>> x = torch.tensor([-1.0, 2.0, 9.0])
        >>> parameters = torch.randn(3, spline_parameters(bins=4))
        >>> y, log_slope = rational_quadratic_spline(x, parameters, tail_bound=5.0)
        >>> y[2].item(), log_slope[2].item()  # 9 is outside the interval
        (9.0, 0.0)
        >>> back, _ = rational_quadratic_spline(y, parameters, tail_bound=5.0, inverse=True)
        >>> torch.allclose(back, x, atol=1e-3)
        True
    """
    check_positive(tail_bound=tail_bound)
    parameters = _aligned(parameters, inputs.shape)
    dtype = torch.promote_types(inputs.dtype, parameters.dtype)
    # Half precision would lose the small bins.
    exact = dtype if dtype == torch.float64 else torch.float32
    given = inputs.to(exact), parameters.to(exact), tail_bound, inverse
    on_cpu = inputs.device.type == parameters.device.type == "cpu"
    if HAS_NUMBA and on_cpu and not torch.compiler.is_compiling():
        outputs, log_slope = autograd.spline(*given)
    else:
        outputs, log_slope = plain.spline(*given)
    return outputs.to(dtype), log_slope.to(dtype)


def _aligned(parameters: Tensor, shape: torch.Size) -> Tensor:
    """The parameters with one axis for each of the inputs, and their own."""
    *axes, count = parameters.shape or (0,)
    missing = len(shape) - len(axes)
    fit = all(n in (1, size) for n, size in zip(axes, shape[missing:], strict=False))
    if count < 5 or count % 3 != 2 or missing < 0 or not fit:
        raise ValueError(
            f"parameters must broadcast to {tuple(shape)} and, on a last axis, 3 * bins - 1 with "
            f"at least 2 bins, got {tuple(parameters.shape)}."
        )
    return parameters.reshape((1,) * missing + tuple(parameters.shape)) if missing else parameters
