"""The list of what was not scored: short however many rows it speaks of, and complete when it is read."""

from __future__ import annotations

import tempfile

import pytest

from assay.corpus import quarantine
from assay.corpus.errors import CorpusError
from assay.corpus.quarantine import Quarantined, QuarantineWriter, quarantine_path, read_quarantine
from assay.corpus.shards import find_shards
from assay.corpus.storage import Store


@pytest.fixture
def shard(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a.jsonl").write_bytes(b"")
    (shard,) = find_shards(str(tmp_path / "in")).shards
    return shard


@pytest.fixture
def store(tmp_path) -> Store:
    return Store.at(str(tmp_path / "out"))


def save(shard, store, entries) -> list[bytes]:
    """The lines of the list of these entries."""
    with tempfile.TemporaryFile() as spool:
        writer = QuarantineWriter(shard, spool)
        for entry in entries:
            writer.add(*entry)
        assert writer.count == len(entries)
        writer.save(store)
    with store.open(quarantine_path(shard)) as file:
        return file.readlines()


def read(shard, store) -> list[tuple]:
    return [(entry.row, entry.id, entry.reason) for entry in read_quarantine(store, shard)]


@pytest.mark.parametrize(
    ("entries", "lines"),
    [
        ([(row, None, "line is blank") for row in range(1000)], 1),
        ([(row, f"a.jsonl:{row}", "text is null") for row in range(7, 1000)], 1),
        ([(row, f"id {row}", "text is null") for row in range(10)], 10),  # their ids would be lost
        ([(row, None, "line is blank") for row in range(0, 20, 2)], 10),  # others lie between them
        ([(0, None, "a"), (1, None, "b"), (2, None, "b"), (3, "a.jsonl:3", "b"), (4, "a.jsonl:4", "b")], 3),
        ([(3, "a.jsonl:3", "x"), (4, "a.jsonl:5", "x"), (5, "a.jsonl:5", "x")], 3),
        ([(None, None, "unreadable")], 1),
    ],
)
def test_rows_after_one_another_share_a_line_and_come_back_one_by_one(shard, store, entries, lines):
    assert len(save(shard, store, entries)) == lines
    assert read(shard, store) == entries


def test_a_single_row_is_written_as_ever(shard, store):
    (line,) = save(shard, store, [(3, "x", "text is null")])
    assert line == b'{"shard": "a.jsonl", "row": 3, "id": "x", "reason": "text is null"}\n'


def test_beyond_its_cap_a_list_names_rows_only(shard, store, monkeypatch):
    monkeypatch.setattr(quarantine, "MOST_ENTRIES", 10)
    lines = save(shard, store, [(row, f"id {row}", f"reason {row}") for row in range(1000)])
    assert len(lines) < 13
    entries = read(shard, store)
    assert [row for row, _, _ in entries] == list(range(1000))
    assert entries[9] == (9, "id 9", "reason 9")
    assert entries[-1][1] is None
    assert "several reasons" in entries[-1][2]


@pytest.mark.parametrize(
    "line",
    [
        b"{",
        b"[]",
        b"5",
        b"[" * 100_000,
        b'{"row": 1}',
        b'{"shard": 1, "row": 1, "id": null, "reason": "x"}',
        b'{"shard": "a", "row": "1", "id": null, "reason": "x"}',
        b'{"shard": "a", "row": 1, "id": null, "reason": "x", "last": "9"}',
        b'{"shard": "a", "row": true, "id": null, "reason": "x"}',
    ],
)
def test_a_damaged_list_is_one_error_that_names_it(shard, store, line):
    store.write_text(quarantine_path(shard), "\n")
    with store.write(quarantine_path(shard)) as file:
        file.write(line + b"\n")
    with pytest.raises(CorpusError, match=r"quarantine/a\.jsonl: not a list of quarantined rows"):
        read(shard, store)


def test_escapes_and_an_empty_list(shard, store):
    raw = save(shard, store, [(3, "\x1b[31mred", "text is null"), (None, None, "unreadable")])
    assert not any(b"\x1b" in line for line in raw)
    assert list(read_quarantine(store, shard)) == [
        Quarantined("a.jsonl", 3, "\x1b[31mred", "text is null"),
        Quarantined("a.jsonl", None, None, "unreadable"),
    ]
    with tempfile.TemporaryFile() as spool:
        QuarantineWriter(shard, spool).save(store)
    assert store.files() == []
    assert read(shard, store) == []
