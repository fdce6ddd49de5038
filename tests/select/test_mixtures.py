"""Two groups found where there are two."""

from __future__ import annotations

import math

import numpy as np
import pyarrow as pa
import pytest
from sklearn.cluster import KMeans

from assay import select


def table(scores, keep="high") -> pa.Table:
    field = pa.field("s", pa.float32(), metadata={"keep": keep})
    schema = pa.schema([pa.field("row", pa.int64()), pa.field("id", pa.string()), field])
    n = len(scores)
    ids = pa.array([str(i) for i in range(n)])
    return pa.Table.from_arrays([pa.array(range(n)), ids, pa.array(np.asarray(scores, np.float32))], schema=schema)


def two_groups(rng, sizes=(700, 300), centers=(0.0, 10.0), spreads=(1.0, 1.0)):
    values = np.concatenate([rng.normal(c, s, n) for n, c, s in zip(sizes, centers, spreads, strict=True)])
    good = np.repeat([False, True], sizes)
    order = rng.permutation(len(values))
    return values[order], good[order]


@pytest.mark.parametrize("rule", [select.gmm, select.kmeans])
@pytest.mark.parametrize("end", ["high", "low"])
@pytest.mark.parametrize("unit", [1.0, 1e-6, 1e5])
def test_two_groups_are_told_apart(rule, end, unit):
    values, good = two_groups(np.random.default_rng(0))
    chosen = rule(table(values * unit, end), "s")
    np.testing.assert_array_equal(chosen.mask, good if end == "high" else ~good)
    better, worse = chosen.facts["better_mean"] / unit, chosen.facts["worse_mean"] / unit
    assert (better, worse) == pytest.approx((10, 0) if end == "high" else (0, 10), abs=0.2)


def test_a_wide_better_component_does_not_claim_the_worst_rows():
    values, _ = two_groups(np.random.default_rng(1), (1000, 1000), (0.0, 4.0), (0.3, 3.0))
    values[0] = -20.0  # far out on the wrong side, where only the wide component has mass
    chosen = select.gmm(table(values), "s")
    assert not chosen.mask[0]
    kept, dropped = values[chosen.mask], values[~chosen.mask]
    assert kept.min() >= dropped.max() - 1e-6
    assert chosen.threshold == pytest.approx(kept.min())


def test_gmm_repeats_and_passes_over_nan():
    values, good = two_groups(np.random.default_rng(2))
    values[:10] = math.nan
    first, second = (select.gmm(table(values), "s", seed=3) for _ in range(2))
    np.testing.assert_array_equal(first.weights, second.weights)
    assert not first.mask[:10].any()
    assert (first.mask[10:] == good[10:]).mean() > 0.999


@pytest.mark.parametrize("rule", [select.gmm, select.kmeans])
def test_infinite_scores_take_no_part_and_are_counted(rule):
    values, _ = two_groups(np.random.default_rng(4))
    plain = rule(table(values), "s")
    more = rule(table(np.concatenate([values, [math.inf, -math.inf, math.inf, math.nan]])), "s")
    assert more.mask[-4:].tolist() == [True, False, True, False]
    assert more.facts == plain.facts | {"infinite": 3}


def test_kmeans_is_the_optimum_that_scikit_learn_looks_for():
    values = np.random.default_rng(4).gamma(1.0, size=400).astype(np.float32)
    ours = select.kmeans(table(values), "s").mask
    theirs = KMeans(2, n_init=20, random_state=0).fit(values[:, None])

    def error(mask):
        return sum(((values[m] - values[m].mean()) ** 2).sum() for m in (mask, ~mask))

    assert error(ours) <= theirs.inertia_ * (1 + 1e-6)


@pytest.mark.parametrize("rule", [select.gmm, select.kmeans])
@pytest.mark.parametrize("values", [[], [1.0], [2.0, 2.0, 2.0], [math.nan, 1.0]])
def test_one_value_cannot_be_split(rule, values):
    with pytest.raises(ValueError, match="cannot be split"):
        rule(table(values), "s")


def test_kmeans_keeps_equal_scores_together():
    assert select.kmeans(table([0, 0, 1, 1, 1, 1]), "s").indices.tolist() == [2, 3, 4, 5]
