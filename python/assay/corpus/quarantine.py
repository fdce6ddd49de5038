"""The list of what was not scored: shard, row, id and reason, one JSON object per line.

Rows after one another with the same reason share a line that also has ``last``, the last of them; their ids are null,
or `<shard>:<row>` each.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import IO, Any, BinaryIO, cast

from assay._json import dumps
from assay.corpus.errors import CorpusError
from assay.corpus.layout import quarantine_path
from assay.corpus.shards import Shard
from assay.corpus.storage import Store, sha256

# A list longer than this names rows that follow one another together, whatever their reasons and ids: how long it gets
# must not follow what a small file unfolds to.
MOST_ENTRIES = 20_000
_SEVERAL = f"one of several reasons, which are listed row by row for the first {MOST_ENTRIES:,} entries only"


@dataclass(frozen=True)
class Quarantined:
    """A row that was not scored, or with ``row`` None a whole shard."""

    shard: str
    row: int | None
    id: str | None
    reason: str


def row_id(shard: str, row: int) -> str:
    """The id of a row of a shard without an id column."""
    return f"{shard}:{row}"


class QuarantineWriter:
    """Collects one shard's list in ``spool``, a temporary file, and writes it in one piece at the end.

    The list depends on nothing but the shard and the recipe, so a rerun writes the same bytes.
    """

    def __init__(self, shard: Shard, spool: IO[bytes]) -> None:
        self.count = 0
        self._entries = 0
        self._shard = shard
        self._spool = spool
        # The rows at hand, from the first to the last, and what the next must be like to join them; None: nothing can.
        self._first: Quarantined | None = None
        self._last: int | None = None
        self._like: tuple[str, bool] | None = None

    def add(self, row: int | None, sample_id: str | None, reason: str) -> None:
        """List one row, after those before it, or with ``row`` None the shard."""
        self.count += 1
        if self._entries >= MOST_ENTRIES:
            sample_id, reason = None, _SEVERAL
        like = None
        if row is not None and (sample_id is None or sample_id == row_id(self._shard.path, row)):
            like = (reason, sample_id is None)
            if like == self._like and row - 1 == self._last:
                self._last = row
                return
        self._end_run()
        self._first, self._last, self._like = Quarantined(self._shard.path, row, sample_id, reason), row, like

    def _end_run(self) -> None:
        if self._first:
            entry = asdict(self._first) | ({} if self._last == self._first.row else {"last": self._last})
            # json escapes whatever is not ASCII: no control character of the data reaches a terminal through cat.
            self._spool.write(dumps(entry).encode() + b"\n")
            self._entries += 1
            self._first = None

    def save(self, store: Store) -> str | None:
        """Replace the shard's list under ``store``; an empty one leaves no file. Returns what `list_digest` will."""
        path = quarantine_path(self._shard)
        next(read_quarantine(store, self._shard), None)  # a CorpusError if it is somebody else's file
        if not self.count:
            store.remove(path)
            return None
        self._end_run()
        self._spool.seek(0)
        digest = _digest(cast(BinaryIO, self._spool))
        self._spool.seek(0)
        with store.write(path) as file:
            shutil.copyfileobj(self._spool, file)
        return digest


def list_digest(store: Store, shard: Shard) -> str | None:
    """The SHA-256 of a shard's list, by which what was written beside it knows it again; None if there is none."""
    try:
        with store.open(quarantine_path(shard)) as file:
            return _digest(file)
    except (FileNotFoundError, NotADirectoryError):
        return None


def _digest(file: BinaryIO) -> str:
    return f"sha256:{sha256(file)}"


def read_quarantine(store: Store, shard: Shard) -> Iterator[Quarantined]:
    """A shard's list, row by row in their order, each row of a run on its own.

    A CorpusError for a file that is no such list.
    """
    path = quarantine_path(shard)
    try:
        with store.open(path) as file:
            for line in file:
                yield from _rows(line)
    except (FileNotFoundError, NotADirectoryError):
        return
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise CorpusError(f"{store.full(path)}: not a list of quarantined rows; score {shard.path} again") from error


def _rows(line: bytes) -> Iterator[Quarantined]:
    entry = json.loads(line)
    first = Quarantined(*(entry[name] for name in ("shard", "row", "id", "reason")))
    last: Any = entry.get("last", first.row)
    texts = isinstance(first.shard, str) and isinstance(first.reason, str) and isinstance(first.id, str | None)
    if not texts or type(first.row) is not type(last) or type(last) not in (int, type(None)):
        raise ValueError("an entry without shard, row or reason")
    yield first
    if last is not None:
        for row in range(int(first.row or 0) + 1, last + 1):
            yield replace(first, row=row, id=first.id and row_id(first.shard, row))
