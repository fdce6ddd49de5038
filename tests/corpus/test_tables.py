"""The in-memory score table: types, metadata, and what it refuses."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pytest

from assay.corpus.tables import make_table, read_metadata, score_schema


@dataclass(frozen=True)
class Column:
    name: str
    keep: str = "high"
    description: str = "a score"


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
