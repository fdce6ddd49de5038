"""WebDataset: a tar archive whose neighbouring members of one name, up to its first dot, are a row.

The rest of the name, in lower case, is the column: `a/7.jpg` and `a/7.json` are the row `a/7` with the columns `jpg`
and `json`, and its `__key__` is `a/7`. A member without a dot, or without a name before it, belongs to no row. A name
that comes again later is another row. Nothing is extracted or unpickled: links, devices and names that lead out of the
archive are faults of their rows. Chosen rows' members are copied byte for byte.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, BinaryIO

from assay.corpus.compression import MAX_LINE_BYTES, compressed, unpacked
from assay.corpus.dotted import value_at
from assay.corpus.errors import BadRow
from assay.corpus.facts import facts_of_values
from assay.corpus.format import Chunk, ColumnFacts, Format, Mask, Source, check_length, parts
from assay.corpus.media import media_type
from assay.corpus.tar import Archive, Member, end_mark

KEY = "__key__"
MOST_MEMBERS = 1000
# What a row takes in memory beside its data.
_ROW_BYTES = 1000

_WHOLE_NUMBER = re.compile(r"\s*-?[0-9]+\s*", re.ASCII)
_NAME = re.compile(r"((?:.*/)?[^./]+)\.([^/]+)", re.DOTALL)


@dataclass
class _Row:
    """A row's members: the data of those that are wanted, by column."""

    key: str
    data: dict[str, bytes] = field(default_factory=dict)
    seen: set[str] = field(default_factory=set)
    size: int = _ROW_BYTES
    fault: str | None = None

    def __post_init__(self) -> None:
        self.size += sys.getsizeof(self.key)

    def take(self, archive: Archive, member: Member, column: str, is_wanted: bool) -> None:
        """Note a member and, if it is wanted, read it."""
        if self.fault:
            return
        # The names count, of members that are not wanted too: a header may hold one of 64 KiB.
        size = sys.getsizeof(column) + (member.size if is_wanted else 0)
        if column in self.seen:
            self.fault = f"row has two members {column[-80:]!r}"
        elif len(self.seen) == MOST_MEMBERS:
            self.fault = f"row has more than {MOST_MEMBERS:,} members"
        elif self.size + size > MAX_LINE_BYTES:
            self.fault = f"row is larger than {MAX_LINE_BYTES >> 20} MiB"
        else:
            self.fault = member.fault
        if self.fault:
            return
        self.seen.add(column)
        self.size += size
        if is_wanted:
            self.data[column] = archive.data()

    def record(self) -> dict[str, Any]:
        """The wanted columns' values. A BadRow for one that is not what its name says."""
        if self.fault:
            raise BadRow(self.fault)
        return {KEY: self.key, **{column: _decoded(column, data) for column, data in self.data.items()}}


def _read(source: Source, columns: Sequence[str]) -> Iterator[Chunk]:
    for first, rows in parts(_rows(source, columns), _size):
        values: dict[str, list[Any]] = {name: [None] * len(rows) for name in columns}
        faults: dict[int, str] = {}
        for i, row in enumerate(rows):
            try:
                record = row.record()
                found = [value_at(record, name, "row has no", source.optional) for name in columns]
            except BadRow as fault:  # noqa: PERF203 - a fault concerns its own row only
                faults[i] = str(fault)
            else:
                for name, value in zip(columns, found, strict=True):
                    values[name][i] = value
        yield Chunk(first, values, faults, len(rows), source.share_read)


def _facts(source: Source) -> dict[str, ColumnFacts]:
    _, rows = next(parts(_rows(source, None), _size), (0, []))
    columns: dict[str, list[Any]] = {KEY: [row.key for row in rows]}
    for row in rows:
        for column, data in row.data.items():
            try:
                columns.setdefault(column, []).append(_decoded(column, data))
            except BadRow:  # noqa: PERF203
                columns.setdefault(column, [])
    raw = [name for name in columns if name != KEY and _suffix(name) not in _DECODERS]
    media = {name: ColumnFacts(media_type(f".{_suffix(name)}")) for name in raw}
    return {name: media.get(name, fact) for name, fact in facts_of_values(columns).items()}


def _copy(source: Source, keep: Mask, file: BinaryIO) -> None:
    archive = Archive(unpacked(source.file, source.compression))
    seen = size = 0
    with compressed(file, source.compression) as out:
        for row, member, _ in _members(archive):
            seen = row + 1
            if row < len(keep) and keep[row]:
                size += archive.copy(member, out)
        out.write(end_mark(size))
    check_length(seen, keep)


def _rows(source: Source, columns: Sequence[str] | None) -> Iterator[_Row]:
    """Every row; ``columns`` None takes all."""
    archive = Archive(unpacked(source.file, source.compression))
    row, place = _Row(""), -1
    for at, member, (key, column) in _members(archive):
        if at != place:
            if place >= 0:
                yield row
            row, place = _Row(key), at
        is_wanted = columns is None or any(name == column or name.startswith(f"{column}.") for name in columns)
        row.take(archive, member, column, is_wanted)
    if place >= 0:
        yield row


def _size(row: _Row) -> int:
    return row.size


def _members(archive: Archive) -> Iterator[tuple[int, Member, tuple[str, str]]]:
    """The members that belong to rows, each with its row's number, and its key and column."""
    row, current = -1, None
    for member in archive.members():
        match = _NAME.fullmatch(member.name)
        if match:
            key, column = match[1], match[2].lower()
            row += key != current
            current = key
            yield row, member, (key, column)


def _suffix(column: str) -> str:
    return column.rpartition(".")[2]


def _decoded(column: str, data: bytes) -> Any:
    """A member's value: of most suffixes the bytes as they are. A BadRow for what does not decode."""
    decode = _DECODERS.get(_suffix(column))
    try:
        return decode(data) if decode else data
    except UnicodeDecodeError as error:
        raise BadRow(f"{column} is not valid UTF-8") from error
    except (ValueError, RecursionError) as error:
        what = "JSON" if decode is _json else "a whole number"
        raise BadRow(f"{column} is not {what} ({type(error).__name__})") from error


def _text(data: bytes) -> str:
    return data.decode("utf-8")


def _json(data: bytes) -> Any:
    return json.loads(data.decode("utf-8"))


def _whole_number(data: bytes) -> int:
    """Python's own `int` takes "1_0" and the digits of every script."""
    text = data.decode("utf-8")
    if not _WHOLE_NUMBER.fullmatch(text):
        raise ValueError
    return int(text)


_DECODERS: dict[str, Callable[[bytes], Any]] = {
    **dict.fromkeys(("txt", "text", "transcript", "id"), _text),
    **dict.fromkeys(("json", "jsn"), _json),
    **dict.fromkeys(("cls", "cls2", "class", "index", "inx", "count"), _whole_number),
}

FORMAT = Format("webdataset", (".tar",), _read, _copy, _facts, compressible=True, has_keys=True)
