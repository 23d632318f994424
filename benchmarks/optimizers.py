r"""Optimizers on our own flows, after equal time and after equal steps.

    python -m benchmarks.optimizers --threads 1 --at-once 2 --clock processor    # 40 minutes
    python -m benchmarks.optimizers --tasks breast_cancer --optimizers NG+ --seeds 0 --scale 0.33 \
        --settings '{"lr": 0.3, "damping": 10}' --output try.json     # one of the search
    python -m benchmarks.optimizers --plot                            # docs/optimizers.png

Flow, data, batch size, clipping and the learning rate of AdamW are those of a task's config in
``configs``; dropout and weight decay as well, without its average of parameters. Optimizers of
matrices train the weights of conditioners, AdamW everything else at the config's rate. The rate
falls to zero as a cosine over time or steps. Of 20 validations on the way the best counts, on
the test split: KL to the truth in nats, nats, or bits/dim.

Every optimizer has its own rate (and damping) for each task, from a small search: see SETTINGS.
"""

import argparse
import importlib
import json
import statistics
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn

import flows
from benchmarks.plot import draw_optimizers
from benchmarks.race import CLOCKS, race, train
from benchmarks.report import show_optimizers
from benchmarks.timing import device_name, read_json, write_json
from flows.objectives import bits_per_dim
from flows.optim import SENG, NGPlus, ProxProp, param_groups_for

__all__ = ["OPTIMIZERS", "SETTINGS", "TASKS", "Task", "make_optimizer", "run", "summary"]

ROOT = Path(__file__).parents[1]
FIGURE = ROOT / "docs" / "optimizers.png"
# By task: config, seconds of training, and steps of about as long with AdamW.
TASKS = {
    "two_moons": ("configs/toy/two_moons.yaml", 12.0, 500),
    "checkerboard": ("configs/toy/checkerboard.yaml", 12.0, 500),
    "breast_cancer": ("configs/tabular/breast_cancer.yaml", 8.0, 1200),
    "digits": ("configs/images/digits.yaml", 45.0, 500),
}
OPTIMIZERS = ("Adam", "AdamW", "Muon", "NG+", "SENG", "ProxProp")
BUDGETS = ("time", "steps")
# Options of the optimizer of the matrices, by task: the best on validation, seed 0, of runs of a
# third of the steps. Tried were for Adam and AdamW the config's rate, twice and four times it; for
# Muon rates of 0.003, 0.01 and 0.03; for NG+ and SENG three to eight pairs of damping (0.01 to 10)
# and rate; for ProxProp three pairs before SGD and three to five before Adam.
_ADAM = {"two_moons": 1e-2, "checkerboard": 4e-2, "breast_cancer": 1.2e-2, "digits": 2e-3}
SETTINGS: dict[str, dict[str, dict[str, Any]]] = {
    "Adam": {task: {"lr": lr} for task, lr in _ADAM.items()},
    "AdamW": {task: {"lr": lr} for task, lr in _ADAM.items()},
    "Muon": {
        "two_moons": {"lr": 0.03},
        "checkerboard": {"lr": 0.03},
        "breast_cancer": {"lr": 0.03},
        "digits": {"lr": 0.01},
    },
    "NG+": {
        "two_moons": {"lr": 0.3, "damping": 0.1},
        "checkerboard": {"lr": 0.2, "damping": 0.1},
        "breast_cancer": {"lr": 0.3, "damping": 10.0},
        "digits": {"lr": 0.1, "damping": 0.1},
    },
    "SENG": {
        # Of all 2,048 samples of a batch a refresh would take seconds.
        "two_moons": {"lr": 0.03, "damping": 0.1, "max_samples": 256},
        "checkerboard": {"lr": 0.3, "damping": 1.0, "max_samples": 256},
        "breast_cancer": {"lr": 0.1, "damping": 10.0},
        "digits": {"lr": 0.1, "damping": 10.0},
    },
    "ProxProp": {
        "two_moons": {"lr": 0.03, "tau_theta": 0.01, "follow": "adam"},
        "checkerboard": {"lr": 0.03, "tau_theta": 0.01, "follow": "adam"},
        "breast_cancer": {"lr": 0.01, "tau_theta": 0.01, "follow": "adam"},
        "digits": {"lr": 2e-3, "tau_theta": 0.01, "follow": "adam"},
    },
}


