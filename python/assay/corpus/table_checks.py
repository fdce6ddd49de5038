"""A shard's score table against the shard itself: every row in its place, under its id, with numbers that may be there.

Tables, lists and shards are streamed: what is held is a batch of rows, whatever their number.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from assay.corpus.checks import check_id, shown
from assay.corpus.errors import BadRow, CorpusError, ShardError
from assay.corpus.footer import Manifest, Table, TableColumn, canonical_hash, find_table
from assay.corpus.format import CHUNK_ROWS
from assay.corpus.layout import quarantine_path, table_path
from assay.corpus.named_files import changed_file
from assay.corpus.quarantine import Quarantined, list_digest, read_quarantine, row_id
from assay.corpus.readers import columns_of, read
from assay.corpus.shards import Shard
from assay.corpus.storage import Store
from assay.corpus.tables import score_schema

_BATCH_ROWS = 1 << 13
Ids = Sequence[str | None]


@dataclass(frozen=True)
class Checked:
    """What was found of a shard: the rows of its table, how many were quarantined, and what is wrong, a line each."""

    problems: Sequence[str]
    scored: int = 0
    quarantined: int = 0
    unreadable: bool = False
    """The shard could not be read when it was scored: a list says so in place of a table."""


class _Faults:
    """What is wrong with a table, by kind: how often, and where first."""

    def __init__(self) -> None:
        self._found: dict[str, tuple[str, int]] = {}

    def add(self, kind: str, first: str, count: int = 1) -> None:
        known, before = self._found.get(kind, (first, 0))
        self._found[kind] = known, before + count

    def lines(self) -> list[str]:
        """A line for each kind."""
        return [
            f"{kind}: {first}" + (f", and {count - 1:,} more" if count > 1 else "")
            for kind, (first, count) in self._found.items()
        ]

    def has(self, *kinds: str) -> bool:
        return any(kind in self._found for kind in kinds)


def check_shard(store: Store, shard: Shard, manifest: Manifest) -> Checked:
    """Look at a shard, its score table under ``store`` and its list of quarantined rows."""
    problems: list[str] = []
    table = None
    try:
        table = find_table(store, shard)
        if table is None:
            return _without_table(store, shard)
        problems += _footer_problems(table, shard, manifest)
        changes = list(_input_problems(store, shard, table))
        problems += changes
        problems += _row_problems(store, shard, table, manifest.columns, is_same=not changes)
    except CorpusError as error:
        problems.append(str(error).removeprefix(f"{store.full(table_path(shard))}: "))
    except (pa.ArrowException, OSError, ValueError) as error:
        problems.append(f"cannot be read to its end ({_one_line(error)}); move it away to have it made again")
    if table is None:
        return Checked(problems)
    return Checked(problems, table.file.rows, table.footer.rows.quarantined)


def _without_table(store: Store, shard: Shard) -> Checked:
    entry = next(read_quarantine(store, shard), None)
    if entry is not None and entry.row is None:
        return Checked([], unreadable=True)
    return Checked([f"{shard.path} has no score table; finish the run with `assay score`"])


def _footer_problems(table: Table, shard: Shard, manifest: Manifest) -> Iterator[str]:
    footer = table.footer
    if footer.input.path != shard.path:
        yield f"is the table of {shown(footer.input.path)}, not of {shard.path}"
    if differences := table.differences(manifest):
        more = f" and {len(differences) - 1} more" if differences[1:] else ""
        yield f"is another recipe's, model's or target's than the folder's: {differences[0]}{more}"
    if canonical_hash(footer.recipe) != footer.recipe_hash:
        yield "its footer's recipe_hash is not that of its recipe"


def _input_problems(store: Store, shard: Shard, table: Table) -> Iterator[str]:
    """Whether the shard, and the files that its rows name, are still those that were scored."""
    try:
        if not table.input_is(shard.fingerprint()):
            yield f"{shard.path} has changed since it was scored"
        elif changed := changed_file(store, shard, table.footer.input.files):
            yield f"{shard.path}: {changed}"
    except OSError as error:
        yield f"{shard.path} cannot be looked at: {error.strerror or _one_line(error)}"


def _row_problems(
    store: Store, shard: Shard, table: Table, columns: Sequence[TableColumn], is_same: bool
) -> Iterator[str]:
    """The rows; with ``is_same`` those of the shard, too."""
    counts, rows = table.footer.rows, table.footer.input.rows
    if table.file.rows != counts.scored or rows != counts.scored + counts.quarantined:
        yield (
            f"holds {table.file.rows:,} rows, but its footer counts {counts.scored:,} scored and "
            f"{counts.quarantined:,} quarantined of {rows:,}"
        )
    if list_digest(store, shard) != table.footer.quarantine:
        yield f"{quarantine_path(shard)} is not the list of quarantined rows that was written with it"
    faults = _Faults()
    with store.open(table.file.path) as file:
        parquet = pq.ParquetFile(file)
        sound = _check_schema(parquet.schema_arrow, columns, faults)
        if not faults.has(_COLUMN):
            _check_values(parquet, sound, table, faults)
    if not faults.has(_COLUMN, _ORDER, _NULL):
        id_column = table.footer.recipe.get("id_column")
        try:
            chunks = _shard_ids(shard, id_column) if is_same else _unknown_ids(rows)
            with store.open(table.file.path) as file:
                scored = _scored(pq.ParquetFile(file))
                _compare(chunks, scored, read_quarantine(store, shard), shard, rows, faults)
        except ShardError as error:
            faults.add("the shard cannot be read", str(error))
    yield from faults.lines()


_COLUMN, _ORDER, _NULL = "its columns are not the manifest's", "rows are out of order", "holds a null"


def _check_schema(schema: pa.Schema, columns: Sequence[TableColumn], faults: _Faults) -> list[TableColumn]:
    """Compare a table's columns with those that it must have -> those that are as they must be."""
    wanted = score_schema(columns, {})
    if schema.names != wanted.names:
        faults.add(_COLUMN, f"found {', '.join(map(shown, schema.names))}, expected {', '.join(wanted.names)}")
        return []
    for found, field in zip(schema, wanted, strict=True):
        if found.type != field.type:
            faults.add(_COLUMN, f"{field.name} holds {found.type}, expected {field.type}")
        elif any((found.metadata or {}).get(key) != value for key, value in (field.metadata or {}).items()):
            faults.add("says other things of its columns than the manifest", field.name)
    return list(columns)


