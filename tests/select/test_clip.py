"""The exact mask against all masks, and the authors' descent against the exact mask."""

from __future__ import annotations

import itertools

import numpy as np
import pyarrow as pa
import pytest

from assay.select import clip_powered


def scored(alignment, diversity) -> pa.Table:
    return pa.table({"sas": np.asarray(alignment, np.float32), "sds": np.asarray(diversity, np.float32)})


def loss(mask, table, alpha, beta, ratio) -> float:
    gain = table["sas"].to_numpy().astype(float) + alpha * table["sds"].to_numpy().astype(float)
    return -(mask * gain).mean() + beta * abs(mask.mean() - ratio)


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0, 5.0])
def test_no_mask_has_less_loss(beta) -> None:
    rng = np.random.default_rng(int(10 * beta))
    table = scored(rng.normal(size=10), rng.random(10))
    for count in (0, 3, 7):
        got = clip_powered(table, "sas", "sds", count, alpha=0.5, beta=beta).mask
        masks = np.array(list(itertools.product([0, 1], repeat=10)))
        least = min(loss(mask, table, 0.5, beta, count / 10) for mask in masks)
        assert loss(got, table, 0.5, beta, count / 10) == pytest.approx(least, abs=1e-12)
        if beta == 5:
            assert got.sum() == count
    assert clip_powered(table, "sas", "sds", 4, alpha=0.5).mask.sum() == 4


def test_the_descent_comes_near_it() -> None:
    rng = np.random.default_rng(0)
    table = scored(rng.normal(0.3, 0.1, 400), rng.random(400))
    exact = clip_powered(table, "sas", "sds", 0.3, beta=2).mask
    found = clip_powered(table, "sas", "sds", 0.3, beta=2, sgd=True, seed=1).mask
    assert abs(found.sum() - 120) <= 12
    assert (exact & found).sum() / 120 > 0.8
    assert (exact & (rng.random(400) < 0.3)).sum() / 120 < 0.45  # the control


def test_rows_without_a_score_and_mistakes() -> None:
    table = scored([1, np.nan, 3, 4], [1, 2, np.nan, 0])
    selection = clip_powered(table, "sas", "sds", 1.0)
    assert list(selection.indices) == [0, 3]
    assert selection.reasons[1] == "dropped: sas + 1 · sds is NaN"
    assert clip_powered(table.slice(0, 0), "sas", "sds", 1.0, beta=1, sgd=True).mask.shape == (0,)
    for options, message in (
        ({"sgd": True}, "sgd: needs a beta"),
        ({"alpha": -1.0}, "alpha=-1"),
        ({"beta": np.inf}, "beta=inf"),
    ):
        with pytest.raises(ValueError, match=message):
            clip_powered(table, "sas", "sds", 1, **options)
    with pytest.raises(ValueError, match="infinite scores have no sum"):
        clip_powered(scored([np.inf], [0]), "sas", "sds", 1)
    with pytest.raises(ValueError, match="by='no'"):
        clip_powered(table, "no", "sds", 1)


def test_sums_are_of_more_digits_than_scores() -> None:
    """Where an alignment has all the digits of float32, the diversity still decides."""
    diversity = np.random.default_rng(0).permutation(100) * 1e-9
    kept = clip_powered(scored(np.ones(100), diversity), "sas", "sds", 10)
    np.testing.assert_array_equal(kept.indices, np.flatnonzero(diversity > 89.5e-9))
    assert clip_powered(scored([3e38, 1], [3e38, 1]), "sas", "sds", 1).indices.tolist() == [0]


def test_float32_is_added_up_as_float64_is() -> None:
    rng = np.random.default_rng(0)
    sas, sds = (rng.normal(size=400).astype(np.float32) for _ in range(2))
    sas += np.float32(4096)
    expected = np.argsort(-(sas.astype(np.float64) + 0.37 * sds.astype(np.float64)), kind="stable")[:100]
    assert set(clip_powered(scored(sas, sds), "sas", "sds", 100, alpha=0.37).indices) == set(expected)
    assert list(clip_powered(scored([1, 3e38], [1, 3e38]), "sas", "sds", 1).indices) == [1]
