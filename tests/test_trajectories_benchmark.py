"""The experiment on trajectories, at its smallest."""

from __future__ import annotations

from benchmarks.quality.trajectories import EARLY, one_seed, summary


def test_one_seed() -> None:
    found = summary([one_seed(0, epochs=3)])
    assert EARLY >= 3
    whole = {name: values[0] for name, values in found["all epochs"].items()}
    for name in ("AUM", "confidence (data map)", "EL2N, first 5", "GraNd, first 5"):
        assert whole[name] > 0.9, name
    assert 0.4 < whole["random"] < 0.6
    assert found["first epochs"]["AUM"] == [whole["AUM"]]  # three epochs are all that there were
    assert found["network"]["test accuracy"][0] > 0.8
