"""Selections: sizes, directions, ties, NaN, seeds."""

from __future__ import annotations

import math

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from assay import select


def table(scores, keep: str | None = "high") -> pa.Table:
    metadata = {"keep": keep} if keep else None
    schema = pa.schema(
        [
            pa.field("row", pa.int64()),
            pa.field("id", pa.string()),
            pa.field("s", pa.float32(), metadata=metadata),
        ]
    )
    values = np.asarray(scores, np.float32)
    return pa.Table.from_arrays(
        [pa.array(range(len(values))), pa.array([str(i) for i in range(len(values))]), pa.array(values)],
        schema=schema,
    )


scores = st.lists(st.one_of(st.floats(-5, 5, width=32), st.just(math.nan)), max_size=40)
ends = st.sampled_from(["high", "low"])


@given(scores, ends, st.integers(0, 50))
def test_top_keeps_so_many_and_none_is_better_than_the_kept(values, end, amount):
    chosen = select.top(table(values, end), "s", amount)
    worth = np.asarray(values, np.float32) * (1 if end == "high" else -1)
    valid = ~np.isnan(worth)
    assert chosen.mask.sum() == min(amount, valid.sum())
    assert not (chosen.mask & ~valid).any()
    rest = valid & ~chosen.mask
    if chosen.mask.any() and rest.any():
        assert worth[chosen.mask].min() >= worth[rest].max()
    assert len(chosen.reasons) == len(values)


@given(scores, ends, st.floats(0, 1))
def test_a_share_is_of_the_tables_rows(values, end, share):
    chosen = select.top(table(values, end), "s", share)
    valid = sum(not math.isnan(value) for value in values)
    assert chosen.mask.sum() == min(math.floor(share * len(values) + 0.5), valid)


def test_one_is_a_row_and_one_point_nought_is_all():
    assert select.top(table([1, 2, 3]), "s", 1).indices.tolist() == [2]
    assert select.top(table([1, 2, 3]), "s", 1.0).indices.tolist() == [0, 1, 2]


def test_ties_go_to_the_earlier_row():
    assert select.top(table([1, 2, 2, 2, 1]), "s", 2).indices.tolist() == [1, 2]
    assert select.top(table([1, 2, 2, 2, 1], "low"), "s", 1).indices.tolist() == [0]


@given(scores, ends, st.lists(st.floats(-6, 6, width=32), min_size=2, max_size=2))
def test_a_stricter_threshold_keeps_a_subset(values, end, limits):
    loose, strict = sorted(limits, reverse=end == "low")
    wide = select.threshold(table(values, end), "s", loose).mask
    narrow = select.threshold(table(values, end), "s", strict).mask
    assert not (narrow & ~wide).any()


@given(scores.filter(lambda v: any(not math.isnan(x) for x in v)), ends, st.floats(0, 1), st.floats(0, 1))
def test_a_higher_quantile_keeps_a_subset_but_never_nothing(values, end, a, b):
    wide = select.quantile(table(values, end), "s", min(a, b)).mask
    narrow = select.quantile(table(values, end), "s", max(a, b)).mask
    assert not (narrow & ~wide).any()
    assert narrow.any()


@pytest.mark.parametrize("end", ["high", "low"])
def test_a_quantile_keeps_the_best_share(end):
    values = np.random.default_rng(0).normal(size=1000)
    kept = values[select.quantile(table(values, end), "s", 0.9).mask]
    assert abs(len(kept) - 100) <= 1
    assert kept.min() > np.sort(values)[898] if end == "high" else kept.max() < np.sort(values)[101]


@given(scores, st.integers(0, 2**32), st.integers(0, 40))
def test_draws_repeat_with_their_seed(values, seed, amount):
    data = table(values)
    first, second = (select.sample(data, "s", amount, seed, temperature=1.0) for _ in range(2))
    np.testing.assert_array_equal(first.mask, second.mask)
    valid = sum(not math.isnan(value) for value in values)
    assert first.mask.sum() == min(amount, valid)  # every row can be asked for
    np.testing.assert_array_equal(select.random(data, amount, seed).mask, select.random(data, amount, seed).mask)
    assert select.random(data, amount, seed).mask.sum() == min(amount, len(values))


def test_seeds_differ():
    data = table(np.ones(1000))
    assert (select.random(data, 0.5, 0).mask != select.random(data, 0.5, 1).mask).any()
    assert (select.sample(data, "s", 0.5, 0).mask != select.sample(data, "s", 0.5, 1).mask).any()


