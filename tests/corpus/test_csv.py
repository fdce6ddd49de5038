"""Comma- and tab-separated shards: typed by their first rows, faults by row, copies byte for byte."""

from __future__ import annotations

import csv
import gzip
import io
import time

import numpy as np
import pytest

from assay.corpus.copying import copy_rows
from assay.corpus.errors import ShardError
from assay.corpus.format import CHUNK_ROWS
from assay.corpus.readers import columns_of, read
from assay.corpus.shards import find_shards
from assay.corpus.storage import Store

TEXTS = ["plain", 'a "quoted", word', "two\nlines", "", "ünï\tcode", "007", "1,5"]


def shard(tmp_path, content: bytes, name: str = "a.csv"):
    (tmp_path / name).write_bytes(content)
    (found,) = find_shards(str(tmp_path)).shards
    return found


def rows(found, *columns):
    """Values or the fault of every row."""
    return [
        chunk.faults.get(i) or tuple(chunk.columns[name][i] for name in columns)
        for chunk in read(found, columns)
        for i in range(chunk.length)
    ]


def written(delimiter: str = ",") -> bytes:
    out = io.StringIO()
    writer = csv.writer(out, delimiter=delimiter)
    writer.writerow(["id", "text", "label", "share", "vector"])
    for i in range(3000):
        writer.writerow([f"{i:04}", TEXTS[i % 7], i % 10, i / 7, [i, 0.5]])
    return out.getvalue().encode()


@pytest.mark.parametrize(
    ("name", "delimiter"), [("a.csv", ","), ("a.tsv", "\t"), ("a.csv.gz", ","), ("A.TSV.GZ", "\t")]
)
def test_every_row_with_its_types(tmp_path, name, delimiter):
    content = written(delimiter)
    found = shard(tmp_path, gzip.compress(content) if name.lower().endswith("gz") else content, name)
    got = rows(found, "id", "text", "label", "share", "vector")
    assert got == [(f"{i:04}", TEXTS[i % 7] or None, i % 10, i / 7, [i, 0.5]) for i in range(3000)]


def test_faults_are_their_rows(tmp_path):
    lines = [
        b"id,label",
        *[b"a%d,%d" % (i, i) for i in range(3)],
        b"b,x",
        b"c",
        b"",
        b"d,1,2",
        b'"e"f,1',
        b"\xff,1",
        b"g,",
    ]
    got = rows(shard(tmp_path, b"\xef\xbb\xbf" + b"\r\n".join(lines[:4] * 1)), "id", "label")
    assert got == [("a0", 0), ("a1", 1), ("a2", 2)]
    many = [lines[0], *lines[1:4] * 400, *lines[4:]]
    got = rows(shard(tmp_path, b"\n".join(many)), "id", "label")
    assert len(got) == 1206
    assert got[1200:] == [
        "label is 'x', expected a whole number as in the first rows",
        "line has 1 cells, expected 2 as in the header",
        "line has 3 cells, expected 2 as in the header",
        "line cannot be read (',' expected after '\"')",
        "line is not valid UTF-8",
        ("g", None),
    ]


def test_rows_that_a_quote_has_swallowed_are_a_fault(tmp_path):
    """GLUE's files, say, are written without quotes: of two texts with a quote each, the rows between would be lost."""
    content = b'id\tlabel\ttext\na\t0\t"Gold, he said\nb\t1\tDig\nc\t0\tNo"\nd\t1\tYes\n'
    fault, last = rows(shard(tmp_path, content, "a.tsv"), "id", "text")
    assert fault.startswith(
        "line has a quote that is closed 2 lines below, behind whole rows of 3 cells; write a quote"
    )
    assert last == ("d", "Yes")
    content = b'id\ttext\na\t"two\nlines"\nb\t"with\ttab\nand none"\nc\tone\n'
    expected = [("a", "two\nlines"), ("b", "with\ttab\nand none"), ("c", "one")]
    assert rows(shard(tmp_path, content, "a.tsv"), "id", "text") == expected
    assert rows(shard(tmp_path, b'text\n"two\nlines"\n', "a.tsv"), "text") == [("two\nlines",)]


def test_damaged_files_are_errors_of_their_shard(tmp_path):
    with pytest.raises(ShardError, match="a quote is never closed"):
        rows(shard(tmp_path, b'id,text\n1,"open\n2,x\n'), "id")
    with pytest.raises(ShardError, match=r"has no column 'txt'.*did you mean 'text'"):
        rows(shard(tmp_path, b"id,text\n1,x\n"), "txt")
    with pytest.raises(ShardError, match="has 2 columns named 'id'"):
        rows(shard(tmp_path, b"id,id\n1,x\n"), "id")
    with pytest.raises(ShardError, match="has no column 'id'"):
        rows(shard(tmp_path, b""), "id")


