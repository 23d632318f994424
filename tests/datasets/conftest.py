"""Small files in the formats of the published image sets."""

import gzip
import pickle
import struct

import pytest
import torch
from scipy.io import savemat


def _idx(content):
    """The bytes of an IDX file of a uint8 tensor; bytes are taken as they are."""
    if isinstance(content, bytes):
        return content
    shape = content.shape
    header = struct.pack(f">{1 + len(shape)}I", 0x0800 + len(shape), *shape)
    return header + content.numpy().tobytes()


@pytest.fixture
def random_images():
    def make(*shape, seed=0):
        generator = torch.Generator().manual_seed(seed)
        return torch.randint(256, shape, generator=generator, dtype=torch.uint8)

    return make


@pytest.fixture
def write_mnist():
    """write_mnist(root, "MNIST", train=images, test=images, train_labels=..., ...)"""

    def write(root, name, *, train, test, train_labels=None, test_labels=None, gzipped=False):
        folder = root / name / "raw"
        folder.mkdir(parents=True, exist_ok=True)
        for start, images, labels in (
            ("train", train, train_labels),
            ("t10k", test, test_labels),
        ):
            for kind, content in (("images-idx3", images), ("labels-idx1", labels)):
                if content is not None:
                    file = folder / f"{start}-{kind}-ubyte{'.gz' if gzipped else ''}"
                    data = _idx(content)
                    file.write_bytes(gzip.compress(data) if gzipped else data)

    return write


@pytest.fixture
def write_cifar():
    """write_cifar(root, images, labels): 6 of each per file, the last 6 for testing."""

    def write(root, images, labels):
        folder = root / "cifar-10-batches-py"
        folder.mkdir(parents=True, exist_ok=True)
        names = [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]
        assert len(images) == len(labels) == 6 * len(names)
        for name, pixels, part in zip(names, images.split(6), labels.split(6), strict=True):
            batch = {
                "batch_label": f"batch {name}",
                "labels": part.tolist(),
                "data": pixels.flatten(1).numpy(),
                "filenames": [f"{i}.png" for i in range(6)],
            }
            (folder / name).write_bytes(pickle.dumps(batch, protocol=2))
        kinds = {"label_names": [f"kind {i}" for i in range(10)], "num_cases_per_batch": 6}
        (folder / "batches.meta").write_bytes(pickle.dumps(kinds, protocol=2))

    return write


@pytest.fixture
def write_svhn():
    """write_svhn(root, "train", images, digits)"""

    def write(root, split, images, digits):
        root.mkdir(parents=True, exist_ok=True)
        written = torch.where(digits == 0, 10, digits).to(torch.uint8)
        content = {"X": images.permute(2, 3, 1, 0).numpy(), "y": written[:, None].numpy()}
        savemat(root / f"{split}_32x32.mat", content)

    return write
