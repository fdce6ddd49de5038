"""Mixes: exact counts in every band of every group, with whole copies and drawn ones."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from assay import select
from assay.select import best, groups

BANDS = [0, 50, 90, 100]
RATES = {"web": [0, 0.5, 1], None: [1, 1, 2.25], "*": [0.1, 1.5, 3]}


def make(keep="high"):
    rng = np.random.default_rng(0)
    values = rng.normal(size=400).astype(np.float32)
    values[rng.random(400) < 0.1] = np.nan
    names = np.array(["web", "books", None, "tiny"], object)[rng.choice(4, 400, p=[0.6, 0.3, 0.09, 0.01])]
    field = pa.field("s", pa.float32(), metadata={"keep": keep})
    schema = pa.schema([field, pa.field("g", pa.string())])
    return pa.table([pa.array(values, from_pandas=False), pa.array(names, pa.string())], schema=schema)


@pytest.mark.parametrize("end", ["high", "low"])
@pytest.mark.parametrize("held", [1 << 24, 50])
def test_bands_have_their_counts(end, held, monkeypatch):
    monkeypatch.setattr(groups, "_HELD_ROWS", held)
    monkeypatch.setattr(best, "CHUNK_ROWS", 1 << 20 if held > 50 else 64)
    table = make(end)
    chosen = select.mix(table, "s", BANDS, RATES, seed=3, group="g")
    worth = table["s"].to_numpy() * (1 if end == "high" else -1)
    names = np.array(table["g"].to_pylist(), object)
    taken, asked = np.zeros(3), np.zeros(3)
    for name in ("web", "books", None, "tiny"):
        rows = np.flatnonzero([own == name for own in names] & ~np.isnan(worth))
        ordered = rows[np.argsort(-worth[rows], kind="stable")]  # the best first
        ends = [int(np.floor((100 - bound) / 100 * len(rows) + 0.5)) for bound in BANDS]
        for band, rate in enumerate(RATES.get(name, RATES["*"])):
            copies = chosen.copies[ordered[ends[band + 1] : ends[band]]]
            assert abs(copies.sum(dtype=int) - rate * len(copies)) < 1
            taken[band] += copies.sum(dtype=int)
            asked[band] += rate * len(copies)
            assert set(copies.tolist()) <= {int(rate), int(rate) + (rate % 1 > 0)}
    np.testing.assert_array_equal(taken, np.floor(asked + 0.5))
    np.testing.assert_array_equal(chosen.mask, chosen.copies > 0)
    assert not chosen.copies[np.isnan(worth)].any()
    reasons = {reason: set(chosen.copies[chosen.reasons == reason] > 0) for reason in set(chosen.reasons)}
    assert all(kept == {reason.startswith("kept: ")} for reason, kept in reasons.items())
    assert reasons.keys() >= {"kept: s in the band 90-100 % of its g", "dropped: s is NaN"}


def test_small_groups_are_not_all_rounded_up():
    field = pa.field("s", pa.float32(), metadata={"keep": "high"})
    table = pa.table([np.ones(100, np.float32), np.arange(100)], schema=pa.schema([field, pa.field("g", pa.int64())]))
    first, other = (select.mix(table, "s", [0, 100], {"*": [0.5]}, seed, group="g").mask for seed in (0, 1))
    assert first.sum() == other.sum() == 50
    assert (first != other).any()
    assert select.mix(table, "s", [0, 100], {"*": [1.2]}, 0, group="g").copies.sum() == 120


def test_one_band_of_rate_one_is_everything_and_the_best_tenth_is_the_top():
    table = make()
    scored = ~np.isnan(table["s"].to_numpy())
    np.testing.assert_array_equal(select.mix(table, "s", [0, 100], [1], 0).mask, scored)
    share = round(0.1 * scored.sum())
    best_tenth = select.mix(table, "s", [0, 90, 100], [0, 1], 0)
    np.testing.assert_array_equal(best_tenth.mask, select.top(table, "s", int(share)).mask)


def test_seeds_draw_other_rows_and_the_same_ones_again():
    table = make()
    first, again, other = (select.mix(table, "s", [0, 100], [0.5], seed).mask for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()
    assert first.sum() == other.sum()


@pytest.mark.parametrize(
    ("bands", "rates", "message"),
    [
        ([0, 50], {"*": [1]}, "ascend from 0 to 100"),
        ([0, 60, 50, 100], {"*": [1, 1, 1]}, "ascend from 0 to 100"),
        ([0, float("nan"), 100], {"*": [1, 1]}, "ascend from 0 to 100"),
        (list(range(0, 101, 4)), {"*": [1] * 25}, "at most 20"),
        ([0, 100], {"*": [1, 2]}, r"rates of \*: 2 for 1 bands"),
        ([0, 100], {"*": [-1]}, "-1: expected a number from 0 to 100"),
        ([0, 100], {"*": [float("nan")]}, "nan: expected"),
        ([0, 100], {"*": [float("inf")]}, "inf: expected"),
        ([0, 100], {"webb": [1], "*": [1]}, "rates of webb: no row has this g; did you mean web?"),
        ([0, 100], {"web": [1]}, r"3 values of g have none \((books|tiny|null)\); add them"),
        ([0, 100], [1], "expected them by g"),
    ],
)
def test_mistakes_are_named(bands, rates, message):
    with pytest.raises(ValueError, match=message):
        select.mix(make(), "s", bands, rates, 0, group="g")


def test_no_rows_have_no_mix():
    assert select.mix(make().slice(0, 0), "s", BANDS, {"*": [0, 1, 2]}, 0, group="g").copies.shape == (0,)
