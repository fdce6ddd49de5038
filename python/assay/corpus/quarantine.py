"""The list of what was not scored: shard, row, id and reason, one JSON object per line."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import IO

from assay.corpus.layout import quarantine_path
from assay.corpus.shards import Shard
from assay.corpus.storage import Store


@dataclass(frozen=True)
class Quarantined:
    """A row that was not scored, or with ``row`` None a whole shard."""

    shard: str
    row: int | None
    id: str | None
    reason: str


class QuarantineWriter:
    """Collects one shard's list in ``spool``, a temporary file, and writes it in one piece at the end.

    The list depends on nothing but the shard and the recipe, so a rerun writes the same bytes.
    """

    def __init__(self, shard: Shard, spool: IO[bytes]) -> None:
        self.count = 0
        self._shard = shard
        self._spool = spool

    def add(self, row: int | None, sample_id: str | None, reason: str) -> None:
        """List one row, or with ``row`` None the shard."""
        entry = Quarantined(self._shard.path, row, sample_id, reason)
        # json escapes whatever is not ASCII: no control character of the data reaches a terminal through cat.
        self._spool.write(json.dumps(asdict(entry)).encode() + b"\n")
        self.count += 1

    def save(self, store: Store) -> None:
        """Replace the shard's list under ``store``; an empty one leaves no file."""
        path = quarantine_path(self._shard)
        if not self.count:
            store.remove(path)
            return
        self._spool.seek(0)
        with store.write(path) as file:
            shutil.copyfileobj(self._spool, file)


def read_quarantine(store: Store, shard: Shard) -> Iterator[Quarantined]:
    """A shard's list, in the order of its rows."""
    path = quarantine_path(shard)
    if not store.exists(path):
        return
    with store.open(path) as file:
        for line in file:
            yield Quarantined(**json.loads(line))
