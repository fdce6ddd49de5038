"""Quotas: in each group what the rule keeps of that group alone."""

from __future__ import annotations

import math

import numpy as np
import pyarrow as pa
import pytest

from assay import select
from assay.select import best, groups

NAMES = ["web", "w'i\"k;i", None, "small", "never scored"]


@pytest.fixture(params=["sorted", "in parts", "one by one"])
def table(request, monkeypatch):
    """300 rows in groups of different sizes, looked at as a large table is: in parts, and groups too large to sort."""
    if request.param != "sorted":
        monkeypatch.setattr(best, "CHUNK_ROWS", 32)
        monkeypatch.setattr(best, "_FEW", 3)
        monkeypatch.setattr(groups, "_HELD_ROWS", 100 if request.param == "in parts" else 0)
    rng = np.random.default_rng(0)
    values = np.round(rng.normal(size=300), 1).astype(np.float32)
    values[rng.random(300) < 0.1] = np.nan
    values[:3] = np.inf, -np.inf, -np.inf
    drawn = rng.choice(5, 300, p=[0.7, 0.2, 0.05, 0.03, 0.02])
    values[drawn == 4] = np.nan
    field = pa.field("s", pa.float32(), metadata={"keep": "high"})
    columns = [pa.array(values, from_pandas=False), pa.array([NAMES[i] for i in drawn])]
    return pa.table(columns, schema=pa.schema([field, pa.field("g", pa.string())]))


def alone(table, rule):
    """What the rule makes of each group as a table of its own."""
    codes = np.array([NAMES.index(name) for name in table["g"].to_pylist()])
    mask = np.zeros(len(codes), bool)
    for code in np.unique(codes):
        mask[codes == code] = rule(table.filter(pa.array(codes == code))).mask
    return mask


@pytest.mark.parametrize("amount", [0, 1, 7, 0.0, 0.35, 1.0])
@pytest.mark.parametrize("end", ["high", "low"])
def test_the_best_of_each(table, amount, end):
    chosen = select.top(table, "s", amount, end, group="g")
    np.testing.assert_array_equal(chosen.mask, alone(table, lambda own: select.top(own, "s", amount, end)))
    found = groups.groups_of(table, "g")
    for i, name in enumerate(found.names.to_pylist()):
        kept = table["s"].to_numpy()[(found.codes == i) & chosen.mask]
        limit = (kept.min() if end == "high" else kept.max()) if len(kept) else math.nan
        assert chosen.limits[i] == limit or (math.isnan(limit) and math.isnan(chosen.limits[i])), name


def test_a_table_in_pieces_has_the_same_groups(table):
    """As one read from several files has: each piece with values of its own, and rows without one."""
    whole = select.top(table, "s", 3, group="g").mask
    pieces = [table.slice(start, 70) for start in range(0, 300, 70)]
    for encode in (lambda own: own, pa.ChunkedArray.dictionary_encode, _with_nulls_as_values):
        parts = [its.set_column(1, "g", encode(its["g"])) for its in pieces]
        np.testing.assert_array_equal(select.top(pa.concat_tables(parts), "s", 3, group="g").mask, whole)


def _with_nulls_as_values(column):
    return column.dictionary_encode(null_encoding="encode")


def test_a_group_without_a_name_behind_as_many_as_small_indices_can_count():
    names = pa.array([*map(str, range(128)), None]).dictionary_encode().cast(pa.dictionary(pa.int8(), pa.string()))
    assert groups.groups_of(pa.table({"g": names}), "g").codes.tolist() == list(range(129))


@pytest.mark.parametrize("q", [0, 0.5, 0.93, 1])
def test_quantiles_of_each(table, q):
    chosen = select.quantile(table, "s", q, group="g")
    np.testing.assert_array_equal(chosen.mask, alone(table, lambda own: select.quantile(own, "s", q)))


def test_draws_of_each_group_are_the_best_keys_in_it(table):
    worth = table["s"].to_numpy().astype(np.float64)
    uniform = (np.asarray(np.random.Philox(5).random_raw(300) >> np.uint64(11), np.float64) + 0.5) * 2.0**-53
    drawn = select.sample(table, "s", 0.4, 5, temperature=2.0, group="g")
    uniformly = select.random(table, 3, 5, group="g")
    for name in NAMES:
        there = np.array([own == name for own in table["g"].to_pylist()])
        keys = np.where(there & (worth > -np.inf), worth / 2.0 - np.log(-np.log(uniform)), np.nan)
        candidates = np.flatnonzero(~np.isnan(keys))
        wanted = candidates[np.argsort(-keys[candidates], kind="stable")[: math.floor(0.4 * there.sum() + 0.5)]]
        assert np.flatnonzero(drawn.mask & there).tolist() == sorted(wanted)
        lowest = np.flatnonzero(there)[np.argsort(uniform[there])[:3]]
        assert np.flatnonzero(uniformly.mask & there).tolist() == sorted(lowest)


def test_a_dictionary_keeps_its_names_and_other_types_are_groups_too(table):
    encoded = table.set_column(1, "g", table["g"].dictionary_encode())
    np.testing.assert_array_equal(
        select.top(encoded, "s", 2, group="g").mask, select.top(table, "s", 2, group="g").mask
    )
    numbers = table.set_column(1, "g", pa.array([i % 3 for i in range(300)]))
    assert select.random(numbers, 2, 0, group="g").mask.sum() == 6
    assert select.top(table.slice(0, 0), "s", 2, group="g").mask.shape == (0,)
    with pytest.raises(ValueError, match="no such column; it has s, g"):
        select.top(table, "s", 2, group="h")


def test_very_many_groups(monkeypatch):
    rows = 200_000
    monkeypatch.setattr(groups, "_HELD_ROWS", 1 << 17)
    schema = pa.schema([pa.field("s", pa.float32(), metadata={"keep": "high"}), pa.field("g", pa.int32())])
    own = pa.table([np.ones(2 * rows, np.float32), np.arange(2 * rows, dtype=np.int32) % rows], schema=schema)
    mask = select.top(own, "s", 1, group="g").mask
    assert mask[:rows].all()  # all scores are equal: the earlier row
    assert not mask[rows:].any()


def test_more_rows_than_any_number_of_the_machine_are_all(table):
    everything = select.top(table, "s", 10**30, group="g")
    np.testing.assert_array_equal(everything.mask, select.top(table, "s", 1.0, group="g").mask)
