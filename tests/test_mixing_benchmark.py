"""The benchmark of mixings trains every flow and shows what it found."""

import math

import pytest

from benchmarks import mixing
from benchmarks.report import show_mixing


@pytest.mark.parametrize(("data", "name"), [("two_moons", "lu"), ("digits", "householder")])
def test_a_flow_of_each_kind_trains_for_its_time(data, name):
    row = {"data": data, "mixing": name, "seed": 0, "seconds": 0.05, "clock": "wall"}
    found = mixing.run(row | {"threads": 1, "points": 500})
    assert math.isfinite(found["loss"]) and found["standard_error"] > 0
    assert found["steps"] > 0 and found["wall_seconds"] >= 0.05


def test_median_and_range_of_the_seeds_are_shown_and_failures_are_told(capsys):
    shared = {"data": "digits", "mixing": "lu", "seconds": 2.0, "clock": "wall"}
    rows = [
        shared | {"seed": seed, "loss": loss, "steps": steps, "parameters": 1234}
        for seed, (loss, steps) in enumerate([(2.5, 10), (2.25, 30), (2.75, 20)])
    ]
    rows.append(shared | {"mixing": "angles", "seed": 0, "error": "out of memory"})
    show_mixing(rows, "a CPU")
    shown = capsys.readouterr().out
    line = next(line for line in shown.splitlines() if line.split()[:1] == ["lu"])
    assert line.split() == ["lu", "2.500", "2.250", "2.750", "10", "1,234"]
    assert "median of 3 seeds" in shown and "angles, digits, seed 0: out of memory" in shown
