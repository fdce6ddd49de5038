"""Scores of Arrow tables are those of `assay score`, row by row."""

from __future__ import annotations

import pickle
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from assay.engine import run
from assay.ray import FAULT, Scorer
from assay.recipe import EngineError, load_recipe
from tests.small_project import make_rows


def test_scores_are_those_of_a_run_whatever_the_tables(project) -> None:
    rows = make_rows(50, 3)
    for i in (4, 30):
        rows[i]["label"] = None
    project.write_shard("whole.parquet", rows)
    run(load_recipe(str(project.path)))
    table = pa.Table.from_pylist([row | {"more": i} for i, row in enumerate(rows)])
    want = pq.read_table(project.scores / "whole.parquet")
    scorer = Scorer(str(project.path), device="cpu")
    for size in (50, 13):
        found = pa.concat_tables([scorer(table.slice(start, size)) for start in range(0, 50, size)])
        assert found.select(table.column_names) == table
        assert [i for i, fault in enumerate(found[FAULT].to_pylist()) if fault is not None] == [4, 30]
        assert "label" in found[FAULT][4].as_py()
        for name in want.column_names[2:]:
            values = found[name].to_numpy()
            assert np.isnan(values[[4, 30]]).all()
            scores = values[want["row"].to_numpy()]  # a product of other rows rounds otherwise
            np.testing.assert_allclose(scores, want[name].to_numpy(), rtol=0, atol=0 if size == 50 else 1e-6)
            assert found.schema.field(name).metadata == want.schema.field(name).metadata
    again = pickle.loads(pickle.dumps(scorer))
    assert pickle.dumps(again) == pickle.dumps(scorer)
    assert again(table.slice(5, 20)).equals(scorer(table.slice(5, 20)))  # where no score is NaN
    empty = scorer(table.slice(0, 0))
    assert (empty.num_rows, empty.schema) == (0, found.schema)


def test_threads_share_it_in_turn(project) -> None:
    scorer = Scorer(str(project.path), device="cpu")
    tables = [pa.Table.from_pylist(make_rows(40, seed)) for seed in range(6)]
    alone = [scorer(table) for table in tables]
    with ThreadPoolExecutor(3) as pool:
        assert all(a.equals(b) for a, b in zip(alone, pool.map(scorer, tables), strict=True))


def test_tables_that_cannot_be_scored(project) -> None:
    scorer = Scorer(str(project.path), device="cpu")
    table = pa.Table.from_pylist(make_rows(3))
    with pytest.raises(EngineError, match="the table has no column 'label'"):
        scorer(table.drop_columns("label"))
    with pytest.raises(EngineError, match="has a column 'mimic' already"):
        scorer(table.append_column("mimic", pa.array([1.0, 2.0, 3.0])))
    twice = scorer(pa.concat_tables([table, table]))
    assert [fault is None for fault in twice[FAULT].to_pylist()] == [True] * 3 + [False] * 3
