"""A flow is a transform and a base distribution; and how to get a trained one back."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from flows.checkpoint import (
    build,
    find_checkpoint,
    read_checkpoint,
    read_safetensors,
    write_safetensors,
)
from flows.checks import check_at_least
from flows.transforms.base import Transform

__all__ = ["DensityModel", "Flow", "load", "save"]


class Flow(nn.Module):
    r"""Density of inputs x whose noise :math:`z = f(x)` has a known law.

    :math:`\log p(x) = \log p_z(f(x)) + \log |\det \partial f / \partial x|`, in nats.
    Calling the flow is ``log_prob``, so that wrappers such as DDP and ``torch.compile`` work.

    Args:
        transform: f, from data to noise.
        distribution: Law of the noise, with ``log_prob(inputs, context)`` and
            ``sample(num_samples, context)``; ours or nflows'.
        embedding_net: Applied to every context first; None leaves it as it is.

    Shape:
        inputs (batch, ...), context (batch, ...) to log_prob (batch,) in nats

    Raises:
        ValueError: If context and inputs differ in rows, or the number of samples or the
            temperature is negative.

    Example:
        >>> import torch
        >>> from flows import Flow, Rotation
        >>> from flows.distributions import Normal
        >>> flow = Flow(Rotation(2, init="haar"), Normal(2))
        >>> round(flow.log_prob(torch.zeros(1, 2)).item(), 4)  # -log(2 pi)
        -1.8379
        >>> flow.sample(5).shape
        torch.Size([5, 2])
    """

    def __init__(
        self, transform: Transform, distribution: nn.Module, embedding_net: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.transform = transform
        self.distribution = distribution
        self.embedding_net = nn.Identity() if embedding_net is None else embedding_net

    def forward(self, inputs: Tensor, context: Tensor | None = None) -> Tensor:
        return self.log_prob(inputs, context)

    def log_prob(self, inputs: Tensor, context: Tensor | None = None) -> Tensor:
        """Log density of each row in nats, shape (batch,)."""
        if context is not None and context.shape[0] != inputs.shape[0]:
            raise ValueError(
                f"context must have a row per input, got {context.shape[0]} for {inputs.shape[0]}."
            )
        context = self._embed(context)
        noise, logabsdet = self.transform(inputs, context)
        return self.distribution.log_prob(noise, context) + logabsdet

    def sample(
        self, num_samples: int, context: Tensor | None = None, *, temperature: float = 1.0
    ) -> Tensor:
        """Samples (num_samples, ...); with context (rows of context, num_samples, ...).

        ``temperature`` multiplies the standard deviation of the noise.
        """
        return self._sample(num_samples, context, temperature)[0]

    def sample_and_log_prob(
        self, num_samples: int, context: Tensor | None = None, *, temperature: float = 1.0
    ) -> tuple[Tensor, Tensor]:
        """As :meth:`sample`, with the log density of each sample under the flow itself.

        The log density is the flow's own, at temperature 1, whatever the temperature of the
        samples.
        """
        samples, noise, logabsdet, context = self._sample(num_samples, context, temperature)
        log_prob = self.distribution.log_prob(noise, context) - logabsdet
        return samples, log_prob.view(samples.shape[: 1 if context is None else 2])

    def transform_to_noise(self, inputs: Tensor, context: Tensor | None = None) -> Tensor:
        """The noise f(inputs)."""
        return self.transform(inputs, self._embed(context))[0]

    def _embed(self, context: Tensor | None) -> Tensor | None:
        return None if context is None else self.embedding_net(context)

    def _sample(
        self, num_samples: int, context: Tensor | None, temperature: float
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Samples in their final shape; noise, logabsdet and context in rows."""
        check_at_least(0, num_samples=num_samples, temperature=temperature)
        context = self._embed(context)
        # Distributions of other libraries know no temperature.
        options = {} if temperature == 1.0 else {"temperature": temperature}
        noise = self.distribution.sample(num_samples, context, **options)
        if context is None:
            samples, logabsdet = self.transform.inverse(noise)
            return samples, noise, logabsdet, None
        rows = context.shape[0]
        noise = noise.flatten(0, 1)
        context = context.repeat_interleave(num_samples, dim=0)
        samples, logabsdet = self.transform.inverse(noise, context)
        return samples.unflatten(0, (rows, num_samples)), noise, logabsdet, context


class DensityModel(ABC):
    """What can be trained and sampled: every module that has these methods, as a Flow has.

    Nothing inherits from this class: ``isinstance`` looks at the methods. ``forward`` is
    ``log_prob``, which may be a lower bound, as a variational autoencoder's is; it is then
    trained and reported like a density.
    """

    @abstractmethod
    def forward(self, inputs: Tensor, context: Tensor | None = None) -> Tensor: ...

    @abstractmethod
    def log_prob(self, inputs: Tensor, context: Tensor | None = None) -> Tensor: ...

    @abstractmethod
    def sample(
        self, num_samples: int, context: Tensor | None = None, *, temperature: float = 1.0
    ) -> Tensor: ...

    @classmethod
    def __subclasshook__(cls, other: type) -> bool:
        return (
            issubclass(other, nn.Module)
            and other.forward is not nn.Module.forward
            and all(hasattr(other, name) for name in ("log_prob", "sample"))
        )


