"""Our readers beside torchvision's own, and its downloads, in the environment that has it."""

import gc
import hashlib
import tarfile
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from PIL import Image

from datasets.image_folder import ImageFolder
from datasets.images import CIFAR10, MNIST, SVHN, FashionMNIST

pytestmark = pytest.mark.skipif(
    not find_spec("torchvision"),
    reason="torchvision has an environment of its own: make vision-test",
)


@pytest.fixture
def vision():
    """torchvision's data sets."""
    from torchvision import datasets

    return datasets


@pytest.fixture
def server(tmp_path, monkeypatch):
    """The folder that is served, and the address where."""
    folder = tmp_path / "served"
    folder.mkdir()
    handler = partial(SimpleHTTPRequestHandler, directory=str(folder))
    monkeypatch.setattr(SimpleHTTPRequestHandler, "log_message", lambda *args: None)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield folder, f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


def md5(path):
    return hashlib.md5(path.read_bytes()).hexdigest()


def together(module):
    """Pixels as bytes, and labels, of training and validation, and of test."""
    module.setup()
    train, val, test = (module.splits[name] for name in ("train", "val", "test"))
    pixels, labels = (torch.cat((a[:], b[:])) for a, b in zip(train, val, strict=True))
    return [((256 * x).to(torch.uint8), y) for x, y in ((pixels, labels), (test[0][:], test[1]))]


def same(ours, theirs):
    for our, their in zip(ours, theirs, strict=True):
        assert torch.equal(our, torch.as_tensor(np.asarray(their)))


@pytest.fixture
def mnist_files(random_images):
    digits = torch.arange(13) * 7 % 10
    labels = {"train_labels": digits[:8].to(torch.uint8), "test_labels": digits[8:].byte()}
    return {"train": random_images(8, 28, 28), "test": random_images(5, 28, 28, seed=1)} | labels


@pytest.mark.parametrize("kind", [MNIST, FashionMNIST])
def test_mnist_is_what_torchvision_reads(tmp_path, vision, kind, mnist_files, write_mnist):
    write_mnist(tmp_path, kind.__name__, **mnist_files)
    ours = together(kind(str(tmp_path), val_size=3, labels=True))
    for train, (pixels, labels) in zip((True, False), ours, strict=True):
        theirs = getattr(vision, kind.__name__)(str(tmp_path), train=train)
        same((pixels[:, 0], labels), (theirs.data, theirs.targets))


def test_mnist_is_downloaded(tmp_path, vision, server, mnist_files, write_mnist, monkeypatch):
    folder, address = server
    write_mnist(folder, "MNIST", **mnist_files, gzipped=True)
    served = sorted((folder / "MNIST" / "raw").iterdir())
    monkeypatch.setattr(vision.MNIST, "mirrors", [f"{address}MNIST/raw/"])
    monkeypatch.setattr(vision.MNIST, "resources", [(file.name, md5(file)) for file in served])
    root = tmp_path / "data"
    ours = together(MNIST(str(root), val_size=3, labels=True, download=True))
    same(ours[0], (mnist_files["train"][:, None], mnist_files["train_labels"].long()))
    same(ours[1], (mnist_files["test"][:, None], mnist_files["test_labels"].long()))
    monkeypatch.setattr(vision.MNIST, "mirrors", [])
    together(MNIST(str(root), val_size=3, labels=True, download=True))  # nothing to do


@pytest.fixture
def cifar_files(random_images, write_cifar):
    images, labels = random_images(36, 3, 32, 32), torch.arange(36) * 7 % 10
    return images, labels, partial(write_cifar, images=images, labels=labels)


def test_cifar_is_what_torchvision_reads(tmp_path, vision, cifar_files, monkeypatch):
    *_, write = cifar_files
    write(tmp_path)
    # Its check of the published files' checksums.
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *args: True)
    ours = together(CIFAR10(str(tmp_path), val_size=3, labels=True))
    for train, (pixels, labels) in zip((True, False), ours, strict=True):
        theirs = vision.CIFAR10(str(tmp_path), train=train)
        same((pixels.permute(0, 2, 3, 1), labels), (theirs.data, theirs.targets))