class Task:
    """A flow, its data and how its config trains it.

    Args:
        name: Of ``TASKS``.
    """

    def __init__(self, name: str) -> None:
        config = yaml.safe_load((ROOT / TASKS[name][0]).read_text())
        model, data = config["model"], config["data"]
        self.lr: float = model["lr"]
        self.weight_decay: float = model.get("weight_decay", 0.0)
        self.clip: float = config["trainer"]["gradient_clip_val"]
        self._flow = model["flow"]
        module, _, kind = data["class_path"].rpartition(".")
        self.data = getattr(importlib.import_module(module), kind)(**data["init_args"])
        self.data.setup("fit")
        self.data.setup("test")

    def make_flow(self) -> nn.Module:
        """A new flow, its data-dependent layers initialized."""
        recipe = getattr(flows.recipes, self._flow["class_path"].rpartition(".")[2])
        flow = recipe(**self._flow["init_args"])
        with torch.no_grad():
            flow.log_prob(self.data.splits["train"][0][:2048])
        return flow

    def batches(self) -> Iterator[Tensor]:
        loader = self.data.train_dataloader()
        epoch = 0
        while True:
            loader.set_epoch(epoch)
            yield from (batch[0] for batch in loader)
            epoch += 1

    @torch.no_grad()
    def score(self, flow: nn.Module, split: str) -> float:
        """KL in nats where the truth is known, bits/dim of images, else nats per sample."""
        inputs = self.data.splits[split][0]
        torch_state = torch.get_rng_state()
        torch.manual_seed(1)  # of the noise between grey levels
        values = []
        for part in inputs.split(1000):
            log_prob = flow.log_prob(part)
            if self.data.density is not None:
                values.append(self.data.density.log_prob(part) - log_prob)
            elif self.data.grey_levels is not None:
                bits = torch.tensor(float(self.data.grey_levels)).log2().item()
                values.append(bits_per_dim(log_prob, part[0].numel(), bits=bits))
            else:
                values.append(-log_prob)
        torch.set_rng_state(torch_state)
        return torch.cat(values).double().mean().item()


class MuonAndAdamW:
    """Muon for matrices and AdamW for the rest, stepped as one.

    torch's Muon takes two axes only; filters come to it flattened, as in the published code.
    """

    def __init__(self, flow: nn.Module, *, lr: float, adamw_lr: float, decay: float) -> None:
        self.weights = [p for p in param_groups_for(flow)[0]["params"] if p.ndim > 1]
        chosen = set(map(id, self.weights))
        others = [p for p in flow.parameters() if id(p) not in chosen]
        # Views: what Muon changes are the weights.
        self.matrices = [nn.Parameter(p.detach().flatten(1)) for p in self.weights]
        self.muon = torch.optim.Muon(
            self.matrices, lr=lr, weight_decay=decay / lr, adjust_lr_fn="match_rms_adamw"
        )
        self.adamw = torch.optim.AdamW(others, lr=adamw_lr, weight_decay=0.0, fused=True)
        self.param_groups = self.muon.param_groups + self.adamw.param_groups

    def zero_grad(self) -> None:
        self.adamw.zero_grad()
        for weight in self.weights:
            weight.grad = None

    def step(self) -> None:
        for matrix, weight in zip(self.matrices, self.weights, strict=True):
            matrix.grad = weight.grad.flatten(1)
        self.muon.step()
        self.adamw.step()


def make_optimizer(name: str, task: Task, settings: dict[str, Any], flow: nn.Module) -> Any:
    """An optimizer whose weights shrink per step as the config's AdamW would shrink them."""
    if name in ("Adam", "AdamW"):
        matrices, others = (group["params"] for group in param_groups_for(flow))
        # Where the config has no decay, that of torch's default tells the two apart.
        decay = (task.weight_decay * task.lr / settings["lr"] or 0.01) if name == "AdamW" else 0.0
        kinds = [
            ([p for p in matrices if p.ndim > 1], settings["lr"], decay),
            ([p for p in matrices if p.ndim == 1], settings["lr"], 0.0),
            (others, task.lr, 0.0),
        ]
        groups = [
            {"params": kind, "lr": lr, "weight_decay": decay} for kind, lr, decay in kinds if kind
        ]
        return torch.optim.AdamW(groups, fused=True)
    decay = task.weight_decay * task.lr
    if name == "Muon":
        return MuonAndAdamW(flow, lr=settings["lr"], adamw_lr=task.lr, decay=decay)
    make = {"NG+": NGPlus, "SENG": SENG, "ProxProp": ProxProp}[name]
    options = settings | {"weight_decay": decay / settings["lr"], "adamw_lr": task.lr}
    return make(flow, **options)