def load(path: str | Path, flow: nn.Module | None = None) -> nn.Module:
    """A trained flow in eval mode, from a run folder or a file; neither data nor Lightning.

    Models that are no :class:`Flow` but have its ``log_prob`` and ``sample`` come back, too.
    A file from a stranger runs no code, builds only parts of this library, and takes little more
    memory than its size and 300 MiB. The description that the flow was built by becomes its
    attribute ``flow_config``.

    Args:
        path: A run folder (its best checkpoint is taken, else its last), a checkpoint, or a
            ``.safetensors`` file of weights, such as :func:`save` writes.
        flow: An untrained flow of the same architecture to load the weights into. Needed
            only for files that do not say how their flow was built, or whose flow is not
            made of parts of this library.

    Returns:
        The flow.

    Raises:
        FileNotFoundError: If there is no checkpoint.
        ValueError: If it is damaged, or belongs to another architecture.
        ImportError: For a ``.safetensors`` file without the safetensors package.

    Example:
        >>> import os, tempfile, torch, flows
        >>> flow = flows.recipes.RotationSplineFlow(features=2, layers=1)
        >>> weights = {f"flow.{name}": value for name, value in flow.state_dict().items()}
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = os.path.join(folder, "best.ckpt")
        ...     torch.save({"state_dict": weights}, path)
        ...     loaded = flows.load(path, flows.recipes.RotationSplineFlow(features=2, layers=1))
        >>> x = torch.randn(3, 2)
        >>> torch.equal(loaded.log_prob(x), flow.eval().log_prob(x))
        True
    """
    path = find_checkpoint(path)
    if path.suffix == ".safetensors":
        contents, prefix = read_safetensors(path), ""
    else:
        contents, prefix = read_checkpoint(path), "flow."
    if flow is None:
        config = contents.get("flow_config")
        if config is None:
            raise ValueError(
                f"{path} does not say how its flow was built: pass one, load(path, flow)."
            )
        flow = build(config, path.stat().st_size)
        if not isinstance(flow, DensityModel):
            raise ValueError(
                f"{path} must describe a Flow, or a module with its forward, log_prob and sample, "
                f"got {type(flow).__name__}."
            )
        flow.flow_config = config
    weights = {
        name.removeprefix(prefix): value
        for name, value in contents["state_dict"].items()
        if str(name).startswith(prefix)
    }
    _fill(flow, weights, f"{path} does not fit this flow")
    return flow.eval()


def save(flow: nn.Module, path: str | Path, config: Mapping[str, Any] | None = None) -> None:
    """Write the weights of a flow into a ``.safetensors`` file, which :func:`load` reads.

    A flow that came from :func:`load` has its description written beside its weights, and so
    comes back by ``load(path)`` alone. Of other flows give the description as ``config``, or a
    flow of the same architecture to ``load(path, flow)``. Numbers come back bit for bit in a
    flow of the same dtype; ``load(path)`` makes one of torch's default dtype.

    Args:
        flow: Any flow, or other module.
        path: A file name that ends in ``.safetensors``.
        config: How ``load`` can build the flow, as configs of ``train.py`` say it:
            ``{"class_path": "flows.recipes.Glow", "init_args": {"shape": [1, 8, 8]}}``. By
            default ``flow.flow_config``, if there is one.

    Raises:
        ValueError: If ``path`` ends otherwise, or what ``config`` describes is not this flow.
        ImportError: Without the safetensors package.

    Example:
        >>> import os, tempfile, torch, flows
        >>> flow = flows.recipes.RotationSplineFlow(features=2, layers=1)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = os.path.join(folder, "flow.safetensors")
        ...     flows.save(flow, path)
        ...     loaded = flows.load(path, flows.recipes.RotationSplineFlow(features=2, layers=1))
        >>> x = torch.randn(3, 2)
        >>> torch.equal(loaded.log_prob(x), flow.eval().log_prob(x))
        True
    """
    path = Path(path).expanduser()
    if path.suffix != ".safetensors":
        raise ValueError(f"path must end in .safetensors, got {path}.")
    weights = flow.state_dict()
    config = getattr(flow, "flow_config", None) if config is None else config
    if config is not None:
        size = sum(value.numel() * value.element_size() for value in weights.values())
        with torch.random.fork_rng(devices=[]):
            _fill(build(config, size), weights, "config does not describe this flow")
    write_safetensors(weights, config, path)


def _fill(flow: nn.Module, weights: dict[str, Tensor], complaint: str) -> None:
    """Load weights, or raise the complaint and the reason in one line."""
    try:
        flow.load_state_dict(weights)
    except (RuntimeError, ValueError) as error:
        reasons = " ".join(str(error).split())
        raise ValueError(f"{complaint}: {reasons[:400]}") from None
