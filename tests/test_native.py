"""Shares of work on torch's threads."""

import pytest

pytest.importorskip("numba")

from flows import native  # noqa: E402


@pytest.mark.parametrize("openmp", [True, False])
def test_shares_cover_all_jobs_once_and_errors_come_out(openmp, monkeypatch):
    if not openmp:
        monkeypatch.setattr(native, "_openmp", lambda: None)
    done = []
    native.parallel(lambda *share: done.append(share), ("given",), 7, 3)
    assert sorted(done) == [("given", 0, 0, 2), ("given", 1, 2, 4), ("given", 2, 4, 7)]

    def fail(k, first, last):
        if k == 1:
            raise RuntimeError("not this share")

    with pytest.raises(RuntimeError, match="not this share"):
        native.parallel(fail, (), 7, 3)
