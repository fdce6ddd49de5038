"""Tables and quarantine lists on disk."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass

import numpy as np
import pyarrow.parquet as pq
import pytest

from assay.corpus import score_files
from assay.corpus.errors import CorpusError
from assay.corpus.score_files import ScoreWriter, open_score_file, stream_score
from assay.corpus.storage import Store


@dataclass(frozen=True)
class Column:
    name: str
    keep: str = "high"
    description: str = "a score"


def write(store: Store, path: str, rows: int, step: int = 100) -> None:
    with tempfile.TemporaryFile() as spool:
        writer = ScoreWriter([Column("mimic"), Column("loss", "low")], spool)
        for start in range(0, rows, step):
            index = np.arange(start, min(start + step, rows))
            scores = {"mimic": index.astype(np.float32) / 7, "loss": np.full(len(index), np.nan)}
            writer.add(index * 2, [f"id{i}" for i in index], scores)
        writer.save(store, path, {"rows": {"scored": writer.rows}})


def test_round_trip_and_row_groups(tmp_path, monkeypatch):
    monkeypatch.setattr(score_files, "ROW_GROUP_ROWS", 250)
    store = Store.at(str(tmp_path))
    write(store, "deep/a.parquet", 1000)
    table = pq.read_table(tmp_path / "deep/a.parquet")
    assert table.schema.metadata == {b"assay": b'{"rows":{"scored":1000}}'}
    assert table.schema.field("loss").metadata[b"keep"] == b"low"
    assert table["id"].to_pylist() == [f"id{i}" for i in range(1000)]
    batches = list(stream_score(store, "deep/a.parquet", "mimic"))
    assert {len(batch) for batch in batches} == {250}
    mimic = np.concatenate(batches)
    assert table["row"].to_pylist() == list(range(0, 2000, 2))
    np.testing.assert_array_equal(mimic, np.arange(1000, dtype=np.float32) / 7)
    assert pq.read_metadata(tmp_path / "deep/a.parquet").num_row_groups >= 3
    facts = open_score_file(store, "deep/a.parquet")
    assert (facts.rows, facts.metadata) == (1000, {"rows": {"scored": 1000}})


@pytest.mark.parametrize("rows", [0, 1, 999])
def test_the_same_scores_are_the_same_bytes(tmp_path, rows):
    store = Store.at(str(tmp_path))
    write(store, "a.parquet", rows)
    write(store, "b.parquet", rows)
    assert (tmp_path / "a.parquet").read_bytes() == (tmp_path / "b.parquet").read_bytes()
    assert pq.read_metadata(tmp_path / "a.parquet").num_rows == rows


def test_no_table_is_none_and_a_foreign_one_is_an_error(tmp_path):
    store = Store.at(str(tmp_path))
    assert open_score_file(store, "a.parquet") is None
    (tmp_path / "a.parquet").write_bytes(b"PAR1 and then nothing")
    with pytest.raises(CorpusError, match="not a readable score table"):
        open_score_file(store, "a.parquet")


@pytest.mark.parametrize("url", ["local", "memory://score-files"])
def test_of_a_table_its_footer_is_read_however_large(tmp_path, monkeypatch, url):
    store = Store.at(str(tmp_path) if url == "local" else url)
    write(store, "a.parquet", 5000)
    read, sizes = Store.read_tail, []
    monkeypatch.setattr(Store, "read_tail", lambda *given: sizes.append(given[2]) or read(*given))
    for enough, reads in ((64 << 10, 1), (1000, 2), (8, 2)):
        monkeypatch.setattr(score_files, "_FOOTER_BYTES", enough)
        sizes.clear()
        facts = open_score_file(store, "a.parquet")
        assert (facts.rows, facts.metadata) == (5000, {"rows": {"scored": 5000}})
        assert len(sizes) == reads
    monkeypatch.setattr(score_files, "_MOST_FOOTER_BYTES", 1000)
    with pytest.raises(CorpusError, match=r"a\.parquet: not a readable score table \(its footer has [\d,]+ bytes"):
        open_score_file(store, "a.parquet")
