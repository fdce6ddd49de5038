"""The best so many, found digit by digit, are those of a stable sort."""

from __future__ import annotations

import math

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from assay import select
from assay.select import best as module
from assay.select.best import best

numbers = st.one_of(
    st.floats(width=32), st.sampled_from([0.0, -0.0, 1.0, math.inf, -math.inf, math.nan]), st.floats(-1, 1, width=32)
)


def stable(values, wanted):
    candidates = np.flatnonzero(~np.isnan(values))
    mask = np.zeros(len(values), bool)
    mask[candidates[np.argsort(-values[candidates], kind="stable")[:wanted]]] = True
    return mask


@pytest.mark.parametrize("kind", [np.float32, np.float64])
@pytest.mark.parametrize("few", [0, 2, 1000])
def test_the_best_are_those_of_a_stable_sort(kind, few, monkeypatch):
    """``few``: up to how many keys are sorted; with 0 every digit is looked at."""
    monkeypatch.setattr(module, "_FEW", few)

    @settings(max_examples=12, deadline=None)
    @given(st.lists(numbers, max_size=30), st.integers(0, 31), st.integers(1, 7))
    def check(given_, wanted, size):
        values = np.asarray(given_, kind)
        found = best(lambda: (values[i : i + size] for i in range(0, len(values), size)), len(values), wanted)
        np.testing.assert_array_equal(found, stable(values, wanted))

    check()


def test_digits_tell_doubles_apart_that_floats_do_not(monkeypatch):
    monkeypatch.setattr(module, "_FEW", 0)
    values = 1 + np.random.default_rng(0).permutation(50) * 2.0**-52
    np.testing.assert_array_equal(best(lambda: iter([values]), 50, 7), stable(values, 7))


@pytest.mark.parametrize("end", ["high", "low"])
def test_rules_of_many_parts_are_those_of_one(end, monkeypatch):
    """As a table of 10⁸ rows is looked at: in many parts, with most digits; against the formulas on whole arrays."""
    rng = np.random.default_rng(1)
    values = np.round(rng.normal(size=999), 2).astype(np.float32)
    values[rng.random(999) < 0.1] = np.nan
    field = pa.field("s", pa.float32(), metadata={"keep": end})
    table = pa.table([pa.array(values, from_pandas=False)], schema=pa.schema([field]))
    worth = (values if end == "high" else -values).astype(np.float64)
    uniform = (np.asarray(np.random.Philox(7).random_raw(999) >> np.uint64(11), np.float64) + 0.5) * 2.0**-53
    gumbel = worth / 0.5 - np.log(-np.log(uniform))
    low = np.quantile(worth[~np.isnan(worth)], 0.8, method="lower")
    monkeypatch.setattr(module, "_FEW", 20)
    monkeypatch.setattr(module, "CHUNK_ROWS", 64)
    np.testing.assert_array_equal(select.top(table, "s", 0.3).mask, stable(worth, 300))
    np.testing.assert_array_equal(select.quantile(table, "s", 0.8).mask, worth >= low)
    np.testing.assert_array_equal(select.sample(table, "s", 200, 7, 0.5).mask, stable(gumbel, 200))
    np.testing.assert_array_equal(select.random(table, 100, 7).mask, stable(-uniform, 100))
