"""What every data module here offers to training, and batches that a resumed run can repeat."""

from abc import ABC, abstractmethod
from collections.abc import Iterator

import torch
import torch.distributed as dist
from pytorch_lightning import LightningDataModule
from torch import Tensor

__all__ = ["Batches", "DataModule", "EpochLoader", "seeded_generator"]


def seeded_generator(*seeds: int) -> torch.Generator:
    """A CPU generator for the tuple of seeds; different tuples give unrelated streams.

    Args:
        *seeds: Integers, in order.

    Returns:
        The generator.

    Example:
        >>> import torch
        >>> from datasets.base import seeded_generator
        >>> once, again = (torch.rand(3, generator=seeded_generator(0, 1)) for _ in range(2))
        >>> other = torch.rand(3, generator=seeded_generator(1, 0))
        >>> torch.equal(once, again), torch.equal(once, other)
        (True, False)
    """
    state = 0
    for seed in seeds:
        # splitmix64's finalizer: neighbouring seeds must not give neighbouring states.
        state = (state + seed + 0x9E3779B97F4A7C15) % 2**64
        state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        state = (state ^ (state >> 27)) * 0x94D049BB133111EB % 2**64
        state ^= state >> 31
    return torch.Generator().manual_seed(state - 2**63)


class EpochLoader(ABC):
    """An iterable of batches ``(inputs, ...)``, each known by epoch and number alone.

    Where several processes train together, a batch of all is ``processes`` times as large and
    each takes its own part of it: together they see what one process with so large a batch would.

    Lightning announces the epoch through ``loader.sampler.set_epoch`` and asks every loader
    that has a sampler for its batch sampler. Its checkpoints hold ``state_dict``, by which a
    resumed run goes on within an epoch.

    Raises:
        ValueError: If an epoch is to be resumed by another number of processes.

    Example:
        >>> import torch
        >>> from datasets.base import EpochLoader
        >>> class Epochs(EpochLoader):
        ...     def __len__(self):
        ...         return 2
        ...     def batch(self, number, process, processes):
        ...         return (torch.tensor([[self.epoch, number]]),)
        >>> loader = Epochs()
        >>> loader.set_epoch(7)
        >>> [inputs.tolist() for (inputs,) in loader]
        [[[7, 0]], [[7, 1]]]
    """

    batch_sampler = None
    epoch = 0
    _next = 0  # batch of the epoch that has begun
    _resumed: dict[str, int] | None = None

    @property
    def sampler(self) -> "EpochLoader":
        """The loader itself, to which Lightning announces the epoch."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """Say which epoch the next iteration gives."""
        self.epoch = epoch

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def batch(self, number: int, process: int, processes: int) -> tuple[Tensor, ...]:
        """What a process sees as batch ``number`` of the epoch."""

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        # By now the epoch has been announced.
        state, self._resumed = self._resumed, None
        place, first = _place(), 0
        if state is not None and state["epoch"] == self.epoch:
            first = state["next"]
            if state["processes"] != place[1]:
                raise ValueError(
                    f"to go on within an epoch takes {state['processes']} processes, as before, "
                    f"got {place[1]}."
                )
        for number in range(first, len(self)):
            self._next = number + 1
            yield self.batch(number, *place)

    def state_dict(self) -> dict[str, int]:
        """The epoch, its next batch, and how many processes there are."""
        return {"epoch": self.epoch, "next": self._next, "processes": _place()[1]}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Let the next iteration go on where ``state_dict`` was taken, if it is of that epoch."""
        self._resumed = state


