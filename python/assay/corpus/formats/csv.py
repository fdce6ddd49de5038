"""Comma- and tab-separated values with a header; the chosen records are copied byte for byte.

Cells are texts. A column of which every cell in the first rows is a whole number, a number or a JSON list holds those
(an empty cell is null); a later cell that is none is a fault of its row. With whole numbers beyond 64
bits among them, they are texts; so are ids, of which 1.1 and 1.10 are two. Blank lines are no rows.

Tab-separated files are written with quotes and without. Where a quote that is a text's own has swallowed the rows up to
the next one, they are a fault, and no row.
"""

from __future__ import annotations

import csv
import json
import math
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any, BinaryIO

from assay.corpus import compression
from assay.corpus.compression import compressed, lines
from assay.corpus.errors import BadRow, ShardError
from assay.corpus.facts import check_width, facts_of_values
from assay.corpus.format import Chunk, ColumnFacts, Format, Mask, Source, check_columns, check_length, parts

csv.field_size_limit(compression.MAX_LINE_BYTES)

# More than any number has that can be counted with, too.
_MOST_DIGITS = 300

Record = tuple[bytes, "list[str] | BadRow"]
"""A record as it stands in the file, and its cells or what is the matter with it."""


def _read(source: Source, columns: Sequence[str]) -> Iterator[Chunk]:
    header, read = _opened(source)
    check_columns(columns, header)
    kinds: dict[str, _Kind] = {}
    for first, rows in read:
        cells = {name: _cells(rows, header.index(name)) for name in columns}
        kinds = kinds or {name: _TEXT if name in source.names else _kind_of(own) for name, own in cells.items()}
        faults = {i: str(row) for i, row in enumerate(rows) if isinstance(row, BadRow)}
        values = {name: kinds[name].values(name, own, faults) for name, own in cells.items()}
        yield Chunk(first, values, faults, len(rows), source.share_read)


def _facts(source: Source) -> dict[str, ColumnFacts]:
    header, read = _opened(source)
    _, rows = next(read, (0, []))
    check_width(len(header))
    times = Counter(header)
    cells = {name: _cells(rows, place) for place, name in enumerate(header) if times[name] == 1}
    return facts_of_values({name: _kind_of(own).values(name, own, {}) for name, own in cells.items()})


def _opened(source: Source) -> tuple[list[str], Iterator[tuple[int, list[list[str] | BadRow]]]]:
    """The header, and the rows in chunks, each with the index of its first."""
    records = _records(source)
    _, header = next(records, (b"", []))
    if isinstance(header, BadRow):
        raise ShardError(f"its header cannot be read: {header}")

    def rows(part: Sequence[Record]) -> list[list[str] | BadRow]:
        return [row if isinstance(row, BadRow) or len(row) == len(header) else _uneven(row, header) for _, row in part]

    return header, ((first, rows(part)) for first, part in parts(records, lambda record: len(record[0])))


def _copy(source: Source, keep: Mask, file: BinaryIO) -> None:
    records, seen = _records(source), 0
    with compressed(file, source.compression) as out:
        out.write(next(records, (b"", []))[0])
        for seen, (raw, _) in enumerate(records, start=1):
            if seen <= len(keep) and keep[seen - 1]:
                out.write(raw)
    check_length(seen, keep)


def _records(source: Source) -> Iterator[Record]:
    """Every record, the header first. ShardError where a quote is never closed."""
    held: list[bytes] = []
    length, first = 0, True

    def decoded() -> Iterator[str]:
        nonlocal length, first
        for line in lines(source.file, source.compression):
            held.append(line + b"\n")
            length += len(held[-1])
            if length > compression.MAX_LINE_BYTES:
                raise ShardError(f"a record is longer than {compression.MAX_LINE_BYTES >> 20} MiB; is a quote closed?")
            # What is no UTF-8 is found again in its cell.
            text = held[-1].removeprefix(b"\xef\xbb\xbf") if first else held[-1]
            first = False
            yield text.decode("utf-8", "surrogateescape")

    stem = source.name if source.compression is None else os.path.splitext(source.name)[0]
    delimiter = "\t" if stem.lower().endswith(".tsv") else ","
    reader = csv.reader(decoded(), delimiter=delimiter, strict=True)
    tabs: int | None = None  # of the header
    while True:
        held.clear()
        length = 0
        try:
            cells: list[str] | BadRow = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            if "unexpected end" in str(error):
                raise ShardError("ends inside a quoted cell: a quote is never closed") from error
            cells = BadRow(f"line cannot be read ({error})")
        if not cells:
            continue
        if tabs is None:
            tabs = sum(line.count(b"\t") for line in held)
        if delimiter == "\t" and _are_rows(held, tabs):
            cells = BadRow(
                f"line has a quote that is closed {len(held) - 1} lines below, behind whole rows of {tabs + 1} cells; "
                'write a quote that is a text\'s own as "" in a quoted cell'
            )
        yield b"".join(held), _unless_broken(cells)


