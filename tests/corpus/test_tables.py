"""The in-memory score table: types, metadata, and what it refuses."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pytest

from assay.corpus.footer import TableColumn, columns_in
from assay.corpus.tables import count_nan, make_table, read_metadata, score_schema


@dataclass(frozen=True)
class Column:
    name: str
    keep: str = "high"
    description: str = "a score"
    width: int | None = 1


def test_types_metadata_and_nan_survive():
    table = make_table(
        [3, 5],
        ["a", "b"],
        {"mimic": np.array([1.0, np.nan])},
        [Column("mimic", "low", "one line")],
        {"seed": 7},
    )
    assert table.schema.types == [pa.int64(), pa.string(), pa.float32()]
    assert table.schema.field("mimic").metadata == {b"keep": b"low", b"description": b"one line"}
    assert read_metadata(table.schema) == {"seed": 7}
    assert table["mimic"].null_count == 0
    assert np.isnan(table["mimic"].to_numpy()[1])


def test_several_numbers_per_sample_and_one_per_token():
    nan = np.nan
    tokens = np.array([[1, nan, 3, nan], [nan] * 4, [nan, 2, nan, nan]])
    columns = [Column("pair", width=2), Column("token", width=None)]
    table = make_table([0, 1, 2], ["a", "b", "c"], {"pair": np.arange(6).reshape(3, 2), "token": tokens}, columns, {})
    assert table.schema.types[2:] == [pa.list_(pa.float32(), 2), pa.list_(pa.float32())]
    assert table["pair"].to_pylist() == [[0, 1], [2, 3], [4, 5]]
    first, second, third = table["token"].to_pylist()  # what is not a number at the end is padding
    np.testing.assert_array_equal(first, [1, nan, 3])
    assert second == []
    np.testing.assert_array_equal(third, [nan, 2])
    rows = np.empty(3, object)
    rows[:] = [np.float32([1, nan]), np.float32([]), np.float32([nan])]  # of known lengths: nothing is padding
    table = make_table([0, 1, 2], ["a", "b", "c"], {"pair": np.zeros((3, 2)), "token": rows}, columns, {})
    assert [len(values) for values in table["token"].to_pylist()] == [2, 0, 1]
    assert table["token"].null_count == 0
    pairs = np.float32([[nan, nan], [1, nan], [1, 2]])
    assert [count_nan(part) for part in (pairs, pairs[:0], pairs[:, 0], pairs[:0, 0])] == [2, 0, 1, 0]
    assert (count_nan(rows), count_nan(np.float32([nan, 1]))) == (2, 1)
    empty = make_table([], [], {"pair": np.empty((0, 2)), "token": np.empty((0, 0))}, columns, {})
    assert (empty.schema, len(empty)) == (table.schema, 0)
    for name, wrong in (("pair", np.zeros((3, 3))), ("pair", np.zeros(3)), ("token", np.zeros(3))):
        scores = {"pair": np.zeros((3, 2)), "token": tokens} | {name: wrong}
        with pytest.raises(ValueError, match=rf"score '{name}' has shape .*; expected \(N, "):
            make_table([0, 1, 2], ["a", "b", "c"], scores, columns, {})


@pytest.mark.parametrize(
    ("rows", "ids", "scores", "message"),
    [
        ([0], ["a", "b"], {"mimic": np.zeros(1)}, "differ in length"),
        ([0], ["a"], {"mimic": np.zeros(2)}, "differ in length"),
        ([0], ["a"], {}, "columns declare"),
        ([0], ["a"], {"mimic": np.zeros(1), "loss": np.zeros(1)}, "columns declare"),
    ],
)
def test_refuses_what_does_not_fit(rows, ids, scores, message):
    with pytest.raises(ValueError, match=message):
        make_table(rows, ids, scores, [Column("mimic")], {})


@pytest.mark.parametrize("names", [["row"], ["id"], ["mimic", "mimic"]])
def test_score_names_are_unique(names):
    with pytest.raises(ValueError, match="appears twice"):
        score_schema([Column(name) for name in names], {})


@pytest.mark.parametrize("metadata", [None, {b"pandas": b"{}"}, {b"assay": b"[]"}])
def test_foreign_schemas_are_not_score_tables(metadata):
    with pytest.raises(ValueError, match="not a score table"):
        read_metadata(pa.schema([], metadata=metadata))


def test_a_schema_tells_its_columns():
    columns = [
        TableColumn(name=f"s{i}", keep="low", description="ü", width=width) for i, width in enumerate([1, 3, None])
    ]
    assert columns_in(score_schema(columns, {})) == columns
