"""JSON lines: an object per line, plain or compressed; the chosen lines are copied byte for byte."""

from __future__ import annotations

import contextlib
import itertools
import json
from collections.abc import Iterator, Sequence
from typing import Any, BinaryIO

from assay.corpus import compression
from assay.corpus import format as limits
from assay.corpus.compression import compressed, lines
from assay.corpus.dotted import value_at
from assay.corpus.errors import BadRow, ShardError
from assay.corpus.facts import facts_of_values
from assay.corpus.format import Chunk, ColumnFacts, Format, Mask, Source, check_length, parts

_BYTE_ORDER_MARK = "\ufeff".encode()


def _read(source: Source, columns: Sequence[str]) -> Iterator[Chunk]:
    for first, rows in _parts(source):
        yield _chunk(first, rows, columns, source.optional, source.share_read)


def _facts(source: Source) -> dict[str, ColumnFacts]:
    _, rows = next(_parts(source), (0, []))
    columns: dict[str, list[Any]] = {}
    for i, line in enumerate(rows):
        with contextlib.suppress(BadRow):
            for name, value in _record(line, is_first=i == 0).items():
                columns.setdefault(name, []).append(value)
    return facts_of_values(columns)


def _parts(source: Source) -> Iterator[tuple[int, list[bytes]]]:
    return parts(_checked(lines(source.file, source.compression)), len)


def _copy(source: Source, keep: Mask, file: BinaryIO) -> None:
    seen = 0
    with compressed(file, source.compression) as out:
        for seen, line in enumerate(lines(source.file, source.compression), start=1):
            if seen <= len(keep) and keep[seen - 1]:
                out.write(line + b"\n")
    check_length(seen, keep)


def _checked(rows: Iterator[bytes]) -> Iterator[bytes]:
    """The lines, unless they are those of one JSON document: that is an error of the shard, not of each line."""
    head: list[bytes] = []
    filled: list[bytes] = []
    for line in itertools.islice(rows, limits.CHUNK_ROWS):
        head.append(line)
        text = line.removeprefix(_BYTE_ORDER_MARK).strip()
        filled += [text] if text else []
        if len(filled) == 2:
            break
    if _is_document(filled):
        raise ShardError("holds a JSON document, not JSON lines; write each of its records on a line of its own")
    yield from itertools.chain(head, rows)


def _is_document(head: Sequence[bytes]) -> bool:
    """Whether the first lines with something on them (two, if there are) belong to a list or object over many lines."""
    first = head[0] if head else b""
    if not first.startswith((b"[", b"{")):
        return False
    is_list = first.startswith(b"[")
    if is_list and (first == b"[" or len(first) > compression.MAX_LINE_BYTES):
        return True
    try:
        json.loads(first)
    except RecursionError:
        return False
    except ValueError:  # it goes on with a key or the next record, or it is a damaged row
        return len(head) > 1 and (not _is_row(head[1]) if is_list else head[1].startswith((b'"', b"}")))
    return is_list and len(head) == 1


def _is_row(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def _chunk(
    first: int, rows: Sequence[bytes], columns: Sequence[str], optional: frozenset[str], progress: float
) -> Chunk:
    values: dict[str, list[Any]] = {name: [None] * len(rows) for name in columns}
    faults: dict[int, str] = {}
    for offset, line in enumerate(rows):
        try:
            record = _record(line, is_first=first + offset == 0)
            for name, own in values.items():
                own[offset] = record[name] if name in record else value_at(record, name, optional=optional)
        except BadRow as fault:  # noqa: PERF203 - a fault concerns its own line only
            faults[offset] = str(fault)
            for own in values.values():
                own[offset] = None
    return Chunk(first, values, faults, len(rows), min(progress, 1.0))


def _record(line: bytes, is_first: bool) -> dict[str, Any]:
    if len(line) > compression.MAX_LINE_BYTES:
        raise BadRow(f"line is longer than {compression.MAX_LINE_BYTES >> 20} MiB")
    if not line.strip():
        raise BadRow("line is blank")
    try:
        record = json.loads(line.decode("utf-8-sig" if is_first else "utf-8"))
    except UnicodeDecodeError as error:
        raise BadRow("line is not valid UTF-8") from error
    except (ValueError, RecursionError) as error:
        raise BadRow(f"line is not valid JSON ({type(error).__name__})") from error
    if not isinstance(record, dict):
        raise BadRow(f"line is a JSON {type(record).__name__}, expected an object")
    return record


FORMAT = Format("jsonl", (".jsonl", ".ndjson", ".json"), _read, _copy, _facts, compressible=True, has_keys=True)
