"""What the library promises, tried at length; under half an hour on two cores.

python -m benchmarks.stress                     # or make stress
python -m benchmarks.stress --parts crashes --kills 3
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from benchmarks.report import show_stress
from benchmarks.stress.crashes import killed_runs
from benchmarks.stress.files import hostile_files
from benchmarks.stress.numbers import bfloat16, orthogonality, trained_flows
from benchmarks.stress.processes import stopped_processes, two_nodes, two_processes
from benchmarks.timing import progress, write_json


def crashes(given: argparse.Namespace, folder: Path) -> Iterator[dict]:
    yield killed_runs(folder, kills=given.kills, stops=given.kills // 4, epochs=given.epochs)


def processes(given: argparse.Namespace, folder: Path) -> Iterator[dict]:
    yield two_processes(folder, epochs=20)
    yield two_nodes(folder, epochs=20)
    yield stopped_processes(folder, epochs=3)


def files(given: argparse.Namespace, folder: Path) -> Iterator[dict]:
    yield from hostile_files(folder, cases=given.cases)


def numbers(given: argparse.Namespace, folder: Path) -> Iterator[dict]:
    yield from orthogonality(steps=given.steps)
    yield from trained_flows(steps=given.steps // 20)
    yield bfloat16(folder, epochs=given.steps // 400)


PARTS: dict[str, Callable[[argparse.Namespace, Path], Iterator[dict]]] = {
    "crashes": crashes,
    "processes": processes,
    "files": files,
    "numbers": numbers,
}


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.stress", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--kills", type=int, default=20, help="SIGKILLs, and a fourth SIGTERMs")
    parser.add_argument("--epochs", type=int, default=400, help="of the run that is killed")
    parser.add_argument("--cases", type=int, default=2000, help="damaged files")
    parser.add_argument("--steps", type=int, default=10_000, help="of an optimizer")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, help="JSON file instead of benchmarks/results/...")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    rows = []
    for part in given.parts:
        with tempfile.TemporaryDirectory() as folder:
            start = time.perf_counter()
            for row in _until_an_error(PARTS[part](given, Path(folder))):
                now = time.perf_counter()
                rows.append({"part": part, **row, "seconds": now - start})
                progress(f"{part}: {row['what']}, {now - start:.0f} s")
                start = now
    path = write_json("stress", rows, device="cpu", path=given.output)
    show_stress(rows)
    print(path)
    sys.exit(0 if all(row["ok"] for row in rows) else 1)


def _until_an_error(rows: Iterator[dict]) -> Iterator[dict]:
    """The rows of a part; an error is one that breaks its promise, and the other parts go on."""
    try:
        yield from rows
    except Exception as error:
        words = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        yield {
            "what": "what came next",
            "result": "error",
            "asked": "",
            "ok": False,
            "wrong": [words],
        }


if __name__ == "__main__":
    main()
