"""A scores folder as a data set of Arrow: every scored row once, under its shard."""

from __future__ import annotations

import json
import os

import fsspec
import numpy as np
import pyarrow.compute as pc
import pyarrow.dataset as pads
import pyarrow.parquet as pq
import pytest

import assay
from tests.small_scores import Column, make_scores


@pytest.fixture
def scores(tmp_path):
    shards = {
        "a": {"mimic": np.array([0.5, np.nan, -1.0], np.float32)},
        "web/b": {"mimic": np.array([2.0, 3.0], np.float32)},
    }
    return make_scores(tmp_path, shards, {"mimic": Column("mimic", "low", "how alike")})


def test_every_row_is_there_under_its_shard(scores):
    data = assay.read(scores)
    assert isinstance(data, pads.Dataset)
    assert data.schema.names == ["shard", "row", "id", "mimic"]
    assert data.schema.field("mimic").metadata == {b"keep": b"low", b"description": b"how alike"}
    table = data.to_table()
    assert table["shard"].to_pylist() == ["a.parquet"] * 3 + ["web/b.parquet"] * 2
    assert table["row"].to_pylist() == [0, 1, 2, 0, 1]
    assert table["id"].to_pylist() == ["a-0", "a-1", "a-2", "web/b-0", "web/b-1"]
    np.testing.assert_array_equal(table["mimic"].to_numpy(), np.array([0.5, np.nan, -1, 2, 3], np.float32))
    assert table["mimic"].null_count == 0
    assert data.count_rows() == 5


def test_columns_and_filters_reach_the_files(scores):
    data = assay.read(scores)
    assert data.to_table(columns=["row"], filter=pc.field("shard") == "web/b.parquet")["row"].to_pylist() == [0, 1]
    assert [f.path[-9:] for f in data.get_fragments(pc.field("shard") == "web/b.parquet")] == ["b.parquet"]
    kept = data.to_table(columns=["shard", "row"], filter=(pc.field("mimic") > 0) & (pc.field("row") > 0))
    assert kept.to_pylist() == [{"shard": "web/b.parquet", "row": 1}]


def test_opening_reads_no_rows(scores, monkeypatch):
    def fail(*arguments, **options):
        raise AssertionError("rows were read")

    for name in ("read", "iter_batches", "read_row_group", "read_row_groups"):
        monkeypatch.setattr(pq.ParquetFile, name, fail)
    monkeypatch.setattr(pq, "read_table", fail)
    assert assay.read(scores).schema.names[0] == "shard"


def test_duckdb_reads_it_as_it_lies(scores):
    duckdb = pytest.importorskip("duckdb")
    data = assay.read(scores)  # noqa: F841 (DuckDB finds it)
    found = duckdb.sql("SELECT shard, count(*), sum(mimic) FROM data WHERE row > 0 GROUP BY shard ORDER BY shard")
    assert found.fetchall()[1] == ("web/b.parquet", 1, 3.0)


def test_any_file_system_will_do(scores):
    memory = fsspec.filesystem("memory")
    try:
        memory.put(scores, "/read-scores", recursive=True)
        read, expected = (assay.read(url).to_table() for url in ("memory://read-scores", scores))
        assert read.schema.equals(expected.schema, check_metadata=True)
        assert str(read.to_pydict()) == str(expected.to_pydict())
    finally:
        memory.rm("/read-scores", recursive=True)


def test_what_is_not_done_is_an_error_or_named(tmp_path, caplog):
    values = {name: {"mimic": np.zeros(4, np.float32)} for name in ("a", "c")}
    scores = make_scores(tmp_path, values, without={"c": [2]})
    (tmp_path / "data/torn.parquet").write_bytes(b"PAR1")
    (tmp_path / "scores/quarantine/torn.jsonl").write_text(
        json.dumps({"shard": "torn.parquet", "row": None, "id": None, "reason": "no Parquet file"})
    )
    with pytest.raises(ValueError, match=r"1 of 3 shards .*\(torn\.parquet: no Parquet file\), .*; pass partial=True"):
        assay.read(scores)
    data = assay.read(scores, partial=True)
    assert "torn.parquet is left out: no Parquet file" in caplog.text
    assert data.count_rows() == 4 + 3
    assert data.to_table(filter=pc.field("shard") == "c.parquet")["row"].to_pylist() == [0, 1, 3]
    os.utime(tmp_path / "data/a.parquet")
    (tmp_path / "data/new.jsonl").write_text("{}")
    with pytest.raises(ValueError, match=r"1 of 4 shards have no score table; .* \(new\.jsonl\); or pass partial=True"):
        assay.read(scores)
    assert assay.read(scores, partial=True).count_rows() == 3
    assert "a.parquet is left out: the file has changed since it was scored" in caplog.text
    assert "new.jsonl is left out: missing" in caplog.text


def test_misuse_is_named(scores, tmp_path):
    with pytest.raises(ValueError, match=r"no manifest\.json"):
        assay.read(tmp_path / "data")
    (tmp_path / "data").rename(tmp_path / "moved")
    with pytest.raises(ValueError, match="if the corpus has moved"):
        assay.read(scores)
    assert assay.read(scores, corpus=tmp_path / "moved").count_rows() == 5
    taken = make_scores(tmp_path / "taken", {"a": {"shard": np.zeros(1, np.float32)}})
    with pytest.raises(ValueError, match="has a score 'shard'"):
        assay.read(taken)
