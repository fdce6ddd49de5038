"""Every format gives the same rows, streamed; damage is an error or a fault, never a short read."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import os
import subprocess
import sys

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet as pq
import pytest
import zstandard

from assay.corpus import compression
from assay.corpus.errors import ShardError
from assay.corpus.format import CHUNK_ROWS
from assay.corpus.readers import read
from assay.corpus.shards import find_shards

TEXTS = [f"document {i} " + "ü" * (i % 7) for i in range(2500)]
RECORDS = [{"id": i, "text": text} for i, text in enumerate(TEXTS)]


def table() -> pa.Table:
    return pa.Table.from_pylist(RECORDS)


def jsonl() -> bytes:
    return "".join(json.dumps(record) + "\n" for record in RECORDS).encode()


def arrow_file() -> bytes:
    sink = io.BytesIO()
    with pa.ipc.new_file(sink, table().schema) as writer:
        writer.write_table(table(), max_chunksize=999)
    return sink.getvalue()


def arrow_stream() -> bytes:
    sink = io.BytesIO()
    with pa.ipc.new_stream(sink, table().schema) as writer:
        writer.write_table(table(), max_chunksize=999)
    return sink.getvalue()


def feather() -> bytes:
    sink = io.BytesIO()
    pyarrow.feather.write_feather(table(), sink)
    return sink.getvalue()


def parquet() -> bytes:
    sink = io.BytesIO()
    pq.write_table(table(), sink, row_group_size=700)
    return sink.getvalue()


FORMATS = {
    "a.parquet": parquet,
    "a.jsonl": jsonl,
    "a.json": jsonl,
    "a.jsonl.gz": lambda: gzip.compress(jsonl()),
    "a.jsonl.zst": lambda: zstandard.compress(jsonl()),
    "a.ndjson": jsonl,
    "a.ndjson.bz2": lambda: bz2.compress(jsonl()),
    "a.jsonl.zstd": lambda: zstandard.compress(jsonl()),
    "a.json.xz": lambda: lzma.compress(jsonl()),
    "a.arrow": arrow_file,
    "stream.arrow": arrow_stream,
    "a.feather": feather,
}


def shard_of(folder, name: str, content: bytes):
    (folder / name).write_bytes(content)
    (shard,) = find_shards(str(folder / name)).shards
    return shard


def rows_of(shard, *columns: str):
    """(physical row, value per column) or (physical row, reason) for every row."""
    rows = []
    for chunk in read(shard, columns):
        assert chunk.length <= CHUNK_ROWS
        for i in range(chunk.length):
            values = tuple(chunk.columns[name][i] for name in columns)
            rows.append((chunk.first + i, chunk.faults.get(i, values)))
    return rows


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_gives_the_same_rows(tmp_path, name):
    shard = shard_of(tmp_path, name, FORMATS[name]())
    assert rows_of(shard, "id", "text") == [(i, (i, text)) for i, text in enumerate(TEXTS)]
    assert max(chunk.progress for chunk in read(shard, ["text"])) == 1.0


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_reads_from_another_file_system(name):
    fs = fsspec.filesystem("memory")
    fs.pipe_file(f"/readers/{name}", FORMATS[name]())
    (shard,) = find_shards(f"memory://readers/{name}").shards
    assert [row for row, _ in rows_of(shard, "text")] == list(range(len(TEXTS)))


@pytest.mark.parametrize("lost", [1, 9, 200])
@pytest.mark.parametrize("name", [name for name in FORMATS if name not in ("a.jsonl", "a.json", "a.ndjson")])
def test_a_truncated_file_is_an_error(tmp_path, name, lost):
    shard = shard_of(tmp_path, name, FORMATS[name]()[:-lost])
    with pytest.raises(ShardError):
        rows_of(shard, "text")


def test_a_stream_cut_between_two_batches_is_an_error(tmp_path):
    sink = io.BytesIO()
    writer = pa.ipc.new_stream(sink, table().schema)
    writer.write_table(table())
    complete_batches = sink.getvalue()  # the end marker comes with close()
    with pytest.raises(ShardError, match="truncated"):
        rows_of(shard_of(tmp_path, "a.arrow", complete_batches), "text")


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow", "a.jsonl.gz", "a.jsonl.zst"])
@pytest.mark.parametrize("content", [b"", b"this is not what the suffix says", b"\x00" * 64])
def test_a_file_of_another_kind_is_an_error(tmp_path, name, content):
    with pytest.raises(ShardError):
        rows_of(shard_of(tmp_path, name, content), "text")


def test_flipped_bytes_inside_gzip_are_found_by_its_checksum(tmp_path):
    content = bytearray(gzip.compress(jsonl(), compresslevel=0))
    content[len(content) // 2] ^= 1
    with pytest.raises(ShardError, match="CRC"):
        rows_of(shard_of(tmp_path, "a.jsonl.gz", bytes(content)), "text")


def test_a_lance_data_set_without_its_library_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "lance", None)
    (tmp_path / "a.lance/data").mkdir(parents=True)
    (tmp_path / "a.lance/data/0.lance").write_bytes(b"x")
    (shard,) = find_shards(str(tmp_path)).shards
    with pytest.raises(ShardError, match=r"pip install 'assay\[lance\]'"):
        rows_of(shard, "text")


def test_several_frames_in_one_file(tmp_path):
    parts = [jsonl()[:1000], jsonl()[1000:]]
    for name, compress in (("a.jsonl.gz", gzip.compress), ("b.jsonl.zst", zstandard.compress)):
        shard = shard_of(tmp_path, name, b"".join(compress(part) for part in parts))
        assert len(rows_of(shard, "text")) == len(TEXTS)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"", "line is blank"),
        (b"{", "line is not valid JSON"),
        (b"[1]", "line is a JSON list, expected an object"),
        (b"null", "line is a JSON NoneType"),
        (b'{"id": 1}', "line has no key 'text'"),
        (b'{"id": 1, "text": "\xff"}', "line is not valid UTF-8"),
        (b"[" * 100_000, "line is not valid JSON (RecursionError)"),
        (b'{"id": ' + b"9" * 5000 + b', "text": "a"}', "line is not valid JSON"),
    ],
)
def test_a_bad_line_is_a_fault_and_keeps_its_number(tmp_path, line, reason):
    good = b'{"id": 0, "text": "fine"}'
    shard = shard_of(tmp_path, "a.jsonl", b"\n".join([good, line, good]))
    first, bad, last = rows_of(shard, "text")
    assert (first, last) == ((0, ("fine",)), (2, ("fine",)))
    assert bad[0] == 1
    assert bad[1].startswith(reason)


def test_line_ends_and_byte_order_mark(tmp_path):
    content = "\ufeff".encode() + b'{"text": "a"}\r\n{"text": "\\u2028"}\n'
    shard = shard_of(tmp_path, "a.jsonl", content)
    assert rows_of(shard, "text") == [(0, ("a",)), (1, ("\u2028",))]


def test_a_line_that_never_ends_is_one_fault(tmp_path, monkeypatch):
    monkeypatch.setattr(compression, "MAX_LINE_BYTES", 100)
    monkeypatch.setattr(compression, "_BLOCK", 64)
    line = b'{"text": "' + b"x" * 1000 + b'"}\n'
    rows = rows_of(shard_of(tmp_path, "a.jsonl", b'{"text": "a"}\n' + line + b'{"text": "b"}\n'), "text")
    assert [row for row, _ in rows] == [0, 1, 2]
    assert rows[0][1] == ("a",)
    assert "longer than" in rows[1][1]
    assert rows[2][1] == ("b",)


def test_a_missing_column_names_the_nearest(tmp_path):
    shard = shard_of(tmp_path, "a.parquet", parquet())
    with pytest.raises(ShardError, match=r"no column 'texts'.*did you mean 'text'"):
        rows_of(shard, "texts")


def test_invalid_utf8_in_arrow_is_a_fault_of_its_row(tmp_path):
    raw = pa.array([b"fine", b"\xed\xa0\x80", None], pa.binary())
    strings = pa.StringArray.from_buffers(3, raw.buffers()[1], raw.buffers()[2], raw.buffers()[0])
    pq.write_table(pa.table({"text": strings}), tmp_path / "a.parquet")
    (shard,) = find_shards(str(tmp_path)).shards
    assert rows_of(shard, "text") == [(0, ("fine",)), (1, "text is not valid UTF-8"), (2, (None,))]


def test_dictionaries_that_are_replaced_beyond_what_their_indices_count(tmp_path):
    kind = pa.dictionary(pa.int8(), pa.string())
    values = [[f"{i}-{j}" for j in range(100)] for i in range(3)]
    with pa.ipc.new_stream(tmp_path / "a.arrow", pa.schema([("x", kind)])) as writer:
        for own in values:
            writer.write_batch(pa.record_batch([pa.array(own).dictionary_encode().cast(kind)], names=["x"]))
    (shard,) = find_shards(str(tmp_path)).shards
    assert [value for chunk in read(shard, ["x"]) for value in chunk.columns["x"]] == [
        value for own in values for value in own
    ]


def test_dictionary_columns_and_leading_nulls(tmp_path):
    texts = pa.array([None, None, "a", "b", "a"]).dictionary_encode()
    pq.write_table(pa.table({"text": texts}), tmp_path / "a.parquet")
    (shard,) = find_shards(str(tmp_path)).shards
    assert [value for _, (value,) in rows_of(shard, "text")] == [None, None, "a", "b", "a"]


@pytest.mark.parametrize(
    "kind",
    [pa.list_(pa.float32()), pa.large_list(pa.uint8()), pa.list_(pa.float64(), 2), pa.list_(pa.bool_(), 2)],
)
def test_numeric_lists_come_as_arrays(tmp_path, kind):
    values = [[0, 1], None, [1, 1], [1, 0]] * 400  # several chunks, nulls inside
    if pa.types.is_boolean(kind.value_type):
        values = [value and [bool(x) for x in value] for value in values]
    pq.write_table(pa.table({"x": pa.array(values, kind)}), tmp_path / "a.parquet", row_group_size=333)
    (shard,) = find_shards(str(tmp_path)).shards
    for (_, (got,)), expected in zip(rows_of(shard, "x"), values, strict=True):
        assert (got is None) == (expected is None)
        assert got is None or np.asarray(got, float).tolist() == expected


def test_lists_of_uneven_length_keep_their_rows(tmp_path):
    values = [[1.0], [], [2.0, 3.0], None, [None, 4.0]]
    pq.write_table(pa.table({"x": pa.array(values, pa.list_(pa.float32()))}), tmp_path / "a.parquet")
    (shard,) = find_shards(str(tmp_path)).shards
    got = [value for _, (value,) in rows_of(shard, "x")]
    assert [None if v is None else len(v) for v in got] == [1, 0, 2, None, 2]
    assert np.isnan(got[4][0])
    assert got[4][1] == 4.0


def test_empty_shards_have_no_rows(tmp_path):
    pq.write_table(table().slice(0, 0), tmp_path / "a.parquet")
    (tmp_path / "b.jsonl").write_bytes(b"")
    for shard in find_shards(str(tmp_path)).shards:
        assert rows_of(shard, "text") == []


DOCUMENTS = [
    json.dumps(RECORDS[:100]),
    json.dumps(RECORDS[:100], indent=2),
    json.dumps({"data": RECORDS[:100]}, indent=2),
    "\ufeff\n" + json.dumps(RECORDS[:100], indent=2),
    "[" + ",\n".join(map(json.dumps, RECORDS[:100])) + "]",
    "[\n" + "\n,".join(map(json.dumps, RECORDS[:100])) + "\n]\n",
    '{"id": 1,\n"text": "a"}',
    "[]",
    "{\n}",
]


@pytest.mark.parametrize("content", DOCUMENTS)
@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.json.gz"])
def test_a_json_document_is_one_error_of_its_shard(tmp_path, content, name):
    raw = content.encode()
    shard = shard_of(tmp_path, name, gzip.compress(raw) if name.endswith(".gz") else raw)
    with pytest.raises(ShardError, match="a JSON document, not JSON lines"):
        rows_of(shard, "text")


@pytest.mark.parametrize(
    "head",
    [b"[1]", b"{", b"[", b'{"text": "cut o', b'[{"text": 1}', b"{}", b"\n\n", b"null", b"[" * 100_000, b"{\n{"],
)
def test_a_first_line_that_is_damaged_is_no_document(tmp_path, head):
    good = b'{"id": 0, "text": "fine"}'
    if head == b"[":
        head = b"[ 1"
    rows = rows_of(shard_of(tmp_path, "a.jsonl", head + b"\n" + good + b"\n" + good), "text")
    assert [value for _, value in rows[-2:]] == [("fine",), ("fine",)]
    assert all(isinstance(value, str) for _, value in rows[:-2])


def test_an_object_on_one_line_is_a_row(tmp_path):
    assert rows_of(shard_of(tmp_path, "a.json", b'{"text": "a"}'), "text") == [(0, ("a",))]


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst"])
def test_blank_lines_without_end_are_an_error_of_their_shard(tmp_path, monkeypatch, name):
    monkeypatch.setattr("assay.corpus.readers.MOST_EMPTY_ROWS", 10_000)
    compress = gzip.compress if name.endswith("gz") else zstandard.compress
    shard = shard_of(tmp_path, name, compress(jsonl() + b"\n" * 1_000_000 + jsonl()))
    with pytest.raises(ShardError, match=r"rows after one another without a value"):
        rows_of(shard, "text")
    # A file that is as long as its rows are many is no bomb.
    assert len(rows_of(shard_of(tmp_path, "b.jsonl", b"\n" * 30_000), "text")) == 30_000


def test_nulls_without_end_are_an_error_of_their_shard(tmp_path, monkeypatch):
    monkeypatch.setattr("assay.corpus.readers.MOST_EMPTY_ROWS", 10_000)
    pq.write_table(pa.table({"text": pa.nulls(1_000_000, pa.string())}), tmp_path / "a.parquet")
    (shard,) = find_shards(str(tmp_path)).shards
    with pytest.raises(ShardError, match=r"rows after one another without a value"):
        rows_of(shard, "text")


def test_text_columns_come_in_chunks_of_bounded_size(tmp_path):
    """2,000 texts of 40 kB in one row group, one record batch, one dictionary."""
    texts = [f"{i:08}" * 5000 for i in range(2000)]
    unique = pa.table({"text": texts})
    coded = pa.table({"text": pa.array([texts[0]] * 2000).dictionary_encode()})
    runs = pa.RunEndEncodedArray.from_arrays(pa.array([2000], pa.int32()), pa.array(texts[:1]))
    pq.write_table(unique, tmp_path / "a.parquet")
    pq.write_table(coded, tmp_path / "b.parquet")
    for name, table_ in (("c", unique), ("d", coded), ("e", pa.table({"text": runs}))):
        with pa.ipc.new_file(str(tmp_path / f"{name}.arrow"), table_.schema) as writer:
            writer.write_batch(table_.combine_chunks().to_batches()[0])
    pyarrow.feather.write_feather(unique, tmp_path / "f.feather", chunksize=2000)
    (tmp_path / "g.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    for shard in find_shards(str(tmp_path)).shards:
        chunks = list(read(shard, ["text"]))
        assert sum(chunk.length for chunk in chunks) == 2000
        assert max(sum(map(len, chunk.columns["text"])) for chunk in chunks) < 3 << 20, shard.path


def test_one_long_text_does_not_make_its_neighbours_wait_in_memory(tmp_path):
    texts = ["short"] * 3000
    texts[1500] = "y" * 10_000_000
    for name, write in (
        ("a.parquet", lambda path: pq.write_table(pa.table({"text": texts}), path)),
        ("b.arrow", lambda path: pyarrow.feather.write_feather(pa.table({"text": texts}), path, "uncompressed")),
    ):
        write(str(tmp_path / name))
        (shard,) = find_shards(str(tmp_path / name)).shards
        chunks = list(read(shard, ["text"]))
        assert [text for chunk in chunks for text in chunk.columns["text"]] == texts
        assert next(chunk.length for chunk in chunks if max(map(len, chunk.columns["text"])) > 100) == 1


@pytest.mark.parametrize("kind", ["file", "parquet"])
def test_memory_follows_the_columns_that_are_read(tmp_path, kind):
    """A column of 150 MB beside the one that is read, in the same record batch or row group."""
    texts = pa.array([f"{i:08}" * 500 for i in range(5000)])
    other = pa.array([os.urandom(30_000)] * 5000)
    beside = pa.RecordBatch.from_arrays([texts, other], names=["text", "other"])
    path = tmp_path / ("a.parquet" if kind == "parquet" else "a.arrow")
    if kind == "parquet":
        pq.write_table(pa.table(beside), path, compression="none", use_dictionary=False, row_group_size=5000)
    else:
        with getattr(pa.ipc, f"new_{kind}")(str(path), beside.schema) as writer:
            writer.write_batch(beside)
    assert path.stat().st_size > 160 << 20
    program = """
import sys
from assay.corpus.readers import read
from assay.corpus.shards import find_shards
(shard,) = find_shards(sys.argv[1]).shards
# Not getrusage(), of which a process' peak begins with its parent's.
def peak(): return int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0]) >> 10
before = peak()
print(sum(chunk.length for chunk in read(shard, ["text"])), peak() - before)
"""
    run = subprocess.run([sys.executable, "-c", program, path], capture_output=True, text=True, check=True)
    rows, megabytes = map(int, run.stdout.split())
    assert rows == 5000
    assert megabytes < 80


def test_memory_follows_the_chunk_not_the_file(tmp_path):
    """A 200 MB row group's worth of JSONL passes through in chunks of bounded size."""
    line = json.dumps({"text": "x" * 200_000}).encode() + b"\n"
    (tmp_path / "a.jsonl").write_bytes(line * 300)
    (shard,) = find_shards(str(tmp_path)).shards
    lengths = [chunk.length for chunk in read(shard, ["text"])]
    assert sum(lengths) == 300
    assert max(lengths) < 100  # 16 MB of 200 kB lines
