"""The curated shard: the same format, schema and compression, the chosen rows and nothing else."""

from __future__ import annotations

import gzip
import json

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet as pq
import pytest
import zstandard

from assay.corpus.copying import copy_rows, copy_sidecars
from assay.corpus.errors import ShardError
from assay.corpus.shards import find_shards
from assay.corpus.storage import Store

ROWS = 3000
KEEP = np.random.default_rng(0).random(ROWS) < 0.3


def table() -> pa.Table:
    schema = pa.schema(
        [
            pa.field("text", pa.string(), metadata={"unit": "words"}),
            pa.field("meta", pa.struct([("lang", pa.string()), ("tags", pa.list_(pa.int16()))])),
            pa.field("kind", pa.dictionary(pa.int32(), pa.string())),
        ],
        metadata={"origin": "a test"},
    )
    rows = [
        {
            "text": f"t{i}" if i % 5 else None,
            "meta": {"lang": "de", "tags": [i % 9] * (i % 3)},
            "kind": "ab"[i % 2],
        }
        for i in range(ROWS)
    ]
    return pa.Table.from_pylist(rows, schema)


def copied(tmp_path, name: str, keep=KEEP):
    (shard,) = find_shards(str(tmp_path / name)).shards
    copy_rows(shard, keep, Store.at(str(tmp_path / "out")))
    return tmp_path / "out" / name


@pytest.mark.parametrize("codec", ["zstd", "snappy", "none"])
def test_parquet(tmp_path, codec):
    pq.write_table(table(), tmp_path / "a.parquet", compression=codec, row_group_size=500)
    out = copied(tmp_path, "a.parquet")
    result = pq.read_table(out)
    assert result.equals(table().filter(pa.array(KEEP)))
    assert result.schema.equals(pq.read_schema(tmp_path / "a.parquet"), check_metadata=True)
    facts = pq.read_metadata(out)
    assert {facts.row_group(0).column(i).compression for i in range(facts.num_columns)} == {
        codec.upper().replace("NONE", "UNCOMPRESSED")
    }
    assert facts.num_row_groups > 1


@pytest.mark.parametrize("name", ["file.arrow", "stream.arrow", "a.feather"])
def test_arrow(tmp_path, name):
    source = table().cast(table().schema.set(2, pa.field("kind", pa.string())))
    if name == "a.feather":
        pyarrow.feather.write_feather(source, tmp_path / name)
    else:
        create = pa.ipc.new_file if name == "file.arrow" else pa.ipc.new_stream
        with create(str(tmp_path / name), source.schema) as writer:
            writer.write_table(source, max_chunksize=700)
    out = copied(tmp_path, name)
    opened = pa.ipc.open_stream if name == "stream.arrow" else pa.ipc.open_file
    with pa.OSFile(str(out)) as file:
        result = opened(file).read_all()
    assert result.equals(source.filter(pa.array(KEEP)))
    assert result.schema.equals(source.schema, check_metadata=True)


@pytest.mark.parametrize(
    ("name", "pack", "unpack"),
    [
        ("a.jsonl", bytes, bytes),
        ("a.jsonl.gz", gzip.compress, gzip.decompress),
        (
            "a.json.zst",
            zstandard.compress,
            lambda b: zstandard.ZstdDecompressor().decompressobj().decompress(b),
        ),
    ],
)
def test_jsonl_lines_are_copied_byte_for_byte(tmp_path, name, pack, unpack):
    lines = [f'{{"n":{i},  "odd  spacing": "\\u00fc"}}'.encode() for i in range(ROWS)]
    (tmp_path / name).write_bytes(pack(b"\n".join(lines)))
    out = copied(tmp_path, name)
    first = out.read_bytes()
    assert unpack(first) == b"".join(line + b"\n" for line, keep in zip(lines, KEEP, strict=True) if keep)
    assert copied(tmp_path, name).read_bytes() == first


@pytest.mark.parametrize("name", ["a.parquet", "a.jsonl", "a.arrow"])
@pytest.mark.parametrize("length", [ROWS - 1, ROWS + 1, 0])
def test_a_shard_of_another_length_is_an_error_and_nothing_appears(tmp_path, name, length):
    source = table().select(["text"])
    if name == "a.parquet":
        pq.write_table(source, tmp_path / name)
    elif name == "a.arrow":
        with pa.ipc.new_stream(str(tmp_path / name), source.schema) as writer:
            writer.write_table(source)
    else:
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in source.to_pylist()))
    with pytest.raises(ShardError, match=f"has {ROWS} rows, but {length}"):
        copied(tmp_path, name, np.ones(length, bool))
    assert not (tmp_path / "out" / name).exists()


@pytest.mark.parametrize("name", ["a.parquet", "a.jsonl"])
def test_keeping_nothing_leaves_a_shard_without_rows(tmp_path, name):
    if name == "a.parquet":
        pq.write_table(table(), tmp_path / name)
    else:
        (tmp_path / name).write_text("{}\n" * ROWS)
    out = copied(tmp_path, name, np.zeros(ROWS, bool))
    rows = pq.read_metadata(out).num_rows if name == "a.parquet" else out.stat().st_size
    assert rows == 0


