"""Cost of an orthogonal weight: ours against torch's, in units of one dense product.

    python -m benchmarks.orthogonal --sizes 12 48 192

Timed is a training step's worth of work: the weight from its parameters, its product with a
batch of 256, and the backward pass of both. A plain dense weight is the floor.
"""

import argparse
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import orthogonal

from benchmarks.timing import device_name, interleaved, write_json
from flows import givens

BATCH = 256


def step(weight: Callable[[], Tensor], x: Tensor) -> Callable[[], None]:
    """Weight, product with a batch, and backward."""

    def run() -> None:
        (x @ weight().mT).square().sum().backward()

    return run


def candidates(n: int, device: str) -> dict[str, Callable[[], None]]:
    """What is timed at size n: names to steps."""
    x = torch.randn(BATCH, n, device=device)
    dense = nn.Parameter(torch.randn(n, n, device=device) / n**0.5)
    steps = {"dense": step(lambda: dense, x)}
    for schedule in (givens.crossing(n), givens.odd_even(n)):
        angles = nn.Parameter(torch.randn(schedule.num_angles, device=device))
        steps[f"ours, {schedule.name.partition('(')[0]}"] = step(
            lambda angles=angles, schedule=schedule: givens.matrix(angles, schedule), x
        )
    for kind in ("matrix_exp", "cayley", "householder"):
        layer = orthogonal(nn.Linear(n, n, bias=False, device=device), orthogonal_map=kind)
        steps[f"torch {kind}"] = step(lambda layer=layer: layer.weight, x)
    return steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--sizes", type=int, nargs="+", default=[2, 12, 48, 192])
    parser.add_argument("--seconds", type=float, default=1.0, help="per candidate and size")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    given = parser.parse_args()
    print(f"forward + backward, batch {BATCH}, milliseconds (times the dense weight's)")
    print(device_name(given.device))
    rows = []
    for n in given.sizes:
        torch.manual_seed(0)
        times = interleaved(
            candidates(n, given.device), seconds=given.seconds, device=given.device
        )
        for name, milliseconds in times.items():
            ratio = milliseconds / times["dense"]
            print(f"n = {n:5}  {name:20} {milliseconds:9.3f} ({ratio:.1f})")
            rows.append({"n": n, "name": name, "ms": milliseconds, "over_dense": ratio})
    print(write_json("orthogonal", rows, device=given.device))


if __name__ == "__main__":
    main()
