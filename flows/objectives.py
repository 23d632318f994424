r"""What training minimizes or maximizes, and the units it is reported in.

Beside the likelihood of data there are bounds of :math:`\log Z`, :math:`Z = \int p(x)\,dx`,
where only the unnormalized density p is known: to maximize one is to fit the flow to p without
data.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from flows.checks import check_at_least
from flows.flow import Flow

__all__ = [
    "bits_per_dim",
    "effective_sample_size",
    "elbo",
    "importance_sample",
    "iwae",
    "selbo",
    "siwae",
]


def bits_per_dim(log_prob: Tensor | float, dims: int, *, bits: float = 8) -> Tensor:
    r"""Bits per dimension of n-bit data: :math:`-\log p(x) / (D \ln 2) + n`.

    ``log_prob`` is the log density, in nats per sample, of the dequantized data scaled to
    [0, 1]; it contains the log-dets of every step from there on (logit, CDF, ...).

    Args:
        log_prob: Any shape, nats.
        dims: D, the number of values of one sample, channels included.
        bits: n, the logarithm to base 2 of the number of levels; 8 for 8-bit images.

    Shape:
        (...) to (...)

    Raises:
        ValueError: If ``dims`` or ``bits`` is not positive, or ``log_prob`` holds a NaN:
            dropping it would flatter the result.

    Example:
        >>> from flows import bits_per_dim
        >>> bits_per_dim(0.0, 784)  # the uniform density on [0, 1]
        tensor(8.)
    """
    if dims < 1 or not bits > 0:
        raise ValueError(f"dims and bits must be positive, got {dims} and {bits}.")
    log_prob = torch.as_tensor(log_prob)
    if log_prob.isnan().any():
        raise ValueError(f"log_prob holds {int(log_prob.isnan().sum())} NaN.")
    return bits - log_prob / (dims * math.log(2))


def elbo(
    log_target: Callable[..., Tensor],
    flow: Flow,
    num_samples: int = 1,
    *,
    context: Tensor | None = None,
    repeats: int | None = None,
) -> Tensor:
    r"""Evidence lower bound :math:`E_q[\log p(x) - \log q(x)] \le \log Z`, q the flow's law.

    The estimate is the mean over ``num_samples`` draws. It falls short of :math:`\log Z` by the
    reverse divergence KL(q, p), so to ascend its gradient is to train by reverse KL: the flow
    avoids what p does not have, and may miss modes that p has. The weights of a mixture base
    get no gradient from draws, but noise of mean zero: use :func:`selbo` or :func:`siwae`.

    Args:
        log_target: :math:`\log p`, known up to a constant, called as ``log_target(x)``, or
            ``log_target(x, context)`` where there is a context, with samples x (n, ...) and a
            row of context for each. Returns n numbers, -inf where p is zero.
        flow: A Flow whose transform has an inverse and whose base can be sampled with
            gradients, as all of :mod:`flows.distributions` can.
        num_samples: Draws of one bound.
        context: Rows to be given to flow and target, each of which has a bound of its own.
        repeats: Without a context, how many independent estimates to return; None for one.

    Shape:
        () for ``repeats`` None, else (repeats,); with context (rows,); nats

    Raises:
        ValueError: If the flow, the target's shape or a number is not as said here.
        FloatingPointError: If the target is NaN or +inf somewhere. Draws where it is -inf make
            this bound -inf; :func:`iwae` and :func:`siwae` give them no weight, and are
            -inf, without a gradient, only if there is no other draw.

    Example:
        >>> import math, torch
        >>> from flows import Flow, elbo
        >>> from flows.distributions import DiagonalNormal
        >>> from flows.transforms import Rotation
        >>> flow = Flow(Rotation(2), DiagonalNormal(2))  # as yet the standard normal
        >>> def log_target(x):
        ...     return -x.square().sum(1) / 2  # of which Z is 2 pi
        >>> torch.allclose(elbo(log_target, flow, 10).exp(), torch.tensor(2 * math.pi))
        True

    Reference:
        Rezende and Mohamed (2015), arXiv 1505.05770
    """
    _, ratios, _ = _log_ratios(log_target, flow, num_samples, context, repeats, stratified=False)
    return _per_row(ratios.mean((1, 2)), context, repeats)


def iwae(
    log_target: Callable[..., Tensor],
    flow: Flow,
    num_samples: int,
    *,
    context: Tensor | None = None,
    repeats: int | None = None,
) -> Tensor:
    r"""Importance-weighted bound :math:`E\,\log \frac1T \sum_t p(x_t) / q(x_t) \le \log Z`.

    T is ``num_samples``; T = 1 is :func:`elbo`, and more draws make it tighter, the bound
    tending to :math:`\log Z`.

    Args:
        log_target: As for :func:`elbo`, called as ``log_target(x)`` or ``log_target(x, context)``.
        flow: A Flow whose transform has an inverse, and whose base can be sampled with gradients.
        num_samples: T, the draws of one bound.
        context: Rows to be given to flow and target, each of which has a bound of its own.
        repeats: Without a context, how many independent estimates to return; None for one.

    Shape:
        () for ``repeats`` None, else (repeats,); with context (rows,); nats

    Raises:
        ValueError: If the flow, the target's shape or a number is not as for :func:`elbo`.
        FloatingPointError: If the target is NaN or +inf somewhere.

    Example:
        >>> from flows import iwae
        >>> from flows.recipes import VolumePreservingFlow
        >>> flow = VolumePreservingFlow(features=2, layers=1)
        >>> iwae(lambda x: -x.abs().sum(1), flow, 16, repeats=5).shape
        torch.Size([5])

    Reference:
        Burda et al. (2016), arXiv 1509.00519
    """
    _, ratios, _ = _log_ratios(log_target, flow, num_samples, context, repeats, stratified=False)
    return _per_row(ratios.flatten(1).logsumexp(1) - math.log(num_samples), context, repeats)


def selbo(
    log_target: Callable[..., Tensor],
    flow: Flow,
    num_samples: int = 1,
    *,
    context: Tensor | None = None,
    repeats: int | None = None,
) -> Tensor:
    r"""Evidence lower bound with draws of every component of a mixture base.

    The base :math:`\sum_k \alpha_k q_k`, a :class:`~flows.distributions.GaussianMixture`, makes
    the flow a mixture of as many laws, from each of which come T = ``num_samples`` draws:

    .. math:: \sum_k \alpha_k \frac1T \sum_t [\log p(x_{tk}) - \log q(x_{tk})]

    Its mean is that of :func:`elbo`, and the weights :math:`\alpha` learn. The K T draws pass
    the transform together; q is the density of the whole mixture, which takes no other pass. A
    flow with any other base has one component.

    Args:
        log_target: As for :func:`elbo`, called as ``log_target(x)`` or ``log_target(x, context)``.
        flow: A Flow whose transform has an inverse, and whose base can be sampled with gradients.
        num_samples: T, the draws of each component.
        context: Rows to be given to flow and target, each of which has a bound of its own.
        repeats: Without a context, how many independent estimates to return; None for one.

    Shape:
        () for ``repeats`` None, else (repeats,); with context (rows,); nats

    Raises:
        ValueError: If the flow, the target's shape or a number is not as for :func:`elbo`.
        FloatingPointError: If the target is NaN or +inf somewhere.

    Example:
        >>> from flows import selbo
        >>> from flows.recipes import VolumePreservingFlow
        >>> flow = VolumePreservingFlow(features=2, layers=1, components=3)
        >>> selbo(lambda x: -x.abs().sum(1), flow).backward()
        >>> flow.distribution.logits.grad.abs().min() > 0
        tensor(True)

    Reference:
        Morningstar et al. (2020), arXiv 2003.01687
    """
    _, ratios, log_alpha = _log_ratios(log_target, flow, num_samples, context, repeats)
    return _per_row((log_alpha.exp() * ratios.mean(1)).sum(1), context, repeats)


def siwae(
    log_target: Callable[..., Tensor],
    flow: Flow,
    num_samples: int = 1,
    *,
    context: Tensor | None = None,
    repeats: int | None = None,
) -> Tensor:
    r"""Importance-weighted bound with draws of every component of a mixture base.

    With draws as in :func:`selbo`,

    .. math:: \log \frac1T \sum_t \sum_k \alpha_k \frac{p(x_{tk})}{q(x_{tk})}

    whose mean lies between those of :func:`selbo` and :math:`\log Z`. A component where p has
    nothing costs it little, so modes are lost less easily. For the same reason it is content
    with a flow that is merely good to weigh samples from: of components that do not overlap
    the weights cancel, and are not learned.

    With one component it is :func:`iwae`.

    Args:
        log_target: As for :func:`elbo`, called as ``log_target(x)`` or ``log_target(x, context)``.
        flow: A Flow whose transform has an inverse, and whose base can be sampled with gradients.
        num_samples: T, the draws of each component.
        context: Rows to be given to flow and target, each of which has a bound of its own.
        repeats: Without a context, how many independent estimates to return; None for one.

    Shape:
        () for ``repeats`` None, else (repeats,); with context (rows,); nats

    Raises:
        ValueError: If the flow, the target's shape or a number is not as for :func:`elbo`.
        FloatingPointError: If the target is NaN or +inf somewhere.

    Example:
        >>> from flows import siwae
        >>> from flows.recipes import VolumePreservingFlow
        >>> flow = VolumePreservingFlow(features=2, layers=1, components=3)
        >>> loss = -siwae(lambda x: -x.abs().sum(1), flow, 4, repeats=64).mean()

    Reference:
        Morningstar et al. (2020), Automatic Differentiation Variational Inference with
        Mixtures, arXiv 2003.01687
    """
    _, ratios, log_alpha = _log_ratios(log_target, flow, num_samples, context, repeats)
    log_weights = log_alpha.unsqueeze(1) + ratios
    bound = log_weights.flatten(1).logsumexp(1) - math.log(num_samples)
    return _per_row(bound, context, repeats)


@torch.no_grad()
def importance_sample(
    log_target: Callable[..., Tensor],
    flow: Flow,
    num_samples: int,
    *,
    context: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    r"""Samples of the flow and what each weighs as one of the target.

    With w the exponentials of the log weights, :math:`\sum_n w_n` estimates Z without bias, and
    :math:`\sum_n w_n g(x_n) / \sum_n w_n` the mean of g under the target. There are
    ``num_samples`` of every component of a mixture base, K times as many in all.

    Args:
        log_target: As for :func:`elbo`, called as ``log_target(x)`` or ``log_target(x, context)``.
        flow: A Flow whose transform has an inverse.
        num_samples: Draws, of every component of a mixture base.
        context: Rows to be given to flow and target, each of which has samples of its own.

    Shape:
        samples (n, ...) and log weights (n,); with context (rows, n, ...) and (rows, n)

    Raises:
        ValueError: If the flow, the target's shape or a number is not as for :func:`elbo`.
        FloatingPointError: If the target is NaN or +inf somewhere.

    Example:
        >>> import math
        >>> from flows import Flow, effective_sample_size, importance_sample
        >>> from flows.distributions import GaussianMixture
        >>> from flows.transforms import Rotation
        >>> flow = Flow(Rotation(2), GaussianMixture(2, components=3))
        >>> x, log_weights = importance_sample(lambda x: -x.square().sum(1), flow, 10_000)
        >>> abs(log_weights.logsumexp(0).exp() - math.pi) < 0.3  # Z is pi
        tensor(True)
        >>> effective_sample_size(log_weights) < 30_000
        tensor(True)
    """
    samples, ratios, log_alpha = _log_ratios(log_target, flow, num_samples, context, None)
    log_weights = (log_alpha.unsqueeze(1) + ratios - math.log(num_samples)).flatten(1)
    samples = samples.flatten(1, 2)
    return (samples[0], log_weights[0]) if context is None else (samples, log_weights)


def effective_sample_size(log_weights: Tensor) -> Tensor:
    r"""How many draws of the target weighted ones are worth: :math:`(\sum w)^2 / \sum w^2`.

    n where all n weights are equal, near 1 where one outweighs the others. It cannot tell of
    modes that no draw has found: a flow that lost one may look as good as one that did not.

    Args:
        log_weights: Up to a constant, as of :func:`importance_sample`.

    Shape:
        (..., n) to (...)

    Example:
        >>> import torch
        >>> from flows import effective_sample_size
        >>> effective_sample_size(torch.tensor([0.0, 0.0, 0.0, -50.0]))
        tensor(3.)

    Reference:
        Kong, Liu and Wong (1994), J. Am. Stat. Assoc. 89, 278
    """
    return (2 * log_weights.logsumexp(-1) - (2 * log_weights).logsumexp(-1)).exp()


def _log_ratios(
    log_target: Callable[..., Tensor],
    flow: Flow,
    num_samples: int,
    context: Tensor | None,
    repeats: int | None,
    *,
    stratified: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """Samples (rows, T, K, ...), their log p - log q (rows, T, K), log weights (rows or 1, K).

    K is 1 without strata.
    """
    if not isinstance(flow, Flow):
        raise ValueError(f"flow must be a Flow, got {type(flow).__name__}.")
    check_at_least(1, num_samples=num_samples)
    if repeats is not None:
        check_at_least(0, repeats=repeats)
        if context is not None:
            raise ValueError(
                f"repeats must be None with a context, whose rows it has, got {repeats}."
            )
    rows = len(context) if context is not None else 1 if repeats is None else repeats
    draws = num_samples if context is not None else rows * num_samples
    embedded = None if context is None else flow.embedding_net(context)
    if stratified and hasattr(flow.distribution, "rsample_stratified"):
        noise, log_alpha = flow.distribution.rsample_stratified(draws, embedded)
        log_alpha = log_alpha if log_alpha.ndim == 2 else log_alpha.unsqueeze(0)
    else:
        noise = flow.distribution.sample(draws, embedded)
        noise = noise.unsqueeze(1 if context is None else 2)
        log_alpha = noise.new_zeros(1, 1)
    shape = (rows, num_samples, log_alpha.shape[1])
    noise = noise.flatten(0, 1 if context is None else 2)
    given = () if context is None else (context.repeat_interleave(math.prod(shape[1:]), dim=0),)
    if embedded is not None:
        embedded = embedded.repeat_interleave(math.prod(shape[1:]), dim=0)
    samples, logabsdet = flow.transform.inverse(noise, embedded)
    # At the noise the base density is known already: q takes no pass through the transform.
    log_q = flow.distribution.log_prob(noise, embedded) - logabsdet
    log_p = log_target(samples, *given)
    _check_target(log_p, samples)
    return samples.unflatten(0, shape), (log_p - log_q).view(shape), log_alpha


def _check_target(log_p: Tensor, samples: Tensor) -> None:
    if log_p.shape != (len(samples),):
        raise ValueError(
            f"log_target must return a number for each sample, shape ({len(samples)},), "
            f"got {tuple(log_p.shape)}."
        )
    wrong = log_p.isnan() | log_p.isposinf()
    if wrong.any():
        found = log_p[wrong][0].item()
        finite = samples.flatten(1).isfinite().all(1)
        whose = "" if finite[wrong].all() else ", where samples of the flow are not finite"
        raise FloatingPointError(
            f"log_target must be finite or -inf, got {found} and the like for "
            f"{int(wrong.sum())} of {len(samples)} samples{whose}."
        )


def _per_row(bound: Tensor, context: Tensor | None, repeats: int | None) -> Tensor:
    return bound[0] if context is None and repeats is None else bound
