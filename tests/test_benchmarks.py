"""The benchmarks run and write what they measured."""

import json
import sys

from benchmarks import orthogonal, timing


def test_orthogonal_writes_ratios_to_a_dense_weight(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(timing, "RESULTS", tmp_path)
    monkeypatch.setattr(sys, "argv", ["orthogonal", "--sizes", "3", "--seconds", "0.01"])
    orthogonal.main()
    (file,) = tmp_path.iterdir()
    rows = json.loads(file.read_text())["rows"]
    assert {row["n"] for row in rows} == {3} and len(rows) == 6
    assert rows[0]["name"] == "dense" and rows[0]["over_dense"] == 1
    assert str(file) in capsys.readouterr().out


def test_candidates_take_turns():
    order = []
    candidates = {name: lambda name=name: order.append(name) for name in "ab"}
    times = timing.interleaved(candidates, seconds=0)
    assert order == list("ab") * 4 and min(times.values()) > 0
