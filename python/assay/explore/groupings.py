"""What the kept rows consist of: by shard, and by columns of the corpus; few enough entries to be read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from assay.report import NOT_READ, NOTHING, Groups

MOST = 24
CHUNK = 1 << 20


@dataclass(frozen=True)
class Grouping:
    """Every row is in one entry.

    Attributes:
        names: of the entries: values, the commonest first, then ``rest`` entries that are none.
        rows: of each entry.
        codes: (N,), the entry of each row.
    """

    column: str
    names: Sequence[str]
    rest: int
    rows: Sequence[int]
    codes: npt.NDArray[np.uint8]


def by_shard(paths: Sequence[str], sizes: Sequence[int]) -> Grouping:
    """Shards after one another have so many rows each."""
    order = np.argsort(-np.asarray(sizes), kind="stable")
    places = np.empty(len(paths), np.int64)
    places[order] = np.arange(len(paths))
    kept = np.minimum(places, MOST).astype(np.uint8)
    return _grouping("shard", [paths[i] for i in order.tolist()], np.repeat(kept, sizes), "shards")


def by_column(groups: Groups) -> Grouping:
    """A column's."""
    codes = np.minimum(groups.codes, MOST)
    codes[groups.codes == NOTHING] = MOST + 1
    codes[groups.codes == NOT_READ] = MOST + 2
    return _grouping(groups.column, groups.names, codes.astype(np.uint8), "values")


def _grouping(column: str, names: Sequence[str], codes: npt.NDArray[np.uint8], what: str) -> Grouping:
    """Without the entries behind the values that no row is in."""
    counts = counted(codes, None, MOST + 3)
    shown = list(names[:MOST])
    behind = {MOST: f"{len(names) - MOST:,} other {what}", MOST + 1: "no value", MOST + 2: "not looked at"}
    places: npt.NDArray[np.uint8] = np.zeros(MOST + 3, np.uint8)
    rest: list[int] = []
    places[: len(shown)] = np.arange(len(shown))
    for code in behind:
        if counts[code]:
            places[code] = len(shown) + len(rest)
            rest.append(code)
    rows = counts[[*range(len(shown)), *rest]].tolist()
    return Grouping(column, [*shown, *(behind[code] for code in rest)], len(rest), rows, places[codes])


def counted(codes: npt.NDArray[np.uint8], mask: npt.NDArray[np.bool_] | None, count: int) -> npt.NDArray[np.int64]:
    """How many of the rows in ``mask``, of all without one, have each of the codes below ``count``."""
    found = np.zeros(count, np.int64)
    for start in range(0, len(codes), CHUNK):  # bincount makes eight bytes of each code
        part = codes[start : start + CHUNK]
        found += np.bincount(part if mask is None else part[mask[start : start + CHUNK]], minlength=count)
    return found
