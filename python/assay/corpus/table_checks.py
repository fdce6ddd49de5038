"""A shard's score table against the shard itself: every row in its place, under its id, with numbers that may be there.

Tables, lists and shards are streamed: what is held is a batch of rows, whatever their number.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
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
from assay.corpus.score_files import opened_table
from assay.corpus.shards import Shard
from assay.corpus.storage import Store, may_pass
from assay.corpus.tables import count_nan_rows, score_schema

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
    unchecked: str = ""
    """Why it could not be looked at to its end, if storage failed in a way that may pass."""


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
    faults, table, unchecked = _Faults(), None, ""
    try:
        table = find_table(store, shard)
        if table is None:
            return _without_table(store, shard)
        problems += _footer_problems(table, shard, manifest)
        changes = list(_input_problems(store, shard, table))
        problems += changes
        problems += _count_problems(store, shard, table)
        _check_rows(store, table, manifest.columns, None if changes else shard, faults)
    except CorpusError as error:
        problems.append(str(error).removeprefix(f"{store.full(table_path(shard))}: "))
    except (pa.ArrowException, OSError, ValueError) as error:
        if may_pass(error):
            unchecked = _one_line(error)
        else:
            problems.append(f"cannot be read to its end ({_one_line(error)}); move it away to have it made again")
    problems += faults.lines()
    if table is None:
        return Checked(problems, unchecked=unchecked)
    return Checked(problems, table.file.rows, table.footer.rows.quarantined, unchecked=unchecked)


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
        if table.footer.input.fingerprint != shard.fingerprint():
            yield f"{shard.path} has changed since it was scored"
        elif changed := changed_file(store, shard, table.footer.input.files):
            yield f"{shard.path}: {changed}"
    except OSError as error:
        if may_pass(error):
            raise
        yield f"{shard.path} cannot be looked at: {error.strerror or _one_line(error)}"


def _count_problems(store: Store, shard: Shard, table: Table) -> Iterator[str]:
    counts, rows = table.footer.rows, table.footer.input.rows
    if table.file.rows != counts.scored or rows != counts.scored + counts.quarantined:
        yield (
            f"holds {table.file.rows:,} rows, but its footer counts {counts.scored:,} scored and "
            f"{counts.quarantined:,} quarantined of {rows:,}"
        )
    if list_digest(store, shard) != table.footer.quarantine:
        yield f"{quarantine_path(shard)} is not the list of quarantined rows that was written with it"


def _check_rows(
    store: Store, table: Table, columns: Sequence[TableColumn], shard: Shard | None, faults: _Faults
) -> None:
    """The rows by themselves, and beside those of the ``shard``: None if it is no more what was scored."""
    with opened_table(store, table.file.path) as parquet:
        _check_schema(parquet.schema_arrow, columns, faults)
        if not faults.has(_COLUMN):
            _check_values(parquet, columns, table, faults)
    if shard is None or faults.has(_COLUMN, _ORDER, _NULL):
        return
    with opened_table(store, table.file.path) as parquet:
        try:
            _compare(parquet, shard, read_quarantine(store, shard), table, faults)
        except ShardError as error:
            if (cause := error.__cause__) is not None and may_pass(cause):
                raise cause from None
            faults.add("the shard cannot be read", str(error))


_COLUMN, _ORDER, _NULL = "its columns are not the manifest's", "rows are out of order", "holds a null"


def _check_schema(schema: pa.Schema, columns: Sequence[TableColumn], faults: _Faults) -> None:
    """A table's columns are those that it must have."""
    wanted = score_schema(columns, {})
    if schema.names != wanted.names:
        faults.add(_COLUMN, f"found {', '.join(map(shown, schema.names))}, expected {', '.join(wanted.names)}")
        return
    for found, field in zip(schema, wanted, strict=True):
        if found.type != field.type:
            faults.add(_COLUMN, f"{field.name} holds {found.type}, expected {field.type}")
        elif any((found.metadata or {}).get(key) != value for key, value in (field.metadata or {}).items()):
            faults.add("says other things of its columns than the manifest", field.name)


def _check_values(parquet: pq.ParquetFile, columns: Sequence[TableColumn], table: Table, faults: _Faults) -> None:
    """A table by itself: rows that ascend, no null, no infinity, and as many NaN as its footer counts."""
    nan = dict.fromkeys((column.name for column in columns), 0)
    last, total = -1, table.footer.input.rows
    size = _BATCH_ROWS if all(column.width == 1 for column in columns) else CHUNK_ROWS
    for batch in parquet.iter_batches(batch_size=size, columns=["row", "id", *nan], use_threads=False):
        for name, column in zip(batch.schema.names, batch.columns, strict=True):
            if column.null_count:
                faults.add(_NULL, f"in {name}", column.null_count)
        rows = batch.column("row").fill_null(-1).to_numpy()
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
    """Find infinities -> how many rows count as NaN, as `count_nan_rows` has it."""
    values, owners = array, np.arange(len(array))
    if not pa.types.is_floating(array.type):
        values, owners = array.flatten(), pc.list_parent_indices(array).to_numpy()
    numbers = values.to_numpy(zero_copy_only=False)
    if (infinite := np.flatnonzero(np.isinf(numbers))).size:
        faults.add(f"{name} is infinite", f"in row {int(rows[owners[infinite[0]]])}", len(infinite))
    return count_nan_rows(array)


