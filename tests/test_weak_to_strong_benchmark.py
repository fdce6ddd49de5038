"""The experiment on weak supervision, at its smallest."""

from __future__ import annotations

import pytest

from benchmarks.quality import weak_to_strong
from benchmarks.quality.weak_to_strong import CEILING, POOL, one_seed, summary


def test_one_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weak_to_strong, "BATCH", 24)
    run = one_seed(0, steps=60)
    assert 0.5 < run["weak"] < 0.85  # there is something to teach, and something to recover
    assert run["right"]["surest half"] > run["right"]["all"]
    assert 0 < run["agreed"] < POOL
    rows = {row["training"]: row for row in summary([run])}
    assert rows[CEILING]["pgr"] == [1.0]
    assert rows["weak labels"]["accuracy"][0] > 0.3  # it has learned from them
    with pytest.raises(ValueError, match="no gap to recover"):
        summary([run | {"weak": 1.0}])
