"""What is taken from a checkpoint, which may be damaged or come from a stranger."""

import importlib
import json
import math
import pickletools
import struct
import threading
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_buffer_registration_hook,
    register_module_parameter_registration_hook,
)

__all__ = [
    "build",
    "find_checkpoint",
    "read_checkpoint",
    "read_safetensors",
    "write_safetensors",
]

# What a flow may hold beside the weights in its file: buffers that are not saved, say.
SPARE = 2**22
# Numbers that a module weighs beside its parameters and buffers.
MODULE = 250
# Settings that are sizes of nothing by themselves.
LEVELS = "grey_levels"
MOST_LEVELS = 2**16
# What a description of a flow may consist of, and how deep.
NODES, DEPTH = 10_000, 50
# The part of a checkpoint that is no tensor: 100 bytes and 25 operations for each.
PICKLE, OPERATIONS = 2**24, 2_000_000
# Of a file of weights alone the header, 100 bytes for each tensor, and in it the description.
HEADER, DESCRIPTION = 2**23, 2**20
REBUILD = ("torch._utils _rebuild_tensor_v2", "torch._utils _rebuild_parameter")
ORDERED = "collections OrderedDict"


def find_checkpoint(path: str | Path) -> Path:
    """The checkpoint that a path means: of a run folder the best one, else the last."""
    path = Path(path).expanduser()
    if not path.is_dir():
        return path
    for name in ("best.ckpt", "last.ckpt"):
        if (path / name).is_file():
            return path / name
    raise FileNotFoundError(f"expected best.ckpt or last.ckpt in {path}, found neither.")


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """The contents of a training checkpoint, on the CPU.

    No code that the file may carry is run, no function called that a checkpoint does not need,
    and tensors are left in the file until they are used.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is no readable checkpoint.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"expected a checkpoint, found no file {path}.")
    try:
        _check_archive(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        _check_tensors(checkpoint)
    except PermissionError:
        raise
    except Exception as error:  # damaged bytes make the unpickler raise almost anything
        # What follows the first sentence is torch's advice to its own callers.
        reason = str(error).strip().split("\n")[0].split(". ")[0][:200]
        raise ValueError(
            f"{path} is not a readable checkpoint (truncated, or no checkpoint at all): {reason}"
        ) from None
    if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get("state_dict"), dict):
        raise ValueError(f"{path} is no training checkpoint: it holds no state_dict.")
    return checkpoint


def write_safetensors(weights: Mapping[str, Tensor], config: Any, path: Path) -> None:
    """Weights, and the description of their flow unless it is None, as a safetensors file."""
    metadata = {"format": "pt"}
    if config is not None:
        try:
            metadata["flow_config"] = json.dumps(config)
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"config must be nested {{class_path, init_args}}: {error}."
            ) from None
    # Layers may share tensors, which the format does not know.
    copies = {name: value.detach().clone().contiguous() for name, value in weights.items()}
    _import_safetensors().save_file(copies, path, metadata)


def read_safetensors(path: Path) -> dict[str, Any]:
    """As :func:`read_checkpoint`: state_dict and, where the file has one, flow_config.

    The format holds numbers alone, and its reader checks their sizes; what is checked here is
    how much there is beside them.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is not readable.
    """
    if not path.is_file():
        raise FileNotFoundError(f"expected a file of weights, found no file {path}.")
    reader = _import_safetensors()
    try:
        with open(path, "rb") as file:
            header = int.from_bytes(file.read(8), "little")
        if header > HEADER:
            raise ValueError(f"it holds {header} bytes beside its tensors")
        with reader.safe_open(path, framework="pt", device="cpu") as file:
            text = (file.metadata() or {}).get("flow_config")
            weights = {name: file.get_tensor(name) for name in file.keys()}
        if text is not None and len(text) > DESCRIPTION:
            raise ValueError(f"its description of the flow has {len(text)} characters")
        config = None if text is None else json.loads(text)
    except PermissionError:
        raise
    except Exception as error:  # the readers raise almost anything
        reason = str(error).strip().split("\n")[0][:200]
        raise ValueError(
            f"{path} is not a readable safetensors file (truncated, or something else): {reason}"
        ) from None
    return {"state_dict": weights, "flow_config": config}


def _import_safetensors() -> ModuleType:
    try:
        import safetensors.torch
    except ImportError:
        raise ImportError(
            "safetensors files need the safetensors package: pip install 'givens-flows[export]'"
        ) from None
    return safetensors.torch


def _check_archive(path: Path) -> None:
    """Refuse what is no archive as torch writes them, or unfolds to more than it seems."""
    size = path.stat().st_size
    _check_end(path, size)
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
            raise ValueError("its contents are compressed")
        if sum(entry.file_size for entry in entries) > size:
            raise ValueError(f"its contents claim to be larger than its {size} bytes")
        # torch's reader does not tell upper from lower case.
        names = [entry.filename.casefold() for entry in entries]
        if len(set(names)) < len(names):
            raise ValueError("it holds two files of one name")
        for entry, name in zip(entries, names, strict=True):
            if name.endswith("data.pkl"):
                if entry.file_size > PICKLE:
                    raise ValueError(f"it holds {entry.file_size} bytes beside its tensors")
                _check_pickle(archive.read(entry))


def _check_end(path: Path, size: int) -> None:
    """Refuse archives in which two readers would find different directories."""
    with open(path, "rb") as file:
        file.seek(max(0, size - 98))
        end = file.read()
    if len(end) < 22 or end[-22:-18] != b"PK\5\6" or end[-2:] != bytes(2):
        raise ValueError("it does not end as an archive does")
    length, start = struct.unpack("<II", end[-10:-2])
    place = size - 22
    if end[-42:-38] == b"PK\6\7":
        length, start = struct.unpack("<QQ", end[-58:-42])
        place = size - 98
        if end[-98:-94] != b"PK\6\6" or struct.unpack("<Q", end[-34:-26])[0] != place:
            raise ValueError("its directory is not where it should be")
        if end[-10:-2] not in (struct.pack("<II", length, start), b"\xff" * 8):
            raise ValueError("it has two directories")
    if start + length != place:
        raise ValueError("its directory is not where it should be")


def _check_pickle(data: bytes) -> None:
    """Refuse calls that no checkpoint needs; torch's reader allows some that fill the memory."""
    stack: list[Any] = []
    memo: dict[int, Any] = {}
    for number, (operation, argument, _) in enumerate(pickletools.genops(data)):
        name = operation.name
        if number > OPERATIONS:
            raise ValueError(f"it takes more than {OPERATIONS} operations to read")
        if name in ("GLOBAL", "STACK_GLOBAL", "INST", "OBJ", "NEWOBJ", "NEWOBJ_EX"):
            if name != "GLOBAL" or not _is_plain(argument):
                raise ValueError(f"it asks for {argument or name}")
            stack.append(argument)
        elif name == "REDUCE":
            arguments, function = stack.pop(), stack.pop()
            empty = function == ORDERED and arguments == "EMPTY_TUPLE"
            if function not in REBUILD and not empty:
                raise ValueError(f"it calls {function}")
            stack.append(None)
        elif "PUT" in name:
            memo[argument] = stack[-1]
        elif name == "MEMOIZE":
            memo[len(memo)] = stack[-1]
        elif "GET" in name:
            stack.append(memo[argument])
        else:
            before = list(operation.stack_before)
            if pickletools.markobject in before:
                while stack.pop() is not pickletools.markobject:
                    pass
                before = before[: before.index(pickletools.markobject)]
            for _ in before:
                stack.pop()
            for kind in operation.stack_after:
                mark = kind is pickletools.markobject
                stack.append(pickletools.markobject if mark else name)