def _shard_ids(shard: Shard, id_column: Any) -> Iterator[tuple[int, Ids]]:
    """The ids that scoring gives the shard's rows, in chunks, each with its first row; None where it gives none."""
    if id_column is None:
        column = _cheapest_column(shard)
        for chunk in read(shard, column, frozenset(column)):
            yield chunk.first, [row_id(shard.path, chunk.first + i) for i in range(chunk.length)]
        return
    for chunk in read(shard, [str(id_column)], names=frozenset([str(id_column)])):
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
    """The same of a list of quarantined rows, as far as it ascends: a short file may unfold to any number of them."""

    def __init__(self, entries: Iterator[Quarantined], shard: Shard, faults: _Faults) -> None:
        self._entries, self._shard, self._faults = entries, shard, faults
        self._next: Quarantined | None = None
        self._last = -1
        self._advance()

    @property
    def next_row(self) -> int | None:
        return self._next.row if self._next else None

    def take(self, end: int) -> list[Quarantined]:
        taken = []
        while self._next is not None and self._last < end:
            taken.append(self._next)
            self._advance()
        return taken

    def _advance(self) -> None:
        entry, self._next = next(self._entries, None), None
        if entry is None:
            return
        if entry.row is None or entry.shard != self._shard.path:
            what = "the whole shard" if entry.row is None else f"row {entry.row} of {shown(entry.shard)}"
            self._faults.add("its list of quarantined rows has an entry out of place", what)
        elif entry.row <= self._last:
            what = f"row {entry.row} follows row {self._last}" if self._last >= 0 else f"row {entry.row}"
            self._faults.add("its list of quarantined rows is out of order", what)
        else:
            self._next, self._last = entry, entry.row


def _compare(
    parquet: pq.ParquetFile, shard: Shard, entries: Iterator[Quarantined], table: Table, faults: _Faults
) -> None:
    """Every row of the shard has scores or is listed, and not both, under its own id."""
    scored, listed, end = _scored(parquet), _Listed(entries, shard, faults), 0
    for first, ids in _shard_ids(shard, table.footer.recipe.get("id_column")):
        end = first + len(ids)
        (rows, own), bad = scored.take(end), listed.take(end)
        _check_cover(first, end, rows, bad, faults)
        _check_ids(first, rows, own, ids, faults)
        _check_listed_ids(first, bad, ids, faults)
    if end != (promised := table.footer.input.rows):
        faults.add("counts other rows than the shard has", f"{promised:,} in its footer, {end:,} in {shard.path}")
    if listed.next_row is not None:
        faults.add("a row is listed as quarantined that the shard has not", f"row {listed.next_row} of {end:,}")


def _check_cover(first: int, end: int, rows: Sequence[int], bad: Sequence[Quarantined], faults: _Faults) -> None:
    listed = {entry.row for entry in bad if entry.row is not None}
    if both := listed.intersection(rows):
        faults.add("a row has scores and is listed as quarantined too", f"row {min(both)}", len(both))
    if len(rows) + len(listed) - len(both) < end - first:
        neither = set(range(first, end)).difference(rows, listed)
        faults.add("a row is neither scored nor listed as quarantined", f"row {min(neither)}", len(neither))


def _check_ids(first: int, rows: Sequence[int], own: Sequence[str], ids: Ids, faults: _Faults) -> None:
    if list(own) == [ids[row - first] for row in rows]:
        return
    wrong = [(row, id_) for row, id_ in zip(rows, own, strict=True) if ids[row - first] != id_]
    row, found = wrong[0]
    faults.add("has other ids than the shard", _ids_of(row, found, ids[row - first]), len(wrong))


def _check_listed_ids(first: int, bad: Sequence[Quarantined], ids: Ids, faults: _Faults) -> None:
    for entry in bad:
        if entry.row is None or entry.id is None:
            continue
        if entry.id != (expected := ids[entry.row - first]):
            faults.add("a quarantined row is listed under another id", _ids_of(entry.row, entry.id, expected))


def _ids_of(row: int, found: str, expected: str | None) -> str:
    return f"row {row} is {shown(found)}, expected {'none' if expected is None else shown(expected)}"


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
