"""Short versions of ``python -m benchmarks.stress``."""

import math

import pytest
import torch

from benchmarks.report import show_stress
from benchmarks.stress.crashes import killed_runs
from benchmarks.stress.files import KINDS, hostile_files
from benchmarks.stress.numbers import orthogonality, trained_flows
from datasets.images import Digits
from flows.objectives import bits_per_dim
from flows.recipes import Glow


def test_a_killed_run_ends_like_one_left_alone(tmp_path):
    found = killed_runs(tmp_path, kills=1, stops=1, epochs=16)
    assert not found["different"] and found["ok"], found


def test_damaged_files_are_refused_in_one_line(tmp_path):
    rows = list(hostile_files(tmp_path, cases=20 * len(KINDS)))
    assert len(rows) == len(KINDS)
    for row in rows:
        assert row["ok"], row
    assert sum(row["refused"] for row in rows) > 100


def test_rotations_stay_orthogonal_while_they_learn():
    for row in orthogonality(steps=100):
        assert row["ok"], row


def test_densities_integrate_to_one_and_stay_exact_far_away():
    rows = list(trained_flows(steps=10))
    assert len(rows) == 15
    for row in rows:
        assert row["ok"], row


def test_bfloat16_keeps_bits_per_dim():
    data = Digits()
    data.setup()
    train, test = (data.splits[name][0] for name in ("train", "test"))
    flow = Glow((1, 8, 8), grey_levels=17, levels=2, steps=2, hidden_features=16)
    flow(train)
    optimizer = torch.optim.Adam(flow.parameters(), lr=2e-3)
    for _ in range(20):
        optimizer.zero_grad()
        (-flow(train[:200]).mean()).backward()
        optimizer.step()
    flow.eval()
    bits = []
    for enabled in (False, True):
        torch.manual_seed(1)  # the same noise
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            log_prob = flow(test)
        bits.append(bits_per_dim(log_prob.float(), 64, bits=math.log2(17)).mean())
    assert bits[0] != bits[1]
    torch.testing.assert_close(bits[0], bits[1], atol=0.01, rtol=0)


@pytest.mark.parametrize("ok", [True, False])
def test_the_table_names_what_was_broken(capsys, ok):
    row = {"what": "a promise", "result": "1", "asked": "2", "ok": ok, "seconds": 1.0}
    show_stress([row | {"wrong": [] if ok else ["truncated: hangs"]}])
    printed = capsys.readouterr().out
    assert ("BROKEN" in printed) != ok and ("truncated: hangs" in printed) != ok