@pytest.mark.parametrize("temperature", [None, 0.5])
def test_draws_follow_the_proportions(temperature):
    values = np.array([0.0, 1.0, 2.0, 5.0])
    hits = np.zeros(4)
    for seed in range(4000):
        hits += select.sample(table(values), "s", 1, seed, temperature).mask
    expected = values if temperature is None else np.exp(values / temperature)
    expected = expected / expected.sum()
    np.testing.assert_allclose(hits / 4000, expected, atol=4 * np.sqrt(0.25 / 4000))


def test_rows_of_score_zero_are_never_drawn():
    assert select.sample(table([0, 0, 1]), "s", 3, seed=0).indices.tolist() == [2]


def test_low_scores_draw_with_a_temperature():
    chosen = select.sample(table([0.0, 50.0], "low"), "s", 1, seed=0, temperature=1.0)
    assert chosen.indices.tolist() == [0]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda t: select.sample(t, "s", 1, 0), "goes down to -1"),
        (lambda t: select.sample(t, "s", 1, 0, keep="low"), "better when low"),
        (lambda t: select.sample(t, "s", 1, 0, temperature=0), "positive"),
        (lambda t: select.top(t, "s", 1.5), r"a share lies between 0\.0 and 1\.0"),
        (lambda t: select.top(t, "s", -1), "at least 0"),
        (lambda t: select.top(t, "s", True), "number of rows"),
        (lambda t: select.top(t, "t", 1), "no such score; it has s"),
        (lambda t: select.top(t, "s", 1, keep="best"), "expected 'high' or 'low'"),
        (lambda t: select.quantile(t, "s", 2), "from 0 to 1"),
    ],
)
def test_misuse_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call(table([-1.0, 1.0]))


@pytest.mark.parametrize("keep", ["none", None])
def test_a_score_without_direction_needs_one(keep):
    data = table([1.0, 2.0], keep)
    with pytest.raises(ValueError, match="say high or low: keep="):
        select.top(data, "s", 1)
    assert select.top(data, "s", 1, keep="low").indices.tolist() == [0]


def test_reasons_and_summary():
    chosen = select.threshold(table([1.0, math.nan, 3.0]), "s", 2.0)
    assert chosen.reasons.tolist() == ["dropped: s below 2", "dropped: s is NaN", "kept: s at least 2"]
    assert chosen.summary() == "s, threshold 2: kept 1 of 3 rows (33.3%), threshold 2, 1 NaN"


@pytest.mark.parametrize("rule", [lambda t: select.top(t, "s", 0.5), lambda t: select.quantile(t, "s", 0.5)])
@pytest.mark.parametrize("values", [[], [math.nan, math.nan]])
def test_nothing_to_choose_from(rule, values):
    assert not rule(table(values)).mask.any()


def test_a_draw_with_replacement_takes_no_row_without_a_score_and_is_reproducible():
    values = [0.0, 1.0, math.nan, 3.0, 0.0]
    drawn = select.draw(table(values), "s", 4000, seed=5)
    counts = np.bincount(drawn, minlength=5)
    assert (counts[[0, 2, 4]] == 0).all()
    assert abs(counts[3] - 3000) < 5 * math.sqrt(750)
    assert (drawn[:10] == select.draw(table(values), "s", 10, seed=5)).all()
    with pytest.raises(ValueError, match="found none or infinite"):
        select.draw(table([math.nan]), "s", 1, seed=0)


@pytest.mark.parametrize("end", ["high", "low"])
def test_a_threshold_is_the_float32_that_is_written_so(end):
    """What a page shows as a cut cuts there."""
    values = np.concatenate([np.arange(1, 100, dtype=np.float32) / 100, [np.float32(1e-40), np.float32(3e38), 0]])
    held = table(values, end)
    for value in values.astype(np.float32):
        wanted = values >= value if end == "high" else values <= value
        for written in (float(str(value)), float(value)):
            chosen = select.threshold(held, "s", written)
            np.testing.assert_array_equal(chosen.mask, wanted)
            assert chosen.threshold == value
    between = np.nextafter(np.float64(np.float32(0.5)), 1)  # nothing is written so
    assert select.threshold(held, "s", between).threshold == between
    assert select.threshold(table([0.0, 1.0], "high"), "s", 1e-60).mask.tolist() == [False, True]


def test_nan_is_no_threshold():
    with pytest.raises(ValueError, match="threshold nan: expected a number"):
        select.threshold(table([1.0]), "s", math.nan)


@pytest.mark.parametrize("column", [pa.array(["3"]), pa.array([None], pa.timestamp("s")), pa.array([[1.0]])])
def test_what_is_no_number_is_no_score(column):
    with pytest.raises(ValueError, match=r"by='score': holds .* per row; expected one number"):
        select.top(pa.table({"score": column}), "score", 1, "high")
