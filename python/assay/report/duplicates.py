"""Rows that are in the corpus more than once: the same text but for case and spaces, or the same bytes."""

from __future__ import annotations

import contextlib
import hashlib
import unicodedata
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from assay.corpus.errors import BadRow, ShardError
from assay.corpus.images import MAX_BYTES, Beside
from assay.corpus.readers import columns_of, read
from assay.corpus.scores_folder import Scores, State
from assay.report.drawing import MOST_ROWS, Part, parts_to_read, rows_of_table
from assay.report.groups import Codes

MOST_BYTES = 1 << 30
LARGEST = 8
_DIGEST = 16
_DEEPEST = 64

Digests = npt.NDArray[np.uint64]


@dataclass(frozen=True)
class Repeated:
    """Rows with the same content: how many, and the places of the first two, counted over all scored rows."""

    rows: int
    places: tuple[int, int]


@dataclass(frozen=True)
class Duplicates:
    """What is there more than once.

    Attributes:
        columns: whose values make the content.
        rows: of all scored ones those that were looked at; ``all_rows`` says whether these are all.
        groups: contents that several rows have; ``repeated``: the rows that have them.
        apart: of the groups those whose rows differ in their label; None where no label was looked at.
        largest: the largest groups.
    """

    columns: Sequence[str]
    rows: int
    all_rows: bool
    groups: int
    repeated: int
    apart: int | None
    largest: Sequence[Repeated]


def find_duplicates(
    scores: Scores,
    columns: Sequence[str],
    labels: Codes | None = None,
    seed: int = 0,
    images: Collection[str] = (),
) -> Duplicates | None:
    """Compare the content of a million rows, or of as many as hold a GiB, by its SHA-256, cut to 128 bits.

    Args:
        columns: whose values together are a row's content. Rows where all of them are null or empty have none.
        labels: (N,), of each scored row the code of its label, below 0 where there is none.
        images: those of the columns of which a path means the file that it names, beside the row's table.

    Returns None if the corpus has none of the columns now, or nothing in them.
    """
    found: list[tuple[npt.NDArray[np.int64], Digests]] = []
    left, looked = MOST_BYTES, 0
    for part in parts_to_read(scores, MOST_ROWS, seed):
        if left <= 0:
            break
        with contextlib.suppress(ShardError, OSError):
            places, digests, rows, size = _read_part(scores, part, columns, left, images)
            left, looked = left - size, looked + rows
            found.append((places, digests))
    if not any(len(places) for places, _ in found):
        return None
    places, digests = (np.concatenate(its) for its in zip(*found, strict=True))
    total = sum(status.table.scored for status in scores.of(State.DONE) if status.table)
    return _compare(columns, places, digests, (looked, looked == total), labels)


def _compare(
    columns: Sequence[str],
    places: npt.NDArray[np.int64],
    digests: Digests,
    looked: tuple[int, bool],
    labels: Codes | None,
) -> Duplicates:
    order = np.lexsort((places, digests[:, 1], digests[:, 0]))
    places, digests = places[order], digests[order]
    starts = np.flatnonzero(np.concatenate([[True], (digests[1:] != digests[:-1]).any(axis=1)]))
    counts = np.diff(np.concatenate([starts, [len(places)]]))
    starts, counts = starts[counts > 1], counts[counts > 1]
    apart = None
    if labels is not None:
        own = labels[places].astype(np.int64)
        known = own >= 0
        least = np.where(known, own, np.iinfo(np.int64).max)
        most = np.where(known, own, -1)
        ends = [(start, start + count) for start, count in zip(starts.tolist(), counts.tolist(), strict=True)]
        apart = sum(bool(most[a:b].max() > least[a:b].min()) for a, b in ends)
    # Of equally large groups the one whose first row comes first.
    largest = np.lexsort((places[starts], -counts))[:LARGEST]
    shown = [Repeated(int(counts[i]), (int(places[starts[i]]), int(places[starts[i] + 1]))) for i in largest.tolist()]
    return Duplicates(columns, *looked, len(counts), int(counts.sum()), apart, shown)


def _read_part(
    scores: Scores, part: Part, columns: Sequence[str], most: int, images: Collection[str]
) -> tuple[npt.NDArray[np.int64], Digests, int, int]:
    """Of the rows with content their places and digests; how many rows were looked at, and how many bytes."""
    rows, facts = rows_of_table(scores, part), columns_of(part.shard)
    here = [name for name in columns if name in facts]
    places, digests, size, last = [], [], 0, 0
    for chunk in read(part.shard, here, frozenset(here)) if here else ():
        first, last = np.searchsorted(rows, [chunk.first, chunk.first + chunk.length]).tolist()
        for i, row in enumerate(rows[first:last].tolist(), start=first):
            offset = row - chunk.first
            values = {name: chunk.columns[name][offset] for name in here}
            values |= {name: _image(part, name, values[name]) for name in images if name in values}
            content = [_content(values.get(name)) for name in columns]
            if any(content) and offset not in chunk.faults:
                places.append(part.start + i)
                digests.append(hashlib.sha256(_joined(content)).digest()[:_DIGEST])
                size += sum(map(len, content))
            if size > most:
                last = i + 1
                break
        if last == len(rows) or size > most:
            break
    held = np.frombuffer(b"".join(digests), np.uint64).reshape(-1, 2)
    return np.array(places, np.int64), held, last if here else len(rows), size


def _image(part: Part, name: str, value: Any) -> Any:
    """The file that a path names; any other value as it is."""
    path = value.get("path") if isinstance(value, dict) and not value.get("bytes") else value
    if not isinstance(path, str):
        return value
    try:
        return Beside(part.shard.store, part.shard.folder).read(name, path, MAX_BYTES)
    except BadRow:
        return None


def _content(value: Any, depth: int = 0) -> bytes:
    """What two rows have in common if they are the same, as bytes; none of null and of what is empty."""
    if value is None or depth > _DEEPEST:
        return b""
    if isinstance(value, str):
        return normalised(value).encode("utf-8", "surrogatepass")
    if isinstance(value, bytes | bytearray | memoryview):
        return bytes(value)
    if isinstance(value, np.ndarray) and value.dtype != object:
        return _joined([value.dtype.str.encode(), value.tobytes()]) if value.size else b""
    if isinstance(value, dict):
        if set(value) == {"bytes", "path"}:  # an image; elsewhere it may have another name
            return _content(value["bytes"] or value["path"], depth + 1)
        names = sorted(value, key=str)
        found = [_content(value[name], depth + 1) for name in names]
        keys = [str(name).encode("utf-8", "surrogatepass") for name in names]
        return _joined([*keys, *found]) if any(found) else b""
    if isinstance(value, list | tuple | np.ndarray):
        parts = [_content(its, depth + 1) for its in value]
        return _joined(parts) if any(parts) else b""
    return repr(value).encode()


def _joined(parts: Sequence[bytes]) -> bytes:
    """One after another, each behind its length, so that no two lists make the same bytes."""
    return b"".join(len(part).to_bytes(8, "little") + part for part in parts)


def normalised(text: str) -> str:
    """In one case, with one space where there are several or line breaks, in Unicode's compatible form (NFKC)."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())
