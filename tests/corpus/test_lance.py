"""Lance data sets, where Lance's library is installed: the same rows as elsewhere, and only from their own folder."""

from __future__ import annotations

import shutil

import fsspec
import numpy as np
import pyarrow as pa
import pytest

from assay.corpus.copying import copy_rows
from assay.corpus.errors import ShardError
from assay.corpus.format import CHUNK_ROWS, ColumnFacts
from assay.corpus.layout import table_path
from assay.corpus.readers import columns_of, read
from assay.corpus.shards import find_shards
from assay.corpus.storage import Store

lance = pytest.importorskip("lance")

ROWS = 2500
RECORDS = [
    {"text": f"t{i}" if i % 5 else None, "meta": {"lang": "de", "n": i} if i % 3 else None, "x": [i / 2, 0.5]}
    for i in range(ROWS)
]
SCHEMA = pa.schema(
    [
        ("text", pa.string()),
        ("meta", pa.struct([("lang", pa.string()), ("n", pa.int64())])),
        ("x", pa.list_(pa.float32(), 2)),
    ],
    metadata={"origin": "a test"},
)


def write(path) -> None:
    lance.write_dataset(pa.Table.from_pylist(RECORDS, SCHEMA), str(path), max_rows_per_file=900)


def rows_of(shard, *columns: str) -> list[tuple]:
    rows: list[tuple] = []
    for chunk in read(shard, columns):
        assert chunk.first == len(rows)
        assert chunk.length <= CHUNK_ROWS
        rows += zip(*(chunk.columns[name] for name in columns), strict=True)
    return rows


def test_rows_and_facts(tmp_path):
    write(tmp_path / "data" / "a.lance")
    corpus = find_shards(str(tmp_path / "data"))
    (shard,) = corpus.shards
    assert (shard.path, table_path(shard), corpus.left_out) == ("a.lance", "a.lance.parquet", ())
    assert find_shards(str(tmp_path / "data/a.lance")).shards == corpus.shards
    got = rows_of(shard, "text", "meta.n", "x")
    for record, (text, n, x) in zip(RECORDS, got, strict=True):
        assert (text, n, x.tolist()) == (record["text"], (record["meta"] or {}).get("n"), record["x"])
    assert columns_of(shard) == {
        "text": ColumnFacts("string"),
        "meta": ColumnFacts("struct<lang: string, n: int64>"),
        "meta.lang": ColumnFacts("string"),
        "meta.n": ColumnFacts("int64"),
        "x": ColumnFacts("list<float>"),
    }
    with pytest.raises(ShardError, match="did you mean 'text'"):
        rows_of(shard, "texts")


def test_beside_other_shards(tmp_path):
    write(tmp_path / "deep/a.lance")
    (tmp_path / "b.jsonl").write_text('{"text": "a"}\n')
    corpus = find_shards(str(tmp_path))
    assert [shard.path for shard in corpus.shards] == ["b.jsonl", "deep/a.lance"]
    assert corpus.left_out == ()


def test_deleted_rows_are_no_rows_and_change_the_fingerprint(tmp_path):
    write(tmp_path / "a.lance")
    (shard,) = find_shards(str(tmp_path)).shards
    before = shard.fingerprint()
    assert before == shard.fingerprint()
    lance.dataset(str(tmp_path / "a.lance")).delete("text = 't3'")
    assert shard.fingerprint() != before
    texts = [text for (text,) in rows_of(shard, "text")]
    assert texts == [record["text"] for record in RECORDS if record["text"] != "t3"]


def test_a_selection_is_a_data_set_of_its_own(tmp_path):
    write(tmp_path / "a.lance")
    (shard,) = find_shards(str(tmp_path / "a.lance")).shards
    keep = np.random.default_rng(0).random(ROWS) < 0.3
    out = Store.at(str(tmp_path / "out"))
    copy_rows(shard, np.ones(ROWS, bool), out)
    copy_rows(shard, keep, out)
    chosen = lance.dataset(str(tmp_path / "out/a.lance"))
    assert chosen.to_table().to_pylist() == [record for record, kept in zip(RECORDS, keep, strict=True) if kept]
    assert chosen.schema.equals(SCHEMA, check_metadata=True)
    assert len(chosen.versions()) == 1
    with pytest.raises(ShardError, match="2500 rows, but 3"):
        copy_rows(shard, np.ones(3, bool), out)
    copy_rows(shard, np.zeros(ROWS, bool), out)
    (empty,) = find_shards(str(tmp_path / "out/a.lance")).shards
    assert rows_of(empty, "text") == []


@pytest.mark.parametrize("damage", ["empty", "cut", "flipped", "gone", "no manifest", "manifest"])
def test_damage_is_an_error_of_the_shard(tmp_path, damage):
    write(tmp_path / "a.lance")
    (shard,) = find_shards(str(tmp_path)).shards
    path = next((tmp_path / "a.lance" / ("_versions" if "manifest" in damage else "data")).glob("*[!n]"))
    content = path.read_bytes()
    if damage == "gone":
        path.unlink()
    elif damage == "no manifest":
        shutil.rmtree(path.parent)
    else:
        flipped = bytes(byte ^ 0x55 for byte in content)
        path.write_bytes({"empty": b"", "cut": content[: len(content) // 2]}.get(damage, flipped))
    with pytest.raises(ShardError):
        rows_of(shard, "text")


def test_files_elsewhere_are_not_opened(tmp_path):
    write(tmp_path / "base.lance")
    lance.dataset(str(tmp_path / "base.lance")).shallow_clone(str(tmp_path / "a.lance"), 1)
    (shard,) = find_shards(str(tmp_path / "a.lance")).shards
    with pytest.raises(ShardError, match="outside of its folder"):
        rows_of(shard, "text")


@pytest.mark.parametrize("version", ["2.0", "2.2"])
def test_blobs_are_refused_by_name(tmp_path, version):
    field = pa.field("movie", pa.large_binary(), metadata={"lance-encoding:blob": "true"})
    table = pa.table([pa.array([b"x"], field.type)], schema=pa.schema([field]))
    lance.write_dataset(table, str(tmp_path / "a.lance"), data_storage_version=version)
    (shard,) = find_shards(str(tmp_path)).shards
    with pytest.raises(ShardError, match="the blob column 'movie'"):
        columns_of(shard)


def test_another_file_system_is_refused():
    fsspec.filesystem("memory").pipe_file("/lance/a.lance/data/x.lance", b"x")
    (shard,) = find_shards("memory://lance").shards
    assert shard.path == "a.lance"
    with pytest.raises(ShardError, match="from a local folder only"):
        rows_of(shard, "text")