def _are_rows(held: Sequence[bytes], tabs: int) -> bool:
    """Whether each line of a record of several is a row by itself, as no line of a quoted text is that has no tabs."""
    return tabs > 0 and len(held) > 1 and all(line.count(b"\t") == tabs for line in held)


def _unless_broken(cells: list[str] | BadRow) -> list[str] | BadRow:
    if isinstance(cells, BadRow) or all(cell.isascii() or not re.search("[\udc80-\udcff]", cell) for cell in cells):
        return cells
    return BadRow("line is not valid UTF-8")


def _cells(rows: Sequence[list[str] | BadRow], place: int) -> list[str]:
    """One column's; empty where the row could not be read."""
    return ["" if isinstance(row, BadRow) else row[place] for row in rows]


def _uneven(row: Sequence[str], header: Sequence[str]) -> BadRow:
    return BadRow(f"line has {len(row)} cells, expected {len(header)} as in the header")


class _Kind:
    """What a column's cells are."""

    def __init__(self, words: str, pattern: str, convert: Callable[[str], Any]) -> None:
        self.words, self._pattern, self._convert = words, re.compile(pattern), convert

    def parse(self, cell: str) -> Any:
        """What the cell holds. A ValueError if that is no such thing."""
        if not self._pattern.fullmatch(cell.strip()):
            raise ValueError
        return self._convert(cell)

    def fits(self, cell: str) -> bool:
        try:
            self.parse(cell)
        except (ValueError, RecursionError):
            return False
        return True

    def values(self, name: str, cells: Sequence[str], faults: dict[int, str]) -> list[Any]:
        """The cells' values, None for an empty one; what is no such thing is added to the faults."""
        values: list[Any] = [None] * len(cells)
        for i, cell in enumerate(cells):
            try:
                values[i] = self.parse(cell) if cell else None
            except (ValueError, RecursionError):  # noqa: PERF203 - a fault concerns its own row only
                faults.setdefault(i, f"{name} is {cell[:40]!r}, expected {self.words} as in the first rows")
        return values


def _list(cell: str) -> list[Any]:
    parsed = json.loads(cell)
    if not isinstance(parsed, list):
        raise ValueError
    return parsed


def _float(cell: str) -> float:
    value = float(cell)
    if math.isinf(value) and "inf" not in cell.lower():  # as 1e999 would be
        raise ValueError
    return value


def _int(cell: str) -> int:
    if len(cell) > _MOST_DIGITS:
        raise ValueError
    return int(cell)


_TEXT = _Kind("a text", r"(?s).*", str)
# With a leading zero it is a name: a postal code, an id.
_WHOLE = _Kind("a whole number", r"(?a)-?(0|[1-9]\d*)", _int)
_KINDS = (
    _WHOLE,
    _Kind("a number", r"(?ai)-?((0|[1-9]\d*)(\.\d*)?|\.\d+)(e[+-]?\d+)?|-?inf|nan", _float),
    _Kind("a JSON list", r"(?s)\[.*\]", _list),
)


def _kind_of(cells: Sequence[str]) -> _Kind:
    filled = [cell for cell in cells if cell]
    kind = next((kind for kind in _KINDS if filled and all(map(kind.fits, filled))), _TEXT)
    # Beyond 64 bits they are names, too: as numbers in floating point they would lose digits.
    is_large = kind is _WHOLE and not all(-(1 << 63) <= int(cell) < 1 << 63 for cell in filled)
    return _TEXT if is_large else kind


FORMAT = Format("csv", (".csv", ".tsv"), _read, _copy, _facts, compressible=True)