@pytest.mark.parametrize("name", ["a.csv", "a.csv.gz"])
def test_kept_records_are_copied_byte_for_byte(tmp_path, name):
    content = written()
    (tmp_path / "in").mkdir()
    found = shard(tmp_path / "in", gzip.compress(content) if name.endswith("gz") else content, name)
    keep = np.arange(3000) % 3 == 1
    copy_rows(found, keep, Store.at(str(tmp_path / "out")))
    (copied,) = find_shards(str(tmp_path / "out")).shards
    assert rows(copied, "id", "text") == [
        row for row, kept in zip(rows(found, "id", "text"), keep, strict=True) if kept
    ]
    raw = (tmp_path / "out" / name).read_bytes()
    assert set((gzip.decompress(raw) if name.endswith("gz") else raw).splitlines()) <= set(content.splitlines())
    with pytest.raises(ShardError, match="has 3000 rows, but 2999"):
        copy_rows(found, keep[:-1], Store.at(str(tmp_path / "again")))


def test_a_name_and_a_mark_that_look_like_something_else(tmp_path):
    assert rows(shard(tmp_path, b"id,text\n1,x\n2,y\n", "my.tsv.export.csv"), "id") == [(1,), (2,)]
    (tmp_path / "my.tsv.export.csv").unlink()
    marked = '\ufeffid,text\n+1,"a\n\ufeffb"\n1,c\n'.encode()
    assert rows(shard(tmp_path, marked), "id", "text") == [("+1", "a\n\ufeffb"), ("1", "c")]


def test_whole_numbers_keep_their_digits(tmp_path):
    large = [1 << 62, -(1 << 63), 10**18]
    content = "id,name,label\n" + "".join(f"{n},{10 * n},{n}e2\n" for n in large)
    later = "7,8,9\n" * 3000 + f"{10**25},8,{10**25}\n8,8,1e999\n{'9' * 5000},8,1\n"
    found = shard(tmp_path, (content + later).encode())
    got = rows(found, "id", "name", "label")
    assert got[:3] == [(n, str(10 * n), float(f"{n}e2")) for n in large]
    assert got[-3] == (10**25, "8", 1e25)
    assert got[-2] == "label is '1e999', expected a number as in the first rows"
    assert got[-1].endswith("expected a whole number as in the first rows")
    assert {name: fact.type for name, fact in columns_of(found).items()} == {
        "id": "int64",
        "name": "string",
        "label": "double",
    }


def test_a_name_is_as_it_is_written(tmp_path):
    """As an id is: of arXiv's papers or of versions, and whatever else comes after the first rows."""
    ids = ["2101.00100", "2101.001", "1", "1e5", "[2]", *map(str, range(10, CHUNK_ROWS + 10)), "abc", ""]
    found = shard(tmp_path, ("id,x\n" + "".join(f"{own},0.5\n" for own in ids)).encode())
    chunks = list(read(found, ["id", "x"], names=frozenset(["id"])))
    assert [value for chunk in chunks for value in chunk.columns["id"]] == [*ids[:-1], None]
    assert {value for chunk in chunks for value in chunk.columns["x"]} == {0.5}
    assert not any(chunk.faults for chunk in chunks)


def test_only_what_parses_is_a_list(tmp_path):
    content = "a,b,c\n" + "\"['x', 'y']\",[0.1 0.2],\"[1, 2]\"\n" * 2000 + '"[1]","[1]",[1 2]\n'
    got = rows(shard(tmp_path, content.encode()), "a", "b", "c")
    assert got[0] == ("['x', 'y']", "[0.1 0.2]", [1, 2])
    assert got[-1] == "c is '[1 2]', expected a JSON list as in the first rows"


def test_a_header_of_very_many_names_costs_no_time(tmp_path):
    names = ",".join(f"c{i}" for i in range(19_999)) + ",c0"
    found = shard(tmp_path, f"{names}\n{',' * 19_999}\n".encode())
    began = time.process_time()
    assert len(columns_of(found)) == 19_998
    assert time.process_time() - began < 2
    (tmp_path / "a.csv").unlink()
    with pytest.raises(ShardError, match="has 100,000 columns in its first rows"):
        columns_of(shard(tmp_path, (",x" * 99_999 + "\n").encode()))
