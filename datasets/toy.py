"""Endless data from the densities of ``datasets.densities``, a module for each."""

from torch import Tensor

from datasets.base import DataModule, EpochLoader, seeded_generator
from datasets.densities import DENSITIES, Density
from datasets.posteriors import POSTERIORS

__all__ = [
    "DENSITIES",
    "POSTERIORS",
    "Banana",
    "Checkerboard",
    "Circles",
    "EightGaussians",
    "FreshBatches",
    "Pinwheel",
    "Rings",
    "SwissRoll",
    "Toy",
    "TwentyFiveGaussians",
    "TwoMeans",
    "TwoMoons",
    "TwoSpirals",
]


class FreshBatches(EpochLoader):
    """Batches ``(inputs,)`` that never repeat a sample.

    Batch i of epoch e depends on ``(seed, e, i)`` alone, so a resumed run sees the batches that
    the uninterrupted one would have seen.

    Args:
        density: What to sample.
        batch_size: Rows per batch and process.
        batches: Batches per epoch.
        seed: Seed of the samples.

    Example:
        >>> import torch
        >>> from datasets.toy import DENSITIES, FreshBatches
        >>> loader = FreshBatches(DENSITIES["two_moons"], batch_size=4, batches=2, seed=0)
        >>> first, second = (x for (x,) in loader)
        >>> again, _ = (x for (x,) in loader)
        >>> torch.equal(first, again), torch.equal(first, second)
        (True, False)
    """

    def __init__(self, density: Density, *, batch_size: int, batches: int, seed: int) -> None:
        self.density = density
        self.batch_size = batch_size
        self.batches = batches
        self.seed = seed

    def __len__(self) -> int:
        return self.batches

    def batch(self, number: int, process: int, processes: int) -> tuple[Tensor]:
        generator = seeded_generator(self.seed, 0, self.epoch, number)
        rows = self.density.sample(self.batch_size * processes, generator)
        return (rows[self.batch_size * process : self.batch_size * (process + 1)],)


class Toy(DataModule):
    """Samples of a known density, new ones in every training batch; choose a subclass.

    ``splits["train"]`` is a fixed sample for data-dependent initialization and pictures.

    Args:
        batch_size: Samples per training batch.
        batches_per_epoch: Training batches per epoch.
        val_size: Samples in the validation set.
        test_size: Samples in the test set.
        seed: Seed of all samples.

    Raises:
        ValueError: If a size is below 1.

    Example:
        >>> from datasets.toy import DENSITIES, Toy
        >>> class Moons(Toy):
        ...     density = DENSITIES["two_moons"]
        >>> data = Moons(batch_size=64, val_size=100)
        >>> data.setup()
        >>> data.splits["val"][0].shape
        torch.Size([100, 2])
    """

    shape = (2,)

    def __init__(
        self,
        *,
        batch_size: int = 256,
        batches_per_epoch: int = 100,
        val_size: int = 10_000,
        test_size: int = 50_000,
        seed: int = 0,
    ) -> None:
        super().__init__(batch_size=batch_size, seed=seed)
        sizes = dict(batches_per_epoch=batches_per_epoch, val_size=val_size, test_size=test_size)
        for name, size in sizes.items():
            if size < 1:
                raise ValueError(f"{name} must be at least 1, got {size}.")
        self.batches_per_epoch = batches_per_epoch
        self.val_size = val_size
        self.test_size = test_size

    def setup(self, stage: str | None = None) -> None:
        # Stream 0 belongs to the training batches.
        sizes = {"val": self.val_size, "test": self.test_size, "train": 4096}
        for stream, (split, size) in enumerate(sizes.items(), start=1):
            self.splits[split] = (self.density.sample(size, seeded_generator(self.seed, stream)),)

    def train_dataloader(self) -> FreshBatches:
        """Batches of new samples."""
        return FreshBatches(
            self.density,
            batch_size=self.batch_size,
            batches=self.batches_per_epoch,
            seed=self.seed,
        )


class TwoMoons(Toy):
    """Two interleaved half circles of radius 2, noise 0.2 (scikit-learn's make_moons, doubled).

    Example:
        >>> from datasets.toy import TwoMoons
        >>> print(round(TwoMoons.density.entropy(), 3))  # nats, the least test/nll
        2.394
    """

    density = DENSITIES["two_moons"]


class Circles(Toy):
    """Circles of radius 1.5 and 3, noise 0.24.

    Example:
        >>> from datasets.toy import Circles
        >>> print(round(Circles.density.entropy(), 3))  # nats, the least test/nll
        3.268
    """

    density = DENSITIES["circles"]


class Rings(Toy):
    """Circles of radius 0.75, 1.5, 2.25 and 3, noise 0.08.

    Example:
        >>> from datasets.toy import Rings
        >>> print(round(Rings.density.entropy(), 3))  # nats, the least test/nll
        2.623
    """

    density = DENSITIES["rings"]


class EightGaussians(Toy):
    """Eight Gaussians on a circle of radius sqrt 8, sd 1 / sqrt 8.

    Example:
        >>> from datasets.toy import EightGaussians
        >>> print(round(EightGaussians.density.entropy(), 3))  # nats, the least test/nll
        2.832
    """

    density = DENSITIES["eight_gaussians"]


class TwentyFiveGaussians(Toy):
    """A five by five grid of Gaussians, 1.5 apart, sd 0.2.

    Example:
        >>> from datasets.toy import TwentyFiveGaussians
        >>> print(round(TwentyFiveGaussians.density.entropy(), 3))  # nats, the least test/nll
        2.837
    """

    density = DENSITIES["twenty_five_gaussians"]


class Pinwheel(Toy):
    """Five Gaussian blades, twisted by an angle that grows with the squared radius.

    Example:
        >>> from datasets.toy import Pinwheel
        >>> print(round(Pinwheel.density.entropy(), 3))  # nats, the least test/nll
        2.321
    """

    density = DENSITIES["pinwheel"]


class Checkerboard(Toy):
    """Uniform on the dark squares of a four by four board.

    Example:
        >>> from datasets.toy import Checkerboard
        >>> print(round(Checkerboard.density.entropy(), 3))  # nats, the least test/nll
        3.466
    """

    density = DENSITIES["checkerboard"]


class TwoSpirals(Toy):
    """Two spiral arms, of radius 0.5 to 3.1 in one and a quarter turns, noise 0.1.

    Example:
        >>> from datasets.toy import TwoSpirals
        >>> print(round(TwoSpirals.density.entropy(), 3))  # nats, the least test/nll
        2.507
    """

    density = DENSITIES["two_spirals"]


class SwissRoll(Toy):
    """A spiral of one and a half turns, noise 0.2 (scikit-learn's make_swiss_roll over 5).

    Example:
        >>> from datasets.toy import SwissRoll
        >>> print(round(SwissRoll.density.entropy(), 3))  # nats, the least test/nll
        2.67
    """

    density = DENSITIES["swiss_roll"]


class Banana(Toy):
    """A Gaussian bent along a parabola.

    Example:
        >>> from datasets.toy import Banana
        >>> print(round(Banana.density.entropy(), 3))  # nats, the least test/nll
        2.327
    """

    density = DENSITIES["banana"]


class TwoMeans(Toy):
    """Posterior of the means of two normals given eight draws from their mixture: two modes.

    Its unnormalized log density is what ``model.objective`` trains a flow on.

    Example:
        >>> from datasets.toy import TwoMeans
        >>> print(round(TwoMeans.density.entropy(), 3))  # nats, the least test/nll
        1.761
    """

    density = POSTERIORS["two_means"]
