"""Grey levels of pixels as a mixture of logistics, integrated over the bins."""

import math

import torch
from torch import Tensor
from torch.nn import functional

__all__ = ["discretized_logistic_log_prob", "discretized_logistic_sample", "logistic_parameters"]

# Parameters per pixel and component: logit of the weight, mean, raw scale.
PER_COMPONENT = 3
# Narrowest logistic, in bins: far narrower than a bin it could not learn where to go.
MIN_SCALE = 0.02


def logistic_parameters(components: int) -> int:
    """Unconstrained parameters of one pixel."""
    return PER_COMPONENT * components


def discretized_logistic_log_prob(inputs: Tensor, parameters: Tensor, grey_levels: int) -> Tensor:
    r"""Log-probability of every pixel's grey level.

    A pixel :math:`x = k / L` stands for the bin [k, k + 1) / L, of probability

    .. math::
        P(k) = \sum_c w_c \left[\sigma\!\left(\frac{(k + 1)/L - \mu_c}{s_c}\right)
                              - \sigma\!\left(\frac{k/L - \mu_c}{s_c}\right)\right]

    where the first bin reaches to minus infinity and the last to infinity, so that the L
    probabilities add up to one.

    Args:
        inputs: Pixels k / L, shape (batch, ...).
        parameters: Unconstrained, shape (batch, 3 * components, ...); all zero means equal
            logistics in the middle, a quarter of the range wide.
        grey_levels: L.

    Returns:
        Nats per pixel, of the shape of inputs.

    Reference:
        Salimans et al. (2017), PixelCNN++, arXiv 1701.05517
    """
    log_weight, mean, scale = _split(parameters, grey_levels)
    x = inputs.unsqueeze(1)
    above, below = (x + 1 / grey_levels - mean) / scale, (x - mean) / scale
    # sigma(b) - sigma(a) = sigma(b) sigma(-a) (1 - exp(a - b)), which loses no digits.
    width = torch.log(-torch.expm1(-1 / (grey_levels * scale)))
    first, last = x < 0.5 / grey_levels, x > 1 - 1.5 / grey_levels
    mass = functional.logsigmoid(above).masked_fill(last, 0.0)
    mass = mass + functional.logsigmoid(-below).masked_fill(first, 0.0)
    mass = mass + torch.where(first | last, 0.0, width)
    return torch.logsumexp(log_weight + mass, dim=1)


def discretized_logistic_sample(
    parameters: Tensor, grey_levels: int, *, temperature: float = 1.0
) -> Tensor:
    """Pixels k / L, shape (batch, ...), for parameters (batch, 3 * components, ...).

    ``temperature`` multiplies the scale of the logistics.
    """
    log_weight, mean, scale = _split(parameters, grey_levels)
    # The largest of log weight + Gumbel noise is component c with probability w_c.
    gumbel = -torch.empty_like(mean).exponential_().log()
    chosen = (log_weight + gumbel).argmax(1, keepdim=True)
    mean, scale = mean.gather(1, chosen).squeeze(1), scale.gather(1, chosen).squeeze(1)
    eps = torch.finfo(mean.dtype).eps
    uniform = torch.rand_like(mean).clamp(eps, 1 - eps)
    values = mean + temperature * scale * torch.logit(uniform)
    return (values * grey_levels).floor().clamp(0, grey_levels - 1) / grey_levels


def _split(parameters: Tensor, grey_levels: int) -> tuple[Tensor, Tensor, Tensor]:
    """Log weights, means and scales, each (batch, components, ...)."""
    logits, mean, raw = parameters.unflatten(1, (PER_COMPONENT, -1)).unbind(1)
    # softplus(0 + offset) = 1/4.
    offset = math.log(math.expm1(0.25))
    scale = functional.softplus(raw + offset) + MIN_SCALE / grey_levels
    return logits.log_softmax(1), 0.5 + mean, scale
