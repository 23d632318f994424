"""Files that are damaged or lie, and what their readers say of them."""

import contextlib
import io
import pickle
import random
import resource
import signal
import struct
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

import flows
from benchmarks.stress.crashes import ROOT
from datasets.idx import read_idx
from datasets.image_files import read_cifar, read_svhn
from datasets.image_folder import read_image
from datasets.table_files import read_columns, read_names
from flows.recipes import RotationSplineFlow
from flows.training.cli import RunCLI, one_line_errors
from flows.training.sampling import read_context

DEFAULT = str(ROOT / "configs" / "toy" / "two_moons.yaml")
SECONDS = 10  # after which a reader counts as one that hangs
MEMORY = 300  # MiB that reading may add
FLOW = {"features": 2, "layers": 1, "hidden_features": 4, "blocks": 0, "bins": 3}


class Kind(NamedTuple):
    """A kind of file: its name, how to write a good one, and who reads it."""

    name: str
    write: Callable[[Path], None]
    read: Callable[[Path], object]


def _write_checkpoint(path: Path) -> None:
    torch.manual_seed(0)
    flow = RotationSplineFlow(**FLOW)
    weights = {f"flow.{name}": value for name, value in flow.state_dict().items()}
    config = {"class_path": "flows.recipes.RotationSplineFlow", "init_args": FLOW}
    torch.save({"epoch": 1, "state_dict": weights, "flow_config": config}, path)


def _write_config(path: Path) -> None:
    path.write_text(Path(DEFAULT).read_text())


def _read_config(path: Path) -> None:
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said), one_line_errors():
            RunCLI(["--config", str(path)], default_config=DEFAULT)
    except SystemExit:
        raise ValueError(said.getvalue().strip()) from None


def _write_idx(path: Path) -> None:
    numbers = np.random.default_rng(0).integers(0, 256, (5, 6, 7), dtype=np.uint8)
    path.write_bytes(struct.pack(">IIII", 0x0803, *numbers.shape) + numbers.tobytes())


def _write_csv(path: Path) -> None:
    rows = np.random.default_rng(0).normal(size=(20, 3))
    path.write_text("a,b,c\n" + "\n".join(",".join(f"{v:.4f}" for v in row) for row in rows))


def _write_npy(path: Path) -> None:
    np.save(path, np.random.default_rng(0).normal(size=(20, 3)))


def _write_parquet(path: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    numbers = np.random.default_rng(0).normal(size=(20, 3))
    parquet.write_table(pyarrow.table(dict(zip("abc", numbers.T, strict=True))), path)


def _read_table(path: Path) -> None:
    read_columns(path, range(len(read_names(path))))


def _write_image(path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (16, 12, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)


def _write_cifar(path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (3, 3072), dtype=np.uint8)
    path.write_bytes(pickle.dumps({"data": pixels, "labels": [1, 2, 3]}))


def _write_svhn(path: Path) -> None:
    from scipy.io import savemat

    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3, 2), dtype=np.uint8)
    savemat(path, {"X": pixels, "y": np.array([[1], [10]])}, do_compression=True)


KINDS = (
    Kind("flow.ckpt", _write_checkpoint, flows.load),
    Kind("config.yaml", _write_config, _read_config),
    Kind("images-idx3-ubyte", _write_idx, read_idx),
    Kind("table.csv", _write_csv, _read_table),
    Kind("table.npy", _write_npy, _read_table),
    Kind("table.parquet", _write_parquet, _read_table),
    Kind("context.npy", _write_npy, read_context),
    Kind("context.csv", _write_csv, read_context),
    Kind("image.png", _write_image, lambda path: read_image(path, 8, 3)),
    Kind("image.jpg", _write_image, lambda path: read_image(path, 8, 3)),
    Kind("data_batch_1", _write_cifar, read_cifar),
    Kind("train_32x32.mat", _write_svhn, read_svhn),
)


