"""The experiments on online weights, at their smallest."""

from __future__ import annotations

from benchmarks.quality.online import digits
from benchmarks.quality.online.classification import one_seed, steps_to, summary


def test_one_seed() -> None:
    runs = [one_seed(digits.make_world(digits.linear_probe, 60, noise=0.5, seed=0), 0.5)]
    assert {len(curve) for curve in runs[0]["curves"].values()} == {6}
    rows = {row["selection"]: row["accuracy"][0] for row in summary(runs)}
    assert rows["oracle"] > rows["SGD"]
    assert rows["mimic, online, all layers"] > rows["SGD"]
    assert rows["in-run influence, online"] > rows["SGD"]
    assert runs[0]["f1"]["share known"] > 0.85  # half of the labels are wrong


def test_steps_to() -> None:
    assert steps_to([0.1, 0.5, 0.4, 0.6], 0.45, every=10) == 20
    assert steps_to([0.1, 0.2], 0.45, every=10) is None
