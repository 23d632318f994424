"""What a training step costs with each optimizer of matrices, over one with AdamW.

    python -m benchmarks.optimizer_cost --threads 1    # 10 minutes

The step is that of configs/images/digits.yaml: loss, gradients, clipping, optimizer. A hundred
are timed at once, of which one refreshes what the optimizer keeps; the first two hundred, with
the early refreshes, do not count.
"""

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from benchmarks.optimizers import OPTIMIZERS, SETTINGS, Task, make_optimizer
from benchmarks.report import show_optimizer_cost
from benchmarks.timing import device_name, interleaved, write_json

__all__ = ["cost"]

# Timed at once: as many as the optimizers keep what they know.
STEPS = 100


def cost(names: list[str], turns: int) -> list[dict]:
    """Time of a training step on digits, each optimizer refreshing every 100 steps."""
    task = Task("digits")

    def steps(name: str) -> Callable[[], None]:
        torch.manual_seed(0)
        flow, batches = task.make_flow().train(), task.batches()
        optimizer = make_optimizer(name, task, SETTINGS[name]["digits"], flow)

        def many() -> None:
            for _ in range(STEPS):
                optimizer.zero_grad()
                (-flow.log_prob(next(batches)).mean()).backward()
                nn.utils.clip_grad_norm_(flow.parameters(), task.clip)
                optimizer.step()

        return many

    found = interleaved({name: steps(name) for name in names}, seconds=1.0, turns=turns)
    return [
        {
            "optimizer": name,
            "step_ms": found[name] / STEPS,
            "over_adamw": found[name] / found["AdamW"],
        }
        for name in names
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--optimizers", nargs="+", choices=OPTIMIZERS, default=OPTIMIZERS[1:])
    parser.add_argument("--turns", type=int, default=3, help="timings of each, the median counts")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, help="JSON file instead of benchmarks/results/...")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    names = list(dict.fromkeys(["AdamW", *given.optimizers]))
    rows = cost(names, given.turns)
    file = write_json("optimizer_cost", rows, device="cpu", path=given.output)
    show_optimizer_cost(rows, device_name("cpu"))
    print(file)


if __name__ == "__main__":
    main()