def _is_plain(name: str) -> bool:
    """Whether a name in a pickle is that of a tensor's parts, or of a type of numbers."""
    module, _, kind = name.partition(" ")
    is_type = module == "torch" and isinstance(getattr(torch, kind, None), torch.dtype)
    is_storage = module in ("torch", "torch.storage") and kind.endswith("Storage")
    return name in REBUILD or name == ORDERED or is_type or is_storage


def _check_tensors(checkpoint: Any) -> None:
    """Refuse tensors of more numbers than are stored, which grow as soon as they are copied."""
    seen, waiting = set(), [checkpoint]
    while waiting:
        value = waiting.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, Tensor):
            stored = value.untyped_storage().nbytes() if value.device.type == "cpu" else 0
            if value.numel() * value.element_size() > stored:
                raise ValueError(f"a tensor of shape {tuple(value.shape)} is stored in part only")
        elif isinstance(value, Mapping):
            waiting += [*value.keys(), *value.values()]
        elif isinstance(value, list | tuple | set):
            waiting += value


def build(config: Any, size: int) -> Any:
    """Objects from nested {class_path, init_args}, as training configs write them.

    Only names inside this library are followed, so that a checkpoint from a stranger can
    build nothing else; and nothing much larger than the file that describes it.

    Args:
        config: What to build.
        size: Bytes of the file.

    Raises:
        ValueError: If it cannot be built, or is larger than that.
    """
    _check_sizes(config, size)
    with _at_most(size + SPARE, size):
        return _build(config)


