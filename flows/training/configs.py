"""Is a file a config at all? Found out before it is given to those who trust it."""

from collections.abc import Iterable
from pathlib import Path

import yaml

__all__ = ["check_config"]

# PyYAML may have been built without libyaml.
LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
# A resolved config has 10 kB, 300 values and a depth of 10.
BYTES, VALUES, DEPTH, LENGTH = 2**20, 20_000, 50, 1000


def check_config(path: Path) -> None:
    """Refuse what is no YAML mapping, or one that unfolds to far more than it seems.

    Raises:
        ValueError: If it is too large, too deep, or no YAML.
    """
    if not path.is_file():
        return  # whoever opens it says so
    if path.stat().st_size > BYTES:
        raise ValueError(f"{path}: expected a config of at most {BYTES} bytes.")
    try:
        _check_events(yaml.parse(path.read_bytes(), Loader=LOADER))
    except (yaml.YAMLError, ValueError) as error:
        raise ValueError(f"{path} is no config: {' '.join(str(error).split())}") from None


def _check_events(events: Iterable[yaml.Event]) -> None:
    """Walk along a document without building it."""
    counts, names, sizes = [0], [], {}
    first = True
    for event in events:
        size = 0
        match event:
            case yaml.MappingStartEvent() | yaml.SequenceStartEvent():
                if first and isinstance(event, yaml.SequenceStartEvent):
                    raise ValueError("expected a mapping, got a list")
                counts.append(1)
                names.append(event.anchor)
                if len(counts) > DEPTH:
                    raise ValueError(f"expected at most {DEPTH} levels")
            case yaml.MappingEndEvent() | yaml.SequenceEndEvent():
                size = sizes[names.pop()] = counts.pop()
            case yaml.ScalarEvent():
                if first:
                    raise ValueError(f"expected a mapping, got {event.value[:40]!r}")
                if len(event.value) > LENGTH:
                    raise ValueError(f"expected values of at most {LENGTH} characters")
                size = sizes[event.anchor] = 1
            case yaml.AliasEvent():
                if event.anchor not in sizes:
                    raise ValueError(f"alias {event.anchor!r} stands for nothing before it")
                size = sizes[event.anchor]
            case _:
                continue
        first = False
        counts[-1] += size
        if counts[-1] > VALUES:
            raise ValueError(f"expected at most {VALUES} values")
    if first:
        raise ValueError("it is empty")