def damaged(good: bytes, chance: random.Random) -> tuple[str, bytes]:
    """How a file was damaged, and what came of it."""
    data = bytearray(good)
    how = chance.choice(("truncated", "flipped", "enlarged", "shuffled", "padded", "random"))
    match how:
        case "truncated":
            del data[chance.randrange(len(data)) :]
        case "flipped":
            for _ in range(chance.choice((1, 1, 2, 8, 64))):
                data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
        case "enlarged":  # numbers that a header may hold, made huge
            where = chance.randrange(max(1, min(len(data), chance.choice((64, 512, 10**9)))))
            size = chance.choice((1, 2, 4, 8))
            value = chance.choice((b"\xff" * size, b"\x7f" + b"\xff" * (size - 1), b"9" * size))
            data[where : where + size] = value
        case "shuffled":
            a, b = sorted(chance.randrange(len(data)) for _ in range(2))
            data[a:b] = data[a:b][:: chance.choice((-1, 2))] * chance.choice((1, 3))
        case "padded":
            part = chance.choice((bytes(1000), good, chance.randbytes(100)))
            where = chance.choice((0, len(data), chance.randrange(len(data))))
            data[where:where] = part
        case "random":
            data = bytearray(chance.randbytes(chance.choice((0, 1, 10, 1000))))
    return how, bytes(data)


def hostile_files(folder: Path, *, cases: int, seed: int = 0) -> Iterator[dict]:
    """Read damaged files of every kind: each must be read, or refused in one clear line.

    Args:
        folder: Where they are written.
        cases: Files in all.
        seed: Of the damage.

    Returns:
        A row for each kind of file, with ``wrong``: what its reader did else.
    """
    for number, kind in enumerate(KINDS):
        chance = random.Random(f"{seed} {kind.name}")
        path = folder / kind.name
        kind.write(path)
        good = path.read_bytes()
        kind.read(path)  # as it is it must be fine, and what it needs is loaded
        _forget_peak()
        before, slowest, refused, wrong = _peak_memory(), 0.0, 0, []
        share = len(range(number, cases, len(KINDS)))
        for _ in range(share):
            how, data = damaged(good, chance)
            path.write_bytes(data)
            start = time.perf_counter()
            problem, was_refused = _read(kind, path)
            slowest = max(slowest, time.perf_counter() - start)
            refused += was_refused
            if problem:
                wrong.append(f"{how}: {problem}")
        grown = _peak_memory() - before
        result = f"{refused} refused, slowest {slowest:.2f} s, {grown:.0f} MiB more"
        yield {
            "what": f"{kind.name}, {share} damaged files",
            "result": f"{len(wrong)} wrong; {result}",
            "asked": f"0 wrong, {SECONDS} s, {MEMORY} MiB",
            "ok": not wrong and grown <= MEMORY,
            "cases": share,
            "refused": refused,
            "slowest_s": slowest,
            "grown_mib": grown,
            "wrong": wrong,
        }


def _read(kind: Kind, path: Path) -> tuple[str, bool]:
    """What is wrong with how a file was read, "" if nothing; and whether it was refused."""
    signal.signal(signal.SIGALRM, _too_late)
    signal.alarm(SECONDS)
    try:
        kind.read(path)
    except (ValueError, OSError) as error:
        text = str(error)
        # Of a config the key may be wrong, which is named.
        named = kind.name in text or kind.read is _read_config
        if "\n" in text or len(text) > 1000 or not named:
            return f"unclear: {text[:200]!r}", True
        return "", True
    except _TooLateError:
        return f"not read in {SECONDS} s", False
    except BaseException as error:
        return f"{type(error).__name__}: {str(error)[:200]}", False
    finally:
        signal.alarm(0)
    return "", False


class _TooLateError(BaseException):
    """Nothing that a reader would take for damage."""


def _too_late(number: int, frame: object) -> None:
    raise _TooLateError


def _forget_peak() -> None:
    """Let the peak of memory be what is in use now, where the system can."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def _peak_memory() -> float:
    """The most memory that this process had, in MiB; since :func:`_forget_peak` on Linux."""
    status = Path("/proc/self/status")
    if status.exists():
        lines = dict(line.split(":", 1) for line in status.read_text().splitlines())
        return int(lines["VmHWM"].split()[0]) / 2**10
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)