def run(row: dict) -> dict:
    """Train a row's flow by its optimizer; returns what is found of it."""
    task = Task(row["task"])
    torch.manual_seed(row["seed"])
    flow = task.make_flow()
    settings = row.get("settings", SETTINGS[row["optimizer"]][row["task"]])
    flow, took = train(
        flow,
        task.batches(),
        seconds=row["seconds"],
        steps=row["steps"] if row["budget"] == "steps" else None,
        clock=CLOCKS[row["clock"]],
        lr=task.lr,
        clip=task.clip,
        validate=lambda flow: task.score(flow, "val"),
        make_optimizer=partial(make_optimizer, row["optimizer"], task, settings),
    )
    # A run so short that it met no validation has its end.
    took["curve"] = took["curve"] or [(took["wall_seconds"], task.score(flow, "val"))]
    scores = {"val": min(loss for _, loss in took["curve"]), "test": task.score(flow, "test")}
    took["taken"] = took.pop("steps")  # the row itself says how many a budget of steps is
    return scores | {"settings": settings, **took}


def summary(rows: list[dict]) -> dict[tuple[str, str, str], dict]:
    """By task, budget and optimizer the row whose test score is the median over seeds."""
    groups: dict[tuple[str, str, str], list[dict]] = {}
    for row in rows:
        if "test" in row:
            key = row["task"], row["budget"], row["optimizer"]
            groups.setdefault(key, []).append(row)
    return {key: _median(group) for key, group in groups.items()}


def _median(group: list[dict]) -> dict:
    middle = statistics.median_low(row["test"] for row in group)
    return next(row for row in group if row["test"] == middle)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--optimizers", nargs="+", choices=OPTIMIZERS, default=list(OPTIMIZERS))
    parser.add_argument("--budgets", nargs="+", choices=BUDGETS, default=list(BUDGETS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--settings", type=json.loads, help="options as JSON, to try others")
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="what a second is")
    parser.add_argument("--scale", type=float, default=1.0, help="times seconds and steps")
    parser.add_argument("--threads", type=int, default=1, help="of every process")
    parser.add_argument("--at-once", type=int, default=1, help="processes side by side")
    parser.add_argument("--resume", action="store_true", help="go on with an interrupted run")
    parser.add_argument("--output", type=Path, help="JSON file instead of benchmarks/results/...")
    parser.add_argument("--plot", action="store_true", help="draw the JSON instead of measuring")
    parser.add_argument("--figure", type=Path, default=FIGURE, help="where --plot draws")
    parser.add_argument("--run", help="one row as JSON: what every process is called with")
    given = parser.parse_args()
    if given.run:
        row = json.loads(given.run)
        torch.set_num_threads(row["threads"])
        print(json.dumps(run(row)))
        return
    torch.set_num_threads(given.threads)
    if given.plot:
        content = json.loads(given.output.read_text()) if given.output else None
        content = content or read_json("optimizers", device="cpu")
        draw_optimizers(content, summary(content["rows"]), given.figure)
        print(given.figure)
        return
    others = {} if given.settings is None else {"settings": given.settings}
    rows = [
        {
            "task": task,
            "optimizer": optimizer,
            "seed": seed,
            "budget": budget,
            "seconds": TASKS[task][1] * given.scale,
            "steps": round(TASKS[task][2] * given.scale),
            "clock": given.clock,
            "threads": given.threads,
            **others,
        }
        for seed in given.seeds
        for task in given.tasks
        for budget in given.budgets
        for optimizer in given.optimizers
    ]
    rows = race(
        "optimizers", rows, threads=given.threads, at_once=given.at_once, resume=given.resume
    )
    file = write_json("optimizers", rows, device="cpu", path=given.output, at_once=given.at_once)
    show_optimizers(rows, summary(rows), device_name("cpu"))
    print(file)


if __name__ == "__main__":
    main()