def _check_values(parquet: pq.ParquetFile, columns: Sequence[TableColumn], table: Table, faults: _Faults) -> None:
    """A table by itself: rows that ascend, no null, no infinity, and as many NaN as its footer counts."""
    nan = dict.fromkeys((column.name for column in columns), 0)
    last, total = -1, table.footer.input.rows
    size = _BATCH_ROWS if all(column.width == 1 for column in columns) else CHUNK_ROWS
    for batch in parquet.iter_batches(batch_size=size, columns=["row", "id", *nan], use_threads=False):
        for name, column in zip(batch.schema.names, batch.columns, strict=True):
            if column.null_count:
                faults.add(_NULL, f"in {name}", column.null_count)
        rows = batch.column("row").to_numpy(zero_copy_only=False).astype(np.int64)
        _check_order(last, rows, total, faults)
        last = int(rows[-1]) if len(rows) else last
        for name in nan:
            nan[name] += _check_numbers(name, batch.column(name), rows, faults)
    for name, count in nan.items():
        if count != table.footer.nan.get(name, 0):
            faults.add(f"holds another number of NaN than its footer counts in {name}", _of(count, table, name))
    if strange := sorted(table.footer.nan.keys() - nan):
        faults.add("its footer counts NaN of scores that it has not", shown(strange[0]), len(strange))


