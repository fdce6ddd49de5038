"""CCS: how much comes from where, against the paper's algorithm written out."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from assay.select import ccs, random
from assay.select.strata import shares
from tests.select.test_rules import table


def test_budgets_are_those_of_the_algorithm_and_sum_exactly() -> None:
    rng = np.random.default_rng(0)
    for _ in range(200):
        sizes = rng.integers(0, 12, rng.integers(1, 9))
        wanted = int(rng.integers(0, sizes.sum() + 3))
        left, strata, expected = wanted, list(enumerate(sizes.tolist())), np.zeros(len(sizes), int)
        while strata:
            smallest = min(strata, key=lambda stratum: stratum[1])
            expected[smallest[0]] = min(smallest[1], left // len(strata))
            left -= expected[smallest[0]]
            strata.remove(smallest)
        got = shares(sizes, wanted)
        np.testing.assert_array_equal(got, expected)
        assert got.sum() == min(wanted, sizes.sum())


def test_every_stratum_is_represented_and_the_hardest_are_not() -> None:
    scores = (np.random.default_rng(1).normal(size=1000) ** 2).astype(np.float32).astype(float)
    selection = ccs(table(scores), "s", 0.2, 0, hard="high", drop=0.1, strata=20)
    assert selection.mask.sum() == 200
    limit = np.sort(scores)[899]
    assert scores[selection.mask].max() <= limit
    step = (limit - scores.min()) / 20
    place = np.minimum((scores - scores.min()) / step, 19).astype(int)
    left = scores <= limit
    assert set(place[left]) == set(place[selection.mask])
    assert place[selection.mask].mean() > place[random(table(scores), 0.2, 0).mask].mean() + 2
    other = ccs(table(-scores), "s", 0.2, 0, hard="low", drop=0.1, strata=20)
    np.testing.assert_array_equal(other.mask, selection.mask)
    assert (ccs(table(scores), "s", 0.2, 1, hard="high", strata=20).mask != selection.mask).any()
    reasons = np.where(selection.mask, "kept: drawn from its stratum of s", "dropped: not drawn from its stratum of s")
    reasons[scores > limit] = "dropped: among the 100 hardest by s"
    assert selection.reasons.tolist() == reasons.tolist()


def test_rows_without_a_score_and_odd_ranges() -> None:
    scores = np.array([1.0, np.nan, 1.0, 1.0, np.nan])
    selection = ccs(table(scores), "s", 2, 0, hard="high", drop=0)
    assert selection.mask.sum() == 2
    assert not selection.mask[[1, 4]].any()
    assert ccs(table(scores), "s", 0, 0, hard="high").mask.sum() == 0
    hardest = np.array([np.inf, 1.0, 2.0, 3.0])
    assert list(ccs(table(hardest), "s", 3, 0, hard="high", drop=0.25).indices) == [1, 2, 3]
    with pytest.raises(ValueError, match="infinite scores lie in no stratum"):
        ccs(table(hardest), "s", 3, 0, hard="low", drop=0.25)
    with pytest.raises(ValueError, match=r"amount=0.9: 5 rows, but 3 of 5 are left without the hardest 0 by s"):
        ccs(table(scores), "s", 0.9, 0, hard="high", drop=0.1)
    with pytest.raises(ValueError, match=r"drop=1\.0"):
        ccs(table(scores), "s", 1, 0, hard="high", drop=1.0)
    with pytest.raises(ValueError, match="hard=None: expected"):
        ccs(table(scores), "s", 1, 0, hard=None)
    with pytest.raises(ValueError, match="strata=0"):
        ccs(table(scores), "s", 1, 0, hard="high", strata=0)


def test_strata_of_a_range_that_no_float_holds() -> None:
    wide = np.array([-3e38, -2.9e38, 3e38, 2.9e38], np.float32)
    selection = ccs(table(wide), "s", 2, 0, hard="high", drop=0, strata=2)
    assert selection.mask[:2].sum() == selection.mask[2:].sum() == 1


def test_a_column_of_float32_has_the_strata_that_its_numbers_have_in_float64() -> None:
    scores = (np.random.default_rng(2).normal(size=300) * 1e38).astype(np.float32)  # their range is no float32
    wide = pa.table({"s": scores.astype(np.float64)})
    got = ccs(table(scores), "s", 60, 0, hard="low", drop=0)
    np.testing.assert_array_equal(got.mask, ccs(wide, "s", 60, 0, hard="low", drop=0).mask)
    assert got.facts["strata_with_rows"] > 30
