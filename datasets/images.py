"""Images: scikit-learn's digits, MNIST, Fashion-MNIST, CIFAR-10 and SVHN."""

from abc import ABC, abstractmethod
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from datasets.base import DataModule
from datasets.errors import one_line
from datasets.idx import read_idx
from datasets.image_files import CLASSES, check_labels, read_cifar, read_svhn

__all__ = ["CIFAR10", "MNIST", "SVHN", "Digits", "FashionMNIST", "GreyLevels", "ImageSet"]


class GreyLevels:
    """Images kept as bytes k; whatever rows are asked for come as float32, k / 256.

    A quarter of the memory of float32; converting a batch takes a fraction of a millisecond.

    Args:
        pixels: uint8, (rows, channels, height, width).
        padding: Zeros on each side.

    Shape:
        rows to float32 (rows, channels, height + 2 padding, width + 2 padding)

    Example:
        >>> import torch
        >>> from datasets.images import GreyLevels
        >>> images = GreyLevels(torch.full((10, 1, 2, 2), 128, dtype=torch.uint8), padding=1)
        >>> images[:3].shape, images[:3].max()
        (torch.Size([3, 1, 4, 4]), tensor(0.5000))
    """

    def __init__(self, pixels: Tensor, padding: int = 0) -> None:
        self.pixels = pixels
        self.padding = padding

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, rows: Tensor | slice) -> Tensor:
        return F.pad(self.pixels[rows], [self.padding] * 4).float().div_(256)


class Digits(DataModule):
    """1,797 handwritten digits, 8x8 pixels of 17 grey levels: real data that is always there.

    In file order the first 1,000 train, the next 350 validate, the last 447 test.

    Args:
        batch_size: Images per training batch.
        labels: Give the digit too.
        seed: Seed of the batches' order.

    Shape:
        inputs (batch, 1, 8, 8), float32, k / 17; labels (batch,)

    Raises:
        ValueError: If ``batch_size`` is below 1.

    Reference:
        ``sklearn.datasets.load_digits``, the test part of UCI's "Optical Recognition of
        Handwritten Digits" (Alpaydin and Kaynak, 1998)

    Example:
        >>> from datasets.images import Digits
        >>> data = Digits(labels=True)
        >>> data.setup()
        >>> images, labels = data.splits["train"]
        >>> images.shape, labels[:5].tolist()
        (torch.Size([1000, 1, 8, 8]), [0, 1, 2, 3, 4])
    """

    shape = (1, 8, 8)
    grey_levels = 17

    def __init__(self, *, batch_size: int = 100, labels: bool = False, seed: int = 0) -> None:
        super().__init__(batch_size=batch_size, seed=seed)
        self.classes = CLASSES if labels else None

    def setup(self, stage: str | None = None) -> None:
        if self.splits:
            return
        from sklearn.datasets import load_digits

        digits = load_digits()
        tensors = [torch.from_numpy(digits.images).float()[:, None] / self.grey_levels]
        if self.classes:
            tensors.append(torch.from_numpy(digits.target).long())
        parts = zip(*(tensor.split([1000, 350, 447]) for tensor in tensors), strict=True)
        self.splits = dict(zip(("train", "val", "test"), parts, strict=True))


