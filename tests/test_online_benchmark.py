"""The experiment on online weights, at its smallest."""

from __future__ import annotations

from benchmarks.quality.online import linear_probe, one_seed, steps_to, summary


def test_one_seed() -> None:
    runs = [one_seed(linear_probe, 0.5, 0, steps=60)]
    assert {len(curve) for curve in runs[0]["curves"].values()} == {6}
    rows = {row["selection"]: row["accuracy"][0] for row in summary(runs)}
    assert rows["oracle"] > rows["SGD"]
    assert rows["mimic, online, all layers"] > rows["SGD"]
    assert runs[0]["f1"]["share known"] > 0.85  # half of the labels are wrong


def test_steps_to() -> None:
    assert steps_to([0.1, 0.5, 0.4, 0.6], 0.45) == 20
    assert steps_to([0.1, 0.2], 0.45) is None
