"""Which group each scored row is of: the value that a column of the corpus has there, or its shard."""

from __future__ import annotations

import datetime
import decimal
import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from assay.corpus.errors import CorpusError, ShardError
from assay.corpus.format import ColumnFacts
from assay.corpus.readers import columns_of, read
from assay.corpus.scores_folder import Scored
from assay.corpus.shards import Shard
from assay.corpus.storage import Store
from assay.curate.dataset import SHARD
from assay.curate.whole import quarantined_rows
from assay.select.best import spans
from assay.select.groups import Groups
from assay.select.selection import Floats, Mask

MOST_GROUPS = 5_000_000
MOST_TEXT_BYTES = 256 << 20
_PLAIN = (str, int, float, decimal.Decimal, datetime.date, datetime.time)


@dataclass
class _Names:
    """The groups so far, by their names, which are texts; None is the group of the rows without a value."""

    column: str
    names: dict[str | None, int]
    size: int = 0

    def code(self, name: str | None) -> int:
        found = self.names.get(name)
        if found is None:
            found = self.names[name] = len(self.names)
            self.size += len(name or "")
            if len(self.names) > MOST_GROUPS or self.size > MOST_TEXT_BYTES:
                raise CorpusError(
                    f"--group {self.column}: has more than {len(self.names) - 1:,} values, of {self.size >> 20:,} MiB; "
                    f"expected at most {MOST_GROUPS:,} groups and {MOST_TEXT_BYTES >> 20} MiB"
                )
        return found


def read_groups(store: Store, tables: Sequence[tuple[Shard, Scored]], column: str) -> Groups:
    """The groups of all scored rows, shards after one another, in the order in which they are come upon.

    A group's name is its value as a text. Of a Hugging Face ClassLabel it is the class. Null, NaN and, where rows have
    keys of their own, no such key are one group without a name.

    Raises:
        CorpusError: a shard has no such column, or cannot be read; or its values are no texts, numbers, dates or
            Booleans, or very many.
    """
    codes, place = np.empty(sum(table.scored for _, table in tables), np.int32), 0
    names = _Names(column, {})
    for shard, table in tables:
        here = codes[place : (place := place + table.scored)]
        if column == SHARD:
            here[:] = names.code(shard.path)
        else:
            _read_shard(store, shard, table, names, here)
    if column != SHARD and set(names.names) == {None}:
        raise CorpusError(f"--group {column}: no row has a value in it; expected a column of the corpus, or {SHARD}")
    return Groups(codes, pa.array(list(names.names), pa.string()))


def _read_shard(store: Store, shard: Shard, table: Scored, names: _Names, codes: npt.NDArray[np.int32]) -> None:
    column = names.column
    missing = quarantined_rows(store, shard, table)
    try:
        facts = columns_of(shard)
        classes = _classes(shard, facts, column)
        known: dict[tuple[type, Any], int] = {}
        place = row = 0
        for chunk in read(shard, [column], frozenset([column])):
            values = chunk.columns[column]
            bad = missing[slice(*np.searchsorted(missing, [row, row + chunk.length]))] - row
            scored = np.ones(chunk.length, bool)
            scored[bad] = False
            for offset, fault in chunk.faults.items():
                if scored[offset]:
                    raise ShardError(f"row {row + offset}: {fault}")
            own = _looked_up(known, values)
            for offset, code in enumerate(own):
                if code < 0 and scored[offset]:
                    value = values[offset]
                    own[offset] = names.code(_name(value, classes))
                    if value == value:  # no NaN is another
                        known[value.__class__, value] = own[offset]
            found = np.array(own, np.int32)[scored]
            if place + len(found) > len(codes):
                raise ShardError("has changed meanwhile")
            codes[place : place + len(found)] = found
            place, row = place + len(found), row + chunk.length
    except (ShardError, OSError) as error:
        raise CorpusError(f"--group {column}: {shard.path}: {error}") from error
    if place != len(codes):
        raise CorpusError(f"--group {column}: {shard.path}: has changed meanwhile")


def _classes(shard: Shard, facts: Mapping[str, ColumnFacts], column: str) -> tuple[str, ...] | None:
    """The names of a column of integers that are the places of classes. ShardError if a shard has no such column."""
    if column not in facts:
        if shard.format.has_keys:  # the first rows need not have all
            return None
        near = difflib.get_close_matches(column, facts, n=1, cutoff=0.5)
        known = f"; did you mean {near[0]}?" if near else f", only {', '.join(list(facts)[:20])}"
        raise ShardError(f"has no column {column}{known}")
    found = facts[column]
    return found.classes if "int" in found.type else None


def _looked_up(known: Mapping[tuple[type, Any], int], values: Sequence[Any]) -> list[int]:
    """The codes of the values; -1 of those that are not known."""
    try:
        return [known.get((value.__class__, value), -1) for value in values]  # True is 1, and another group
    except TypeError:  # lists and the like, which will be refused by their type
        return [-1] * len(values)


def _name(value: Any, classes: tuple[str, ...] | None) -> str | None:
    if value is None or (isinstance(value, float | decimal.Decimal) and value != value):
        return None
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int) and classes is not None:
        return classes[value] if 0 <= value < len(classes) else None
    if isinstance(value, float) and value.is_integer():
        return str(int(value))  # a file of JSON may have 1 and 1.0
    if not isinstance(value, _PLAIN):
        raise ShardError(f"holds {type(value).__name__}; expected texts, numbers, dates or Booleans")
    return str(value).encode("utf-8", "backslashreplace").decode()


def group_table(groups: Groups, kept: Mask, limits: Floats | None, copies: npt.NDArray[np.uint8] | None) -> pa.Table:
    """What a selection made of each group: `group`, its scored `rows`, how many are `kept`, where its score is cut
    (`threshold`), and how many are `written` with their copies."""
    columns = {"group": groups.names, "rows": groups.counts(), "kept": groups.counts(kept)}
    if limits is not None:
        columns["threshold"] = pa.array(limits, mask=np.isnan(limits))
    if copies is not None:
        written = np.zeros(len(groups), np.int64)
        for span in spans(len(copies)):
            written += np.bincount(groups.codes[span], copies[span], len(groups)).astype(np.int64)
        columns["written"] = written
    return pa.table(columns)


def dictionary(groups: Groups) -> pa.DictionaryArray:
    """The groups as a column, whose rows without a name are a group like the others."""
    return pa.DictionaryArray.from_arrays(pa.array(groups.codes), groups.names)
