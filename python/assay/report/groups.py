"""Columns of the corpus that say what kind of row each is: its label, source, language."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from assay.corpus.errors import CorpusError, ShardError
from assay.corpus.readers import columns_of, read
from assay.corpus.scores_folder import Scores, State
from assay.report.drawing import MOST_ROWS, Part, parts_to_read, rows_of_table

MOST_COLUMNS = 4
MOST_VALUES = 1_000
_LONGEST = 200
# What people call such columns, in the order in which they are taken.
_NAMES = (
    *("label", "class", "category", "source", "data_source", "dataset", "subset", "origin", "domain"),
    *("language", "lang", "language_code", "topic", "split"),
)
_TYPES = ("string", "bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64")
NOTHING, NOT_READ = -1, -2

Codes = npt.NDArray[np.int16]


@dataclass(frozen=True)
class Groups:
    """What a column says of every scored row.

    Attributes:
        names: its values as text, the commonest first.
        codes: (N,), shards after one another: of each row the place of its value in ``names``, `NOTHING` where it has
            none, `NOT_READ` of rows that were not looked at.
    """

    column: str
    names: Sequence[str]
    codes: Codes

    @property
    def read(self) -> int:
        """Rows that were looked at."""
        return int(np.count_nonzero(self.codes != NOT_READ))


def find_columns(scores: Scores, asked: Sequence[str] = (), label: str | None = None) -> list[str]:
    """The columns to group by: those ``asked`` for, or else ``label`` and those of usual names, four at most.

    CorpusError if one that is asked for is not in the first readable shard, or holds neither texts nor whole numbers.
    """
    facts: dict[str, str] = {}
    for status in scores.of(State.DONE):
        try:
            facts = {name: "string" if its.classes else its.type for name, its in columns_of(status.shard).items()}
            break
        except (ShardError, OSError):
            continue
    for name in asked:
        if name not in facts:
            raise CorpusError(f"--group {name}: is no column of the corpus; it has {', '.join(list(facts)[:20])}")
        if facts[name] not in _TYPES:
            raise CorpusError(f"--group {name}: holds {facts[name]}; expected texts, whole numbers or true and false")
    if asked:
        return list(dict.fromkeys(asked))
    usual = [its for name in _NAMES for its in facts if its.rpartition(".")[2].casefold() == name]
    named = [name for name in ([] if label is None else [label]) + usual if facts.get(name) in _TYPES]
    return list(dict.fromkeys(named))[:MOST_COLUMNS]


def read_groups(scores: Scores, columns: Sequence[str], seed: int = 0) -> tuple[list[Groups], dict[str, str]]:
    """What ``columns`` say of the scored rows; of more than a million, of those of shards that ``seed`` draws.

    Returns also, of columns that are no grouping, why: too many values, or too long ones.
    """
    total = sum(status.table.scored for status in scores.of(State.DONE) if status.table)
    readers = {column: _Reader(column, np.full(total, NOT_READ, np.int16)) for column in columns}
    for part in parts_to_read(scores, MOST_ROWS, seed) if columns else ():
        with contextlib.suppress(ShardError, OSError):  # its rows, or the rest of them, stay as not looked at
            _read_part(scores, part, readers)
    found = [reader.groups() for reader in readers.values() if not reader.fault]
    return found, {name: reader.fault for name, reader in readers.items() if reader.fault}


def _read_part(scores: Scores, part: Part, readers: Mapping[str, _Reader]) -> None:
    rows, start = rows_of_table(scores, part), part.start
    facts = columns_of(part.shard)
    here = [name for name, reader in readers.items() if not reader.fault and name in facts]
    for name, reader in readers.items():
        if name not in facts:
            reader.codes[start : start + part.count] = NOTHING
    if not here:
        return
    for chunk in read(part.shard, here, frozenset(here)):
        first, last = np.searchsorted(rows, [chunk.first, chunk.first + chunk.length]).tolist()
        places = (rows[first:last] - chunk.first).tolist()
        for name in here:
            values, classes = chunk.columns[name], facts[name].classes
            read_now = [None if place in chunk.faults else values[place] for place in places]
            readers[name].see(start + first, read_now, classes)
        if last == len(rows):
            return


class _Reader:
    """Gathers the values of one column."""

    def __init__(self, column: str, codes: Codes) -> None:
        self.column, self.codes, self.fault = column, codes, ""
        self._places: dict[str, int] = {}

    def see(self, start: int, values: Sequence[Any], classes: Sequence[str] | None) -> None:
        if self.fault:
            return
        for i, name in enumerate(_named(values, classes)):
            if name is None:
                self.codes[start + i] = NOTHING
                continue
            place = self._places.setdefault(name, len(self._places))
            if place >= MOST_VALUES:
                self.fault = f"has more than {MOST_VALUES:,} different values"
            if len(name) > _LONGEST:
                self.fault = f"has values of more than {_LONGEST} characters"
            if self.fault:
                return
            self.codes[start + i] = place

    def groups(self) -> Groups:
        """With the commonest value first; of equally common ones the one that came first."""
        counts = np.bincount(self.codes[self.codes >= 0], minlength=len(self._places))
        order = np.argsort(-counts, kind="stable")
        places = np.empty(len(order) + 2, np.int16)
        places[order] = np.arange(len(order))
        places[[NOTHING, NOT_READ]] = NOTHING, NOT_READ  # which index it from its end
        names = list(self._places)
        return Groups(self.column, [names[i] for i in order.tolist()], places[self.codes])


def _named(values: Sequence[Any], classes: Sequence[str] | None) -> Iterator[str | None]:
    """Each value as text; None where there is none, or it is neither a text nor a whole number."""
    for value in values:
        if isinstance(value, float) and value.is_integer():
            value = int(value)  # nulls make floats of a column
        if isinstance(value, bool):
            yield "true" if value else "false"
        elif isinstance(value, int):
            yield classes[value] if classes and 0 <= value < len(classes) else str(value)
        else:
            yield value if isinstance(value, str) and value else None