def test_a_saved_data_set_loads_again(tmp_path):
    data = datasets.Dataset.from_dict({"text": [f"t{i}" for i in range(100)]})
    datasets.DatasetDict({"train": data, "test": data}).save_to_disk(
        str(tmp_path / "in"), num_shards={"train": 3, "test": 1}
    )
    corpus = find_shards(str(tmp_path / "in"))
    target = Store.at(str(tmp_path / "out"))
    for shard in corpus.shards:
        rows = 100 if shard.path.startswith("test") else (34 if "00000-of" in shard.path else 33)
        copy_rows(shard, np.arange(rows) % 2 == 0, target)
    copy_sidecars(corpus, target, "every other row")
    curated = datasets.load_from_disk(str(tmp_path / "out"))
    assert {name: len(split) for name, split in curated.items()} == {"train": 51, "test": 50}
    assert curated["test"]["text"][:3] == ["t0", "t2", "t4"]
    original = datasets.load_from_disk(str(tmp_path / "in"))
    assert curated["train"]._fingerprint != original["train"]._fingerprint


@pytest.mark.parametrize("content", ["[1, 2]", "null", "{", "[" * 100_000])
def test_a_sidecar_that_is_no_object_is_copied_as_it_is(tmp_path, content):
    datasets.Dataset.from_dict({"text": ["a"]}).save_to_disk(str(tmp_path / "in"))
    (tmp_path / "in/dataset_info.json").write_text(content)
    copy_sidecars(find_shards(str(tmp_path / "in")), Store.at(str(tmp_path / "out")), "all")
    assert (tmp_path / "out/dataset_info.json").read_text() == content
    assert "_fingerprint" in (tmp_path / "out/state.json").read_text()


def views() -> pa.Table:
    """Columns that pyarrow's own filter does not take, or takes whole."""
    texts = [None if i % 5 == 0 else f"a text of some length, number {i}" for i in range(ROWS)]
    lists = [None if i % 7 == 0 else [text] * (i % 3) for i, text in enumerate(texts)]
    raw = pa.array([b"\xff" * 20 if i % 2 else b"fine" for i in range(ROWS)], pa.binary_view())
    runs = pa.array(np.arange(1, 101) * 30, pa.int32())
    kinds = pa.struct([("a", pa.string_view()), ("b", pa.list_(pa.int8()))])
    return pa.table(
        {
            "text": pa.array(texts, pa.string_view()),
            "raw": raw,
            "not_utf8": raw.view(pa.string_view()),
            "list": pa.array(lists, pa.list_(pa.string_view())),
            "list_view": pa.array(lists, pa.list_view(pa.string_view())),
            "numbers": pa.array([None if i % 3 == 0 else [i] * (i % 4) for i in range(ROWS)], pa.list_view(pa.int16())),
            "large": pa.array([[i] for i in range(ROWS)], pa.large_list_view(pa.int64())),
            "struct": pa.array([None if i % 9 == 0 else {"a": t, "b": [1]} for i, t in enumerate(texts)], kinds),
            "map": pa.array([[(t or "", t)] for t in texts], pa.map_(pa.string_view(), pa.string_view())),
            "fixed": pa.array([[t, t] for t in texts], pa.list_(pa.string_view(), 2)),
            "coded": pa.DictionaryArray.from_arrays(
                pa.array([i % 3 for i in range(ROWS)], pa.int8()), pa.array(["a", "b" * 20, None], pa.string_view())
            ),
            "runs": pa.RunEndEncodedArray.from_arrays(runs, pa.array([f"run {i}" for i in range(100)])),
            "date": pa.array(range(ROWS), pa.date32()),
            "decimal": pa.array(range(ROWS), pa.decimal128(9)),
        }
    )


def rows_of(column: pa.ChunkedArray) -> list[str]:
    """The values, also of text that is not UTF-8."""
    kind = pa.binary_view() if column.type == pa.string_view() else column.type
    return [str(value) for chunk in column.chunks for value in chunk.view(kind).to_pylist()]


@pytest.mark.parametrize("name", views().schema.names)
@pytest.mark.parametrize("create", [pa.ipc.new_file, pa.ipc.new_stream])
def test_columns_that_arrow_does_not_filter(tmp_path, name, create):
    source = views().select([name])
    with create(str(tmp_path / "a.arrow"), source.schema) as writer:
        writer.write_table(source)
    out = copied(tmp_path, "a.arrow")
    with pa.OSFile(str(out)) as file:
        result = (pa.ipc.open_file if create is pa.ipc.new_file else pa.ipc.open_stream)(file).read_all()
    assert result.schema.equals(source.schema, check_metadata=True)
    expected = [row for row, keep in zip(rows_of(source[name]), KEEP, strict=True) if keep]
    assert rows_of(result[name]) == expected
    # Views may point into bytes of rows that were dropped: those must not be written along.
    assert out.stat().st_size < 0.6 * (tmp_path / "a.arrow").stat().st_size + 20_000


@pytest.mark.parametrize("name", ["text", "raw"])
def test_views_in_parquet(tmp_path, name):
    source = views().select([name])
    pq.write_table(source, tmp_path / "a.parquet")
    result = pq.read_table(copied(tmp_path, "a.parquet"))
    assert result.schema.equals(source.schema)
    assert rows_of(result[name]) == [row for row, keep in zip(rows_of(source[name]), KEEP, strict=True) if keep]
