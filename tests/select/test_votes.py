"""Votes weighed by what they are worth."""

from __future__ import annotations

import math

import numpy as np
import pyarrow as pa
import pytest

from assay import select
from assay.select.selection import Selection


def table(scores, keep="high") -> pa.Table:
    field = pa.field("s", pa.float32(), metadata={"keep": keep})
    schema = pa.schema([pa.field("row", pa.int64()), pa.field("id", pa.string()), field])
    n = len(scores)
    ids = pa.array([str(i) for i in range(n)])
    return pa.Table.from_arrays([pa.array(range(n)), ids, pa.array(np.asarray(scores, np.float32))], schema=schema)


def voter(votes, scored=None) -> Selection:
    votes = np.asarray(votes, bool)
    codes = votes.astype(np.uint8)
    if scored is not None:
        codes[~scored] = 2
        votes = votes & scored
    return Selection("a voter", votes, codes, ("no", "yes", "unscored"))


def test_the_label_model_beats_the_majority_when_voters_differ():
    rng = np.random.default_rng(5)
    truth = rng.random(20_000) < 0.6
    accuracies = [0.95, 0.9, 0.6, 0.55, 0.55]
    votes = [np.where(rng.random(len(truth)) < a, truth, ~truth) for a in accuracies]
    chosen = select.vote([voter(v) for v in votes])
    majority = np.sum(votes, axis=0) >= 3
    assert (chosen.mask == truth).mean() > (majority == truth).mean() + 0.04
    for i, accuracy in enumerate(accuracies):
        assert chosen.facts[f"voter_{i}_right_on_kept"] == pytest.approx(accuracy, abs=0.03)
        assert chosen.facts[f"voter_{i}_right_on_dropped"] == pytest.approx(accuracy, abs=0.03)
    sure = chosen.weights > 0.9
    assert truth[sure].mean() == pytest.approx(chosen.weights[sure].mean(), abs=0.02)  # calibrated


def test_a_voter_without_a_score_abstains():
    rng = np.random.default_rng(6)
    truth = rng.random(3000) < 0.5
    scored = rng.random((3, len(truth))) < 0.7
    scored[:, 0] = False
    voters = [voter(np.where(rng.random(len(truth)) < 0.9, truth, ~truth), s) for s in scored]
    chosen = select.vote(voters)
    assert not chosen.mask[0]
    assert chosen.reasons[0] == "dropped: no voter had a score"
    judged = scored.any(axis=0)
    assert (chosen.mask[judged] == truth[judged]).mean() > 0.88


def test_votes_must_be_three_and_about_the_same_rows():
    with pytest.raises(ValueError, match="fewer than three"):
        select.vote([voter([1]), voter([1])])
    with pytest.raises(ValueError, match="same table"):
        select.vote([voter([1]), voter([1]), voter([1, 0])])


def test_average_and_quality():
    first, second = table([1.0, 2.0, math.nan, 4.0]), table([3.0, 2.0, 1.0, 0.0])
    mean = select.average([first, second], "s")
    assert mean.schema.field("s").metadata == {b"keep": b"high"}
    np.testing.assert_array_equal(mean["s"].to_numpy(), np.array([2, 2, np.nan, 2], np.float32))
    with pytest.raises(ValueError, match=r"tables\[1\]"):
        select.average([first, second.slice(1)], "s")
    judged = select.quality(first, "s", select.top(first, "s", 1))
    assert judged == select.Quality(4, 0.25, pytest.approx(7 / 3), 4.0, 1.5)
    with pytest.raises(ValueError, match="covers 4 rows"):
        select.quality(second.slice(1), "s", select.top(first, "s", 1))