def _of(count: int, table: Table, name: str) -> str:
    return f"{count:,}, expected {table.footer.nan.get(name, 0):,}"


def _check_order(last: int, rows: npt.NDArray[np.int64], total: int, faults: _Faults) -> None:
    """``last`` is the row before ``rows``."""
    steps = np.diff(rows, prepend=last)
    if (wrong := np.flatnonzero(steps <= 0)).size:
        place = int(wrong[0])
        before, row = int(rows[place - 1]) if place else last, int(rows[place])
        what = f"row {row} follows row {before}" if before >= 0 else f"row {row}"
        faults.add(_ORDER, f"row {row} is there twice" if before == row else what, len(wrong))
    if (beyond := np.flatnonzero(rows >= total)).size:
        faults.add("has a row that is none of the shard's", f"row {int(rows[beyond[0]])} of {total:,}", len(beyond))


def _check_numbers(name: str, array: pa.Array, rows: npt.NDArray[np.int64], faults: _Faults) -> int:
    """Find infinities -> how many rows count as NaN, as `assay.corpus.tables.count_nan` has it."""
    values, owners = array, np.arange(len(array))
    if is_list := not pa.types.is_floating(array.type):
        values, owners = array.flatten(), pc.list_parent_indices(array).to_numpy()
    numbers = values.to_numpy(zero_copy_only=False)
    if (infinite := np.flatnonzero(np.isinf(numbers))).size:
        faults.add(f"{name} is infinite", f"in row {int(rows[owners[infinite[0]]])}", len(infinite))
    is_nan = np.isnan(numbers)
    if is_list and not pa.types.is_fixed_size_list(array.type):  # no number at all
        return len(array) - len(np.unique(owners[~is_nan]))
    return len(np.unique(owners[is_nan]))


def _shard_ids(shard: Shard, id_column: Any) -> Iterator[tuple[int, Ids | None]]:
    """The ids that scoring gives the shard's rows, in chunks, each with its first row; None where it gives none."""
    if id_column is None:
        column = _cheapest_column(shard)
        for chunk in read(shard, column, frozenset(column)):
            yield chunk.first, [row_id(shard.path, chunk.first + i) for i in range(chunk.length)]
        return
    for chunk in read(shard, [str(id_column)]):
        values = chunk.columns[str(id_column)]
        yield chunk.first, [None if i in chunk.faults else _id(value) for i, value in enumerate(values)]


def _id(value: object) -> str | None:
    try:
        return check_id("", value)
    except BadRow:
        return None


def _cheapest_column(shard: Shard) -> list[str]:
    """Some column of the shard, one of small values if there is one: rows are counted by it."""
    types = {name: facts.type for name, facts in columns_of(shard).items()}
    small = [name for name, kind in types.items() if kind.startswith(("int", "uint", "bool", "float", "double"))]
    return (small or [name for name, kind in types.items() if kind == "string"] or list(types))[:1]


def _unknown_ids(rows: int) -> Iterator[tuple[int, Ids | None]]:
    """The same of a shard that is no more what it was: so many rows, in chunks without ids."""
    for first in range(0, rows, CHUNK_ROWS):
        yield first, None


class _Rows:
    """Rows of a table in their order, taken up to a limit at a time."""

    def __init__(self, batches: Iterable[tuple[list[int], list[str]]]) -> None:
        self._batches = iter(batches)
        self._rows: list[int] = []
        self._ids: list[str] = []

    def take(self, end: int) -> tuple[list[int], list[str]]:
        """Those before row ``end`` that have not been taken yet."""
        while not self._rows or self._rows[-1] < end:
            more = next(self._batches, None)
            if more is None:
                break
            self._rows, self._ids = self._rows + more[0], self._ids + more[1]
        count = int(np.searchsorted(self._rows, end))
        taken = self._rows[:count], self._ids[:count]
        self._rows, self._ids = self._rows[count:], self._ids[count:]
        return taken