def _check_sizes(config: Any, size: int) -> None:
    """Refuse n where n^2 numbers, as a rotation of n features holds, are far too many."""
    waiting, nodes = [("", config, 0)], 0
    levels = 1
    products = [1]
    while waiting:
        name, value, depth = waiting.pop()
        nodes += 1
        if nodes > NODES or depth > DEPTH:
            raise ValueError("the description of the flow is too large or too deep.")
        if isinstance(value, Mapping):
            waiting += [(str(key), part, depth + 1) for key, part in value.items()]
        elif isinstance(value, list | tuple):
            waiting += [(name, part, depth + 1) for part in value]
            if all(isinstance(part, int) for part in value):
                products.append(math.prod(value))
        elif isinstance(value, int):
            most = MOST_LEVELS if name == LEVELS else math.isqrt(size + SPARE)
            if abs(value) > most and name != "seed":
                raise _too_large(f"{name} {value}", size)
            levels = max(levels, value) if name in (LEVELS, "bins") else levels
    if max(products) * levels > size + 16 * SPARE:
        raise _too_large(f"{max(products)} features of {levels} levels", size)


def _too_large(what: str, size: int) -> ValueError:
    return ValueError(
        f"a flow with {what} does not belong to a checkpoint of {size} bytes: if it does, build "
        "the flow yourself and pass it, load(path, flow)."
    )


@contextmanager
def _at_most(numbers: int, size: int) -> Iterator[None]:
    """Modules made in this thread may together hold so many numbers."""
    thread, left = threading.get_ident(), numbers

    def count(module: nn.Module, name: str, value: Tensor | None) -> None:
        nonlocal left
        if value is not None and threading.get_ident() == thread:
            left -= value.numel() + MODULE
            if left < 0:
                raise _too_large(f"more than {numbers} numbers", size)

    hooks = [
        register_module_parameter_registration_hook(count),
        register_module_buffer_registration_hook(count),
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _build(config: Any) -> Any:
    if isinstance(config, list | tuple):
        return [_build(item) for item in config]
    if not (isinstance(config, Mapping) and "class_path" in config):
        return config
    name = str(config["class_path"])
    module_name, _, class_name = name.rpartition(".")
    if module_name != "flows" and not module_name.startswith("flows."):
        raise ValueError(
            f"a checkpoint may name only classes of flows, got {name}: build the flow "
            "yourself and pass it, load(path, flow)."
        )
    try:
        target = getattr(importlib.import_module(module_name), class_name)
    except (ImportError, AttributeError):
        raise ValueError(f"this version of flows has no {name}.") from None
    if not (isinstance(target, type) and issubclass(target, nn.Module)):
        raise ValueError(f"expected the name of a layer or flow, got {name}.")
    arguments = {key: _build(value) for key, value in (config.get("init_args") or {}).items()}
    try:
        return target(**arguments)
    except (TypeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{name} cannot be built from its init_args: {reason}") from None
