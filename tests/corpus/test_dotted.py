"""Columns inside structs by dotted names, the same in every format that has structs."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from assay.corpus.dotted import value_at
from assay.corpus.errors import BadRow, ShardError
from assay.corpus.readers import read
from assay.corpus.shards import find_shards

ROWS = [
    {"meta": {"lang": "en", "deep": {"n": 1, "x": [0.5, 1.5]}}, "text": "a"},
    {"meta": None, "text": "b"},
    {"meta": {"lang": None, "deep": None}, "text": "c"},
    {"meta": {"lang": "de", "deep": {"n": None, "x": [2.5]}}, "text": "d"},
] * 3
DEEP = pa.struct([("n", pa.int64()), ("x", pa.list_(pa.float64()))])
KIND = pa.struct([("lang", pa.string()), ("deep", DEEP)])
NAMES = ("a.parquet", "file.arrow", "stream.arrow", "a.jsonl")


def write(path: Path, rows: list[dict], schema: pa.Schema | None = None) -> None:
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return
    table = pa.Table.from_pylist(rows, schema)
    if path.suffix == ".parquet":
        pq.write_table(table, path, row_group_size=5)
        return
    create = pa.ipc.new_file if path.name == "file.arrow" else pa.ipc.new_stream
    with create(str(path), table.schema) as writer:
        writer.write_table(table, max_chunksize=5)


def values(path: Path, *names: str) -> list[tuple]:
    (shard,) = find_shards(str(path)).shards
    found = []
    for chunk in read(shard, names):
        assert not chunk.faults
        found += zip(*(chunk.columns[name] for name in names), strict=True)
    return [tuple(v.tolist() if isinstance(v, np.ndarray) else v for v in row) for row in found]


@pytest.mark.parametrize("name", NAMES)
def test_fields_of_structs(tmp_path, name):
    write(tmp_path / name, ROWS, pa.schema([("meta", KIND), ("text", pa.string())]))
    rows = values(tmp_path / name, "meta.deep.n", "text", "meta.lang", "meta.deep.x", "meta.deep", "meta")
    for row, (n, text, lang, x, deep, meta) in zip(ROWS, rows, strict=True):
        inner = (row["meta"] or {}).get("deep") or {}
        assert (n, text, lang) == (inner.get("n"), row["text"], (row["meta"] or {}).get("lang"))
        assert x == inner.get("x")
        assert meta == row["meta"]
        assert deep == (row["meta"] or {}).get("deep")


@pytest.mark.parametrize("name", NAMES)
def test_a_columns_own_name_wins(tmp_path, name):
    write(tmp_path / name, [{"m": {"a": "inner"}, "m.a": "own"}] * 3)
    assert values(tmp_path / name, "m.a") == [("own",)] * 3


@pytest.mark.parametrize("name", NAMES)
def test_names_with_dots_below_structs(tmp_path, name):
    write(tmp_path / name, [{"m": {"a.b": 1}, "m.c": {"d": 2}}])
    assert values(tmp_path / name, "m.a.b", "m.c.d") == [(1, 2)]


@pytest.mark.parametrize("name", NAMES[:3])
@pytest.mark.parametrize(
    ("column", "reason"),
    [
        ("meta.land", r"no column 'meta.land'.*did you mean 'meta.lang'"),
        ("text.lang", r"no column 'text.lang', only 'meta', 'text', 'meta.lang'"),
        ("meta.", "no column 'meta.'"),
        (".", r"no column '\.'"),
        ("meta.twice", "2 columns named 'meta.twice'"),
    ],
)
def test_what_is_not_there_is_an_error(tmp_path, name, column, reason):
    twice = pa.StructArray.from_arrays([pa.array(["a"])] + [pa.array([1])] * 2, ["lang", "twice", "twice"])
    table = pa.table({"meta": twice, "text": ["x"]})
    if name == "a.parquet":
        pq.write_table(table, tmp_path / name)
    else:
        with (pa.ipc.new_file if name == "file.arrow" else pa.ipc.new_stream)(
            str(tmp_path / name), table.schema
        ) as writer:
            writer.write_table(table)
    (shard,) = find_shards(str(tmp_path / name)).shards
    with pytest.raises(ShardError, match=reason):
        list(read(shard, [column]))


def test_a_missing_key_is_a_fault_of_its_line(tmp_path):
    rows = [{"m": {"a": 1}}, {"m": {}}, {"m": 5}, {"m": None}, {}, {"m": {"a": 2}}]
    write(tmp_path / "a.jsonl", rows)
    (shard,) = find_shards(str(tmp_path)).shards
    (chunk,) = read(shard, ["m.a"])
    assert chunk.faults == dict.fromkeys((1, 2, 4), "line has no key 'm.a'")
    assert list(chunk.columns["m.a"]) == [1, None, None, None, None, 2]


@pytest.mark.parametrize("name", ["", ".", "..", "a.", ".a", "a..b", "b.c.d"])
def test_odd_names(name):
    with pytest.raises(BadRow, match="no key"):
        value_at({"a": {"b": 1}, "b": 2}, name)
    assert value_at({name: 1}, name) == 1
    assert value_at({"x": {name: 1}}, f"x.{name}") == 1


def test_the_longest_key_leads_on_and_time_does_not_double_with_every_dot():
    assert value_at({"a": {"b": {"c": 1}}, "a.b": {"c": 2}}, "a.b.c") == 2
    assert value_at({"a": {"b": {"c": 1}}, "a.b": 3}, "a.b.c") == 1
    record: dict = {"a": 1}
    for _ in range(60):
        record = {"a" + ".a" * i: record for i in range(3)}
    with pytest.raises(BadRow):
        value_at(record, ".".join("a" * 60) + ".b")


def test_a_value_that_does_not_decode_below_a_null_struct_is_no_fault(tmp_path):
    raw = pa.array([b"fine", b"\xff", b"\xff"], pa.binary())
    texts = pa.StringArray.from_buffers(3, *[raw.buffers()[i] for i in (1, 2, 0)])
    meta = pa.StructArray.from_arrays([texts], ["lang"], mask=pa.array([False, True, False]))
    table = pa.table({"meta": meta})
    with pa.ipc.new_file(str(tmp_path / "a.arrow"), table.schema) as writer:
        writer.write_table(table)
    (shard,) = find_shards(str(tmp_path)).shards
    (chunk,) = read(shard, ["meta.lang"])
    assert list(chunk.columns["meta.lang"]) == ["fine", None, None]
    assert chunk.faults == {2: "meta.lang is not valid UTF-8"}


def test_only_the_field_is_read_from_parquet(tmp_path, monkeypatch):
    wide = [{"m": {"a": i, "big": "x" * 1000}} for i in range(50)]
    write(tmp_path / "a.parquet", wide)
    asked: list[list[str]] = []
    whole = pq.ParquetFile.iter_batches

    def spied(self, *args, columns, **kwargs):
        asked.append(columns)
        for batch in whole(self, *args, columns=columns, **kwargs):
            assert batch.schema.field("m").type == pa.struct([("a", pa.int64())])
            yield batch

    monkeypatch.setattr(pq.ParquetFile, "iter_batches", spied)
    assert [n for (n,) in values(tmp_path / "a.parquet", "m.a")] == list(range(50))
    assert asked == [["m.a"]]