def _scored(parquet: pq.ParquetFile) -> _Rows:
    batches = parquet.iter_batches(batch_size=CHUNK_ROWS, columns=["row", "id"], use_threads=False)
    return _Rows((batch.column("row").to_pylist(), batch.column("id").to_pylist()) for batch in batches)


class _Listed:
    """The same of a list of quarantined rows."""

    def __init__(self, entries: Iterator[Quarantined]) -> None:
        self._entries = entries
        self.next = next(entries, None)

    def take(self, end: int) -> list[Quarantined]:
        taken = []
        while self.next is not None and (self.next.row is None or self.next.row < end):
            taken.append(self.next)
            self.next = next(self._entries, None)
        return taken


def _compare(
    chunks: Iterator[tuple[int, Ids | None]],
    scored: _Rows,
    entries: Iterator[Quarantined],
    shard: Shard,
    promised: int,
    faults: _Faults,
) -> None:
    """Every row of the shard has scores or is listed, and not both, under its own id.

    ``promised``: the rows that the footer counts.
    """
    listed, end, ids = _Listed(entries), 0, None
    for first, ids in chunks:
        end = min(first + CHUNK_ROWS, promised) if ids is None else first + len(ids)
        (rows, own), bad = scored.take(end), listed.take(end)
        _check_cover(first, end, rows, bad, shard, faults)
        if ids is not None:
            _check_ids(first, rows, own, ids, faults)
            _check_listed_ids(first, bad, ids, faults)
        elif not rows and not bad and listed.next is None:  # what a footer promises may be any number
            faults.add(_NEITHER, f"row {end}", promised - end)
            break
    if ids is not None and end != promised:
        faults.add("counts other rows than the shard has", f"{promised:,} in its footer, {end:,} in {shard.path}")
    if listed.next is not None:
        faults.add("a row is listed as quarantined that the shard has not", f"row {listed.next.row} of {end:,}")


_NEITHER = "a row is neither scored nor listed as quarantined"


def _check_cover(
    first: int, end: int, rows: Sequence[int], bad: Sequence[Quarantined], shard: Shard, faults: _Faults
) -> None:
    for entry in bad:
        if entry.shard != shard.path or entry.row is None or entry.row < first:
            what = "the whole shard" if entry.row is None else f"row {entry.row} of {shown(entry.shard)}"
            faults.add("its list of quarantined rows has an entry out of place", what)
    listed = [entry.row for entry in bad if entry.row is not None]
    if any(later <= row for row, later in pairwise(listed)):
        faults.add("its list of quarantined rows is out of order", f"from row {first} on")
    if both := set(rows).intersection(listed):
        faults.add("a row has scores and is listed as quarantined too", f"row {min(both)}", len(both))
    if len(rows) + len(listed) - len(both) < end - first:
        neither = set(range(first, end)).difference(rows, listed)
        faults.add(_NEITHER, f"row {min(neither)}", len(neither))


def _check_ids(first: int, rows: Sequence[int], own: Sequence[str], ids: Ids, faults: _Faults) -> None:
    if list(own) == [ids[row - first] for row in rows]:
        return
    wrong = [(row, id_) for row, id_ in zip(rows, own, strict=True) if ids[row - first] != id_]
    row, found = wrong[0]
    faults.add("has other ids than the shard", _ids_of(row, found, ids[row - first]), len(wrong))


def _check_listed_ids(first: int, bad: Sequence[Quarantined], ids: Ids, faults: _Faults) -> None:
    for entry in bad:
        if entry.row is None or entry.row < first or entry.id is None or entry.id == ids[entry.row - first]:
            continue
        faults.add("a quarantined row is listed under another id", _ids_of(entry.row, entry.id, ids[entry.row - first]))


def _ids_of(row: int, found: str, expected: str | None) -> str:
    return f"row {row} is {shown(found)}, expected {'none' if expected is None else shown(expected)}"


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