class ImageSet(DataModule, ABC):
    """8-bit images of ten classes in a training and a test file; choose a subclass.

    Files are looked for where torchvision puts them, and torchvision (extra ``vision``) is
    needed only to download them.

    Args:
        root: Folder of the data.
        batch_size: Images per training batch.
        val_size: Images at the end of the training file that validate instead.
        labels: Give the class too.
        padding: Zeros on each side: 2 makes 32x32 of 28x28 for multiscale flows. Bits per
            dimension then count the padding among the dimensions.
        download: Let torchvision download what is missing.
        seed: Seed of the batches' order.

    Shape:
        inputs (batch, channels, height, width), float32, k / 256; labels (batch,)

    Raises:
        ValueError: If an option is out of range; in ``setup``, if a file is not what it should be.
        FileNotFoundError: In ``setup``, if a file is missing and ``download`` is off.
        ImportError: In ``setup``, if ``download`` needs a torchvision that is not there.

    Example:
        >>> import torch
        >>> from datasets.images import ImageSet
        >>> class Black(ImageSet):
        ...     image_shape = (1, 4, 4)
        ...     def _read(self, root, *, train):
        ...         return (torch.zeros(10, 1, 4, 4, dtype=torch.uint8),)
        ...     def _download(self, root):
        ...         raise OSError("there is nothing to download")
        >>> data = Black(val_size=2, padding=2)
        >>> data.setup()
        >>> data.shape, len(data.splits["train"][0]), len(data.splits["val"][0])
        ((1, 8, 8), 8, 2)
    """

    grey_levels = 256
    image_shape: tuple[int, int, int]

    def __init__(
        self,
        root: str = "data",
        *,
        batch_size: int = 128,
        val_size: int = 5_000,
        labels: bool = False,
        padding: int = 0,
        download: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__(batch_size=batch_size, seed=seed)
        if val_size < 1:
            raise ValueError(f"val_size must be at least 1, got {val_size}.")
        if padding < 0:
            raise ValueError(f"padding must be at least 0, got {padding}.")
        self.root = root
        self.val_size = val_size
        self.classes = CLASSES if labels else None
        self.padding = padding
        self.download = download
        channels, height, width = self.image_shape
        self.shape = (channels, height + 2 * padding, width + 2 * padding)

    def setup(self, stage: str | None = None) -> None:
        if self.splits:
            return
        root = Path(self.root).expanduser()
        try:
            train, test = (self._read(root, train=train) for train in (True, False))
        except FileNotFoundError:
            if not self.download:
                raise
            self._download(root)
            train, test = (self._read(root, train=train) for train in (True, False))
        rest = len(train[0]) - self.val_size
        if rest < 1:
            raise ValueError(
                f"val_size must be below the {len(train[0])} images of the training file, "
                f"got {self.val_size}."
            )
        splits = {
            "train": [tensor[:rest] for tensor in train],
            "val": [tensor[rest:] for tensor in train],
            "test": test,
        }
        self.splits = {
            name: (GreyLevels(pixels, self.padding), *labels)
            for name, (pixels, *labels) in splits.items()
        }

    @abstractmethod
    def _read(self, root: Path, *, train: bool) -> tuple[Tensor, ...]:
        """Pixels (rows, *image_shape), uint8, and, if wanted, classes (rows,), int64."""

    @abstractmethod
    def _download(self, root: Path) -> None:
        """Put the files where ``_read`` looks for them."""


class MNIST(ImageSet):
    """60,000 + 10,000 handwritten digits, 28x28 pixels of 256 grey levels.

    Reads ``root/MNIST/raw/train-images-idx3-ubyte`` and ``t10k-images-idx3-ubyte``, for
    labels also ``...-labels-idx1-ubyte``, as they are or with ``.gz``. The splits hold 55 MB.

    Raises:
        ValueError: In ``setup``, if a file is no IDX file of such images or labels.
        FileNotFoundError: In ``setup``, if a file is missing and ``download`` is off.

    Reference:
        LeCun, Bottou, Bengio, Haffner (1998), http://yann.lecun.com/exdb/mnist

    Example:
        >>> from datasets.images import MNIST
        >>> MNIST("data", padding=2).shape  # files are read by setup()
        (1, 32, 32)
    """

    image_shape = (1, 28, 28)
    folder = "MNIST"  # and torchvision's name
    hint = ""

    def _read(self, root: Path, *, train: bool) -> tuple[Tensor, ...]:
        start = "train" if train else "t10k"
        path = self._file(root, f"{start}-images-idx3-ubyte")
        images = read_idx(path)
        if images.shape[1:] != (28, 28):
            raise ValueError(
                f"{path}: expected images of shape (count, 28, 28), got {tuple(images.shape)}."
            )
        if not self.classes:
            return (images[:, None],)
        path = self._file(root, f"{start}-labels-idx1-ubyte")
        return images[:, None], check_labels(path, read_idx(path), len(images))

    def _file(self, root: Path, name: str) -> Path:
        plain = root / self.folder / "raw" / name
        for path in (plain, plain.with_name(f"{name}.gz")):
            if path.is_file():
                return path
        raise FileNotFoundError(
            f"found neither {plain} nor {name}.gz beside it; {self.hint}download=True fetches "
            "it through torchvision, where there is a network."
        )

    def _download(self, root: Path) -> None:
        _fetch(self.folder, root)


class FashionMNIST(MNIST):
    """60,000 + 10,000 pictures of clothes, 28x28 pixels of 256 grey levels.

    Reads ``root/FashionMNIST/raw`` as :class:`MNIST` does its folder.

    Reference:
        Xiao, Rasul, Vollgraf (2017), arXiv 1708.07747

    Example:
        >>> from datasets.images import FashionMNIST
        >>> FashionMNIST("data", padding=2).shape  # files are read by setup()
        (1, 32, 32)
    """

    folder = "FashionMNIST"
    hint = "`make fashion-mnist` puts it under ./data where apt exists; elsewhere "


class CIFAR10(ImageSet):
    """50,000 + 10,000 colour pictures of ten kinds of things, 32x32 pixels of 256 levels.

    Reads ``root/cifar-10-batches-py/data_batch_1`` to ``data_batch_5`` and ``test_batch``, the
    "python version". They are pickles, of which only arrays, numbers and text are read: no
    code that a file may carry is run. The splits hold 184 MB.

    Reference:
        Krizhevsky (2009), https://www.cs.toronto.edu/~kriz/cifar.html

    Example:
        >>> from datasets.images import CIFAR10
        >>> CIFAR10("data").shape  # files are read by setup()
        (3, 32, 32)
    """

    image_shape = (3, 32, 32)

    def _read(self, root: Path, *, train: bool) -> tuple[Tensor, ...]:
        names = [f"data_batch_{i}" for i in range(1, 6)] if train else ["test_batch"]
        batches = [read_cifar(_existing(root / "cifar-10-batches-py" / name)) for name in names]
        images, labels = (torch.cat(parts) for parts in zip(*batches, strict=True))
        return (images, labels) if self.classes else (images,)

    def _download(self, root: Path) -> None:
        _fetch("CIFAR10", root)


class SVHN(ImageSet):
    """73,257 + 26,032 house numbers in the street, 32x32 colour pixels of 256 levels.

    Reads ``root/train_32x32.mat`` and ``root/test_32x32.mat``. The splits hold 305 MB.

    Reference:
        Netzer et al. (2011), http://ufldl.stanford.edu/housenumbers

    Example:
        >>> from datasets.images import SVHN
        >>> SVHN("data").shape  # files are read by setup()
        (3, 32, 32)
    """

    image_shape = (3, 32, 32)

    def _read(self, root: Path, *, train: bool) -> tuple[Tensor, ...]:
        path = root / f"{'train' if train else 'test'}_32x32.mat"
        images, labels = read_svhn(_existing(path))
        return (images, labels) if self.classes else (images,)

    def _download(self, root: Path) -> None:
        _fetch("SVHN", root, split="train")
        _fetch("SVHN", root, split="test")


def _existing(path: Path) -> Path:
    if not path.is_file():
        raise FileNotFoundError(
            f"found no file {path}; download=True fetches it through torchvision, where there "
            "is a network."
        )
    return path


def _fetch(name: str, root: Path, **which: str) -> None:
    """Let torchvision download the data set of this name into root."""
    try:
        from torchvision import datasets
    except (ImportError, RuntimeError) as error:
        # Beside a torch build that it does not match, its import ends in a RuntimeError.
        raise ImportError(
            "download=True needs torchvision, the extra `vision`, beside a torch build that it "
            f"matches: {one_line(error)}"
        ) from error
    try:
        getattr(datasets, name)(str(root), download=True, **which)
    except (RuntimeError, OSError) as error:
        raise OSError(f"{name} could not be downloaded into {root}: {one_line(error)}") from error
