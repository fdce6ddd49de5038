"""The cut of greatest F_β, against every cut tried by hand."""

from __future__ import annotations

import math

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import fbeta_score

from assay import select


def table(values, keep="high"):
    schema = pa.schema([pa.field("s", pa.float32(), metadata={"keep": keep})])
    return pa.Table.from_arrays([pa.array(np.asarray(values, np.float32), from_pandas=False)], schema=schema)


numbers = st.sampled_from([-math.inf, -1.5, 0.0, 0.1, 0.1, 2.0, math.inf, math.nan])


def f_beta(good, kept, beta):
    hits = (good & kept).sum()
    return (1 + beta**2) * hits / ((1 + beta**2) * hits + beta**2 * (good & ~kept).sum() + (kept & ~good).sum())


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(numbers, st.booleans()), min_size=2, max_size=15), st.sampled_from([0.5, 1, 3]))
def test_no_cut_is_better(rows, beta):
    values, good = np.array([v for v, _ in rows], np.float32), np.array([g for _, g in rows])
    if good.all() or not (good & ~np.isnan(values)).any():
        return
    tried = {cut: f_beta(good, values >= cut, beta) for cut in set(values[~np.isnan(values)].tolist())}
    cut = select.fbeta_cut(table(values), "s", good, beta, draws=5)
    assert cut.f == pytest.approx(max(tried.values()))
    assert cut.threshold == max(limit for limit, f in tried.items() if f >= cut.f - 1e-12)
    kept = values >= cut.threshold
    assert cut.precision == pytest.approx((kept & good).sum() / kept.sum())
    assert cut.recall == pytest.approx((kept & good).sum() / good.sum())
    assert cut.unscored == np.isnan(values).sum()
    assert cut.threshold_interval[0] <= cut.threshold_interval[1]
    mirrored = select.fbeta_cut(table(-values, "low"), "s", good, beta, draws=5)
    assert (mirrored.threshold, mirrored.f) == (-cut.threshold, cut.f)
    assert mirrored.threshold_interval == tuple(-limit for limit in reversed(cut.threshold_interval))


def sample(rows, seed):
    """Two in five rows are good, and score 1.5 more."""
    rng = np.random.default_rng(seed)
    good = rng.random(rows) < 0.4
    return (rng.normal(size=rows) + 1.5 * good).astype(np.float32), good


def test_intervals_hold_what_other_samples_say():
    """The bootstrap's interval of the cut must be about as wide as cuts of fresh samples are spread."""
    fresh = [select.fbeta_cut(table(v), "s", g, draws=2).threshold for v, g in (sample(300, i) for i in range(1, 61))]
    cut = select.fbeta_cut(table(sample(300, 0)[0]), "s", sample(300, 0)[1], draws=200)
    low, high = cut.threshold_interval
    assert 0.5 * np.std(fresh) < (high - low) / 3.92 < 2 * np.std(fresh)
    assert low < 0.70 < high  # where F_1 is greatest for 400,000 rows
    values, good = sample(100_000, 99)
    truth = fbeta_score(good, values >= cut.threshold, beta=1)
    assert cut.f_interval[0] < truth < cut.f_interval[1]
    assert abs(cut.f_held_out - truth) < 0.05


def test_scores_that_say_nothing_are_seen_through_by_rows_held_out():
    rng = np.random.default_rng(0)
    values, good = rng.normal(size=60).astype(np.float32), rng.random(60) < 0.5
    cut = select.fbeta_cut(table(values), "s", good, beta=0.2, draws=100)
    assert cut.f_held_out < cut.f - 0.1


def test_a_seed_makes_the_same_interval():
    values, good = sample(50, 0)
    first, again, other = (select.fbeta_cut(table(values), "s", good, seed=seed, draws=50) for seed in (0, 0, 1))
    assert first == again
    assert first.f_interval != other.f_interval
    assert first.threshold == other.threshold


@pytest.mark.parametrize(
    ("values", "good", "beta", "message"),
    [
        ([1, 2], [1, 1], 1, "all 2 are 1; expected both"),
        ([1, 2], [0, 0], 1, "all 2 are 0; expected both"),
        ([1, math.nan], [0, 1], 1, "none of the 1 rows that are worth keeping has a number in s"),
        ([1, 2], [0, 1], 0, "beta=0: expected a positive number"),
        ([1, 2], [0, 1], math.inf, "beta=inf"),
        ([1, 2], [0, 1], -1, "beta=-1"),
        ([1, 2], [0, 1], 1e160, "beta=1e\\+160: expected a positive number whose square is one"),
        ([1, 2], [0, 1], 1e-200, "beta=1e-200: expected a positive number whose square is one"),
        ([1, 2], [0], 1, r"shape \(1,\); expected \(2,\)"),
    ],
)
def test_labels_that_make_no_cut(values, good, beta, message):
    with pytest.raises(ValueError, match=message):
        select.fbeta_cut(table(values), "s", good, beta)


def test_each_group_has_the_cut_of_its_own_rows() -> None:
    """Scores of two classes lie apart, so that no one cut serves both; a class of few labels, or of one kind, is cut
    where all are."""
    values, good = sample(300, 3)
    names = np.array(["cat", "dog", "emu"])[np.random.default_rng(0).choice(3, 300, p=[0.5, 0.46, 0.04])].tolist()
    values = values + np.float32(3) * np.array([name == "dog" for name in names], np.float32)
    names[7], names[8] = None, "gnu"
    held = table(values)
    found = select.fbeta_cuts(held, "s", good, names, 1, draws=20)
    assert found.pooled == select.fbeta_cut(held, "s", good, 1, draws=20)
    assert set(found.cuts) == {"cat", "dog"}
    for name, cut in found.cuts.items():
        its = np.array([own == name for own in names])
        assert cut == select.fbeta_cut(table(values[its]), "s", good[its], 1, draws=20)
        assert cut.threshold_interval[0] <= cut.threshold <= cut.threshold_interval[1]
    assert found.cuts["dog"].threshold > found.cuts["cat"].threshold + 2
    assert found.few == {"emu": names.count("emu"), None: 1, "gnu": 1}
    assert found.threshold("emu") == found.threshold("never seen") == found.pooled.threshold
    with_groups = held.append_column("kind", [names])
    chosen = select.cut_groups(with_groups, "s", found, "kind")
    limits = np.array([found.threshold(name) for name in names])
    np.testing.assert_array_equal(chosen.mask, values >= limits)
    kept_by_one = values >= found.pooled.threshold
    assert f_beta(good, chosen.mask, 1) > f_beta(good, kept_by_one, 1) + 0.05
    all_good = select.fbeta_cuts(held, "s", good, ["x" if own else "y" for own in good], draws=2)
    assert set(all_good.few) == {"x", "y"}  # of one kind each
    mirrored = select.fbeta_cuts(table(-values, "low"), "s", good, names, 1, draws=20)
    low = select.cut_groups(table(-values, "low").append_column("kind", [names]), "s", mirrored, "kind")
    np.testing.assert_array_equal(low.mask, chosen.mask)
    np.testing.assert_array_equal(low.limits, -chosen.limits)
    with pytest.raises(ValueError, match="groups: expected one for each of the 300 rows, got 2"):
        select.fbeta_cuts(held, "s", good, names[:2])