def test_cifar_is_downloaded(tmp_path, vision, server, cifar_files, monkeypatch):
    folder, address = server
    images, labels, write = cifar_files
    write(folder)
    files = folder / vision.CIFAR10.base_folder
    archive = folder / vision.CIFAR10.filename
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(files, files.name)
    monkeypatch.setattr(vision.CIFAR10, "url", f"{address}{archive.name}")
    monkeypatch.setattr(vision.CIFAR10, "tgz_md5", md5(archive))
    for name in ("train_list", "test_list"):
        checksums = [[file, md5(files / file)] for file, _ in getattr(vision.CIFAR10, name)]
        monkeypatch.setattr(vision.CIFAR10, name, checksums)
    meta = vision.CIFAR10.meta | {"md5": md5(files / "batches.meta")}
    monkeypatch.setattr(vision.CIFAR10, "meta", meta)
    root = tmp_path / "data"
    ours = together(CIFAR10(str(root), val_size=3, labels=True, download=True))
    same(ours[0], (images[:30], labels[:30]))
    same(ours[1], (images[30:], labels[30:]))


@pytest.fixture
def svhn_files(random_images, write_svhn):
    images, digits = random_images(9, 3, 32, 32), torch.tensor([1, 2, 3, 4, 5, 9, 0, 0, 8])

    def write(root):
        write_svhn(root, "train", images[:6], digits[:6])
        write_svhn(root, "test", images[6:], digits[6:])

    return images, digits, write


def test_svhn_is_what_torchvision_reads(tmp_path, vision, svhn_files, monkeypatch):
    *_, write = svhn_files
    write(tmp_path)
    monkeypatch.setattr("torchvision.datasets.svhn.check_integrity", lambda *args: True)
    ours = together(SVHN(str(tmp_path), val_size=2, labels=True))
    for split, (pixels, labels) in zip(("train", "test"), ours, strict=True):
        theirs = vision.SVHN(str(tmp_path), split=split)
        same((pixels, labels), (theirs.data, theirs.labels))


def test_svhn_is_downloaded(tmp_path, vision, server, svhn_files, monkeypatch):
    folder, address = server
    images, digits, write = svhn_files
    write(folder)
    names = {"train": "train_32x32.mat", "test": "test_32x32.mat"}
    split_list = {s: [f"{address}{n}", n, md5(folder / n)] for s, n in names.items()}
    monkeypatch.setattr(vision.SVHN, "split_list", split_list)
    root = tmp_path / "data"
    ours = together(SVHN(str(root), val_size=2, labels=True, download=True))
    same(ours[0], (images[:6], digits[:6]))
    same(ours[1], (images[6:], digits[6:]))


@pytest.mark.filterwarnings("ignore:unclosed <socket:ResourceWarning")  # torchvision's
def test_a_download_that_fails_is_one_line(tmp_path, vision, server, monkeypatch):
    _, address = server
    monkeypatch.setattr(vision.MNIST, "mirrors", [f"{address}nowhere/"])
    with pytest.raises(OSError) as caught:
        MNIST(str(tmp_path / "data"), download=True).setup()
    message = str(caught.value)
    assert message.startswith(f"MNIST could not be downloaded into {tmp_path}/data: ")
    assert "\n" not in message
    del caught
    gc.collect()


@pytest.mark.parametrize("mode, channels", [("RGB", 3), ("L", 3), ("L", 1), ("RGB", 1)])
def test_image_folder_is_what_torchvision_reads(tmp_path, vision, mode, channels):
    from torchvision import transforms

    generator = np.random.default_rng(0)
    # Twice, or half, the size after resizing: the middle is then at whole pixels for both.
    sizes = [(16, 24), (40, 16), (16, 16), (48, 16)]
    for i in range(40):
        height, width = sizes[i % 4]
        pixels = generator.integers(256, size=(height, width, len(mode))).astype(np.uint8)
        folder = tmp_path / "train" / ("cat" if i % 3 else "ape")
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.squeeze()).save(folder / f"{i}.png")
    steps = [transforms.Resize(8), transforms.CenterCrop(8), transforms.PILToTensor()]
    if channels == 1:
        steps.insert(0, transforms.Grayscale())
    theirs = vision.ImageFolder(str(tmp_path / "train"), transforms.Compose(steps))
    module = ImageFolder(str(tmp_path), size=8, channels=channels, labels=True)
    module.setup()
    assert module.classes == len(theirs.classes)

    def rows(images):
        return sorted((label, *pixels.flatten().tolist()) for pixels, label in images)

    ours = [
        ((256 * pixels).to(torch.uint8), label.item())
        for images, labels in module.splits.values()
        for pixels, label in zip(images[:], labels, strict=True)
    ]
    assert rows(ours) == rows(theirs)