def _place() -> tuple[int, int]:
    """Number of this process among those that train together, and how many they are."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


class Batches(EpochLoader):
    """Rows of tensors in memory, in an order that depends on ``(seed, epoch)`` alone.

    So a resumed run sees the batches that the uninterrupted one would have seen.

    Args:
        tensors: Tensors of the same length, or what gives a tensor for chosen rows; a batch
            is a tuple with some rows of each.
        batch_size: Rows per batch and process; the last one may be smaller.
        shuffle: Draw a new order every epoch. Several processes then take equally many rows
            each, as the mean over their gradients demands: of the last batch up to
            ``processes - 1`` rows are left out, other ones every epoch. Without it every row
            is taken once, and parts of the last batch may differ by one row or be empty.
        seed: Seed of the orders.

    Raises:
        ValueError: If ``batch_size`` is below 1, tensors differ in length, or there are fewer rows
            than processes.

    Example:
        >>> import torch
        >>> from datasets.base import Batches
        >>> loader = Batches(torch.arange(5), batch_size=2)
        >>> [rows.tolist() for (rows,) in loader]
        [[0, 1], [2, 3], [4]]
    """

    def __init__(
        self, *tensors: Tensor, batch_size: int, shuffle: bool = False, seed: int = 0
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}.")
        if len({len(tensor) for tensor in tensors}) != 1:
            raise ValueError(
                f"tensors must have one length, got {[len(tensor) for tensor in tensors]}."
            )
        self.tensors = tensors
        self.batch_size = batch_size
        self.shuffle = shuffle
        self.seed = seed
        self._order: tuple[int, Tensor] | None = None

    def __len__(self) -> int:
        processes = _place()[1]
        rows = len(self.tensors[0])
        if self.shuffle:
            rows -= rows % processes
            if len(self.tensors[0]) and not rows:
                raise ValueError(
                    f"{processes} processes need at least {processes} training rows, "
                    f"got {len(self.tensors[0])}."
                )
        return -(-rows // (self.batch_size * processes))

    def batch(self, number: int, process: int, processes: int) -> tuple[Tensor, ...]:
        size = self.batch_size * processes
        rows = self._rows()[number * size : (number + 1) * size]
        if self.shuffle:
            rows = rows[: len(rows) - len(rows) % processes]
        chosen = rows.tensor_split(processes)[process]
        return tuple(tensor[chosen] for tensor in self.tensors)

    def _rows(self) -> Tensor:
        """The order of the epoch."""
        if self._order is None or self._order[0] != self.epoch:
            count = len(self.tensors[0])
            order = torch.arange(count)
            if self.shuffle:
                order = torch.randperm(count, generator=seeded_generator(self.seed, self.epoch))
            self._order = (self.epoch, order)
        return self._order[1]


class DataModule(LightningDataModule):
    """Tensors split into train, val and test, and what training needs to know of them.

    A subclass sets ``shape`` and, where they exist, the other attributes, and fills
    ``splits`` in ``setup``.

    Args:
        batch_size: Rows per training batch and process.
        seed: Seed of the batches' order.

    Attributes:
        shape: Shape of one sample.
        density: The law of the data, if known, with ``log_prob``; training then logs val/kl.
        grey_levels: For images, the number L of grey levels: pixels are ``k / L``,
            k = 0 ... L-1, the lower edges of bins in [0, 1); training then logs bits/dim.
        classes: Number of classes, if the splits hold labels: int64 (rows,), 0 ... classes-1.
        columns: Names of the features, for tables that have some.
        context_features: Number of context columns, if the splits hold a context of numbers.
        splits: ``"train"``, ``"val"``, ``"test"`` to a tuple of tensors, or of what gives a
            tensor for chosen rows, ``[:5]`` or ``[row numbers]``; inputs first, labels or
            context (if any) second.

    Raises:
        ValueError: If ``batch_size`` is below 1.

    Example:
        >>> import torch
        >>> from datasets.base import DataModule
        >>> class Line(DataModule):
        ...     shape = (1,)
        ...     def setup(self, stage=None):
        ...         for split in ("train", "val", "test"):
        ...             self.splits[split] = (torch.rand(100, 1),)
        >>> data = Line(batch_size=40)
        >>> data.setup()
        >>> [len(inputs) for (inputs,) in data.train_dataloader()]
        [40, 40, 20]
    """

    shape: tuple[int, ...]
    density = None
    grey_levels: int | None = None
    classes: int | None = None
    columns: tuple[str, ...] | None = None
    context_features: int | None = None

    def __init__(self, *, batch_size: int, seed: int = 0) -> None:
        super().__init__()
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}.")
        self.batch_size = batch_size
        self.seed = seed
        self.splits: dict[str, tuple[Tensor, ...]] = {}

    def train_dataloader(self) -> EpochLoader:
        """Batches of the training rows, every epoch in another order."""
        return Batches(
            *self.splits["train"], batch_size=self.batch_size, shuffle=True, seed=self.seed
        )

    def val_dataloader(self) -> Batches:
        """Batches of all validation rows, as they come."""
        return Batches(*self.splits["val"], batch_size=1000)

    def test_dataloader(self) -> Batches:
        """Batches of all test rows, as they come."""
        return Batches(*self.splits["test"], batch_size=1000)
