"""Wilcoxon's interval, beside its definition by all signs and scipy's statistic."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from assay.two_stage.intervals import LEAST, paired_interval


@pytest.mark.parametrize("count", [6, 7, 10])
def test_the_interval_holds_what_a_test_of_signs_and_ranks_does_not_refuse(count):
    """Inverted by brute force: the shifts whose signed-rank statistic is not among the rarest 2.5 % at either end."""
    rng = np.random.default_rng(count)
    values = rng.normal(0.3, 1, count)
    found = paired_interval(values.tolist())
    ranks = np.arange(1, count + 1)
    everything = np.array([np.dot(ranks, signs) for signs in itertools.product((0, 1), repeat=count)])

    def held(shift: float) -> bool:
        moved = values - shift
        order = np.abs(moved).argsort().argsort() + 1
        statistic = order[moved > 0].sum()
        return bool(min((everything <= statistic).mean(), (everything >= statistic).mean()) > 0.025)

    width = found.high - found.low
    for inside, shift in ((True, found.low + 1e-9 * width), (True, found.high - 1e-9 * width)):
        assert held(shift) is inside
    for shift in (found.low - 1e-6 * width, found.high + 1e-6 * width):
        assert not held(shift)
    assert found.low < found.estimate < found.high


def test_the_interval_holds_the_centre_as_often_as_it_says():
    rng = np.random.default_rng(0)
    held = 0
    for draw in rng.laplace(1.0, 1.0, (2000, 8)):
        found = paired_interval(draw.tolist())
        held += found.low <= 1.0 <= found.high
    assert 0.945 < held / 2000 < 0.985  # 8 differences have one of 96.1 %


def test_equal_differences_are_sure():
    found = paired_interval([0.5] * LEAST)
    assert (found.estimate, found.low, found.high) == (0.5, 0.5, 0.5)


def test_too_few_differences_have_none():
    with pytest.raises(ValueError, match="5 are too few for an interval of 95%; expected at least 6"):
        paired_interval([1.0] * 5)
