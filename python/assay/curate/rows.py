"""The scored rows of a folder as a stream, and beside them what other runs and selections say of the same rows."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from assay.corpus.errors import CorpusError
from assay.corpus.layout import selection_path, table_path
from assay.corpus.score_files import ROW_GROUP_ROWS, opened_table, table_schema
from assay.corpus.scores_folder import Scored, Scores, open_scores
from assay.corpus.shards import Shard
from assay.corpus.storage import Store
from assay.curate.dataset import SHARD
from assay.curate.manifests import is_selection, read_selection
from assay.curate.whole import scored_shards

Tables = Sequence[tuple[Shard, Scored]]
TEXTS = ("id", SHARD)
KEPT = "kept"
_OF_SELECTIONS = {KEPT: pa.bool_()}
_NAME = re.compile(r"[^\W\d]\w*")


@dataclass(frozen=True)
class Beside:
    """Other tables of the same shards: the scores that another run gave them, or what a selection made of their rows.

    Attributes:
        path: a shard's table in ``store``.
        types: its columns, without `row` and `id`.
        facts: which run or selection it is, as a manifest has it.
        corpora: the paths of those that a run's scores are about, or depend on.
    """

    store: Store
    path: Callable[[Shard], str]
    types: Mapping[str, pa.DataType]
    facts: Mapping[str, Any]
    corpora: tuple[str, ...] = ()

    def to_json(self, tables: Tables) -> dict[str, Any]:
        """Which run or selection it is, and the tables that were read."""
        return {**self.facts, "table_sha256": self.digests(tables)}

    def digests(self, tables: Tables) -> dict[str, str]:
        """By path, those of its tables of the shards of ``tables``."""
        return {path: self.store.sha256(path) for path in (self.path(shard) for shard, _ in tables)}


@dataclass(frozen=True)
class Rows:
    """The rows of score tables, shards after one another. ``beside``: by name, other tables of them."""

    store: Store
    tables: Tables
    beside: Mapping[str, Beside] = field(default_factory=dict)

    def __len__(self) -> int:
        return sum(table.scored for _, table in self.tables)

    def names(self) -> dict[str, pa.DataType]:
        """What a condition may name: a table's columns, `shard`, and `NAME.score` or `NAME.kept` of the others."""
        own = _types(self.store, self.tables[0][0])
        found = {SHARD: pa.string(), **own}
        for name, other in self.beside.items():
            if taken := _below(name, list(own)):
                raise CorpusError(f"--with {name}: {self.store.url} has a score {name}.{taken[0]}; take another name")
            found |= {f"{name}.{column}": kind for column, kind in other.types.items()}
        return found

    def stream(self, columns: Mapping[str, str]) -> tuple[pa.Schema, Iterator[pa.RecordBatch]]:
        """``place``, counted over all shards, and ``columns``, by what they are to be called: numbers as float64, and
        whether rows were kept as Booleans.

        CorpusError, once it is read, if a table has other rows than its footer says.
        """
        conditions = {f"{name}.{KEPT}" for name, other in self.beside.items() if other.types == _OF_SELECTIONS}
        kinds = {
            new: pa.string() if name in TEXTS else pa.bool_() if name in conditions else pa.float64()
            for new, name in columns.items()
        }
        schema = pa.schema([pa.field("place", pa.int64()), *(pa.field(new, kind) for new, kind in kinds.items())])
        return schema, self._batches(columns, schema)

    def _batches(self, columns: Mapping[str, str], schema: pa.Schema) -> Iterator[pa.RecordBatch]:
        wanted = {name: _below(name, list(columns.values())) for name in self.beside}
        outside = {SHARD, "row", *(f"{name}.{column}" for name, its in wanted.items() for column in its)}
        own = ["row", *(name for name in columns.values() if name not in outside)]
        place = 0
        for shard, table in self.tables:
            end = place + table.scored
            path = table_path(shard)
            changed = f"{self.store.full(path)}: has changed while it was read"
            others = {n: _Follower(self.beside[n], shard, its) for n, its in wanted.items() if its}
            for batch in read_batches(self.store, path, own):
                if place + batch.num_rows > end:
                    raise CorpusError(changed)
                held = {SHARD: pa.repeat(shard.path, batch.num_rows)}
                held |= dict(zip(batch.schema.names, batch.columns, strict=True))
                for name, follower in others.items():
                    found = follower.at(batch.column("row").to_numpy())
                    held |= {f"{name}.{column}": values for column, values in found.items()}
                arrays = [held[name].cast(schema.field(new).type) for new, name in columns.items()]
                places = pa.array(np.arange(place, place + batch.num_rows))
                place += batch.num_rows
                yield pa.RecordBatch.from_arrays([places, *arrays], schema=schema)
            if place != end:
                raise CorpusError(changed)


class _Follower:
    """Goes through another table of a shard, whose rows may be more or fewer, along with ours."""

    def __init__(self, other: Beside, shard: Shard, columns: Sequence[str]) -> None:
        path = other.path(shard)
        self._where, self._columns = other.store.full(path), columns
        self._batches = read_batches(other.store, path, ["row", *columns])
        kinds = [("row", pa.int64()), *((name, other.types[name]) for name in columns)]
        self._held = pa.schema(kinds).empty_table()
        self._last = -1

    def at(self, rows: npt.NDArray[np.int64]) -> dict[str, pa.Array]:
        """Its values of ``rows``, which ascend from call to call; NaN, or not kept, where it has none."""
        parts = [self._held]
        while rows.size and self._last < rows[-1] and (batch := next(self._batches, None)) is not None:
            ascending = np.concatenate([[self._last], batch.column("row").to_numpy()])
            if (np.diff(ascending) <= 0).any():
                raise CorpusError(f"{self._where}: its rows do not ascend; score it again")
            self._last = int(ascending[-1])
            parts.append(pa.Table.from_batches([batch]).cast(self._held.schema))
        held = pa.concat_tables(parts).combine_chunks()
        its = held["row"].to_numpy()
        places = np.searchsorted(its, rows)
        there = places < len(its)
        there[there] = its[places[there]] == rows[there]
        indices = pa.array(places, mask=~there)
        found = {n: _filled(held[n].combine_chunks().take(indices)) for n in self._columns}
        self._held = held.slice(int(np.searchsorted(its, rows[-1], side="right"))) if rows.size else held
        return found


def _filled(values: pa.Array) -> pa.Array:
    return pc.fill_null(values, False if values.type == pa.bool_() else np.float32("nan"))


def read_batches(store: Store, path: str, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
    """Some columns of a score table, a row group's worth at a time."""
    with opened_table(store, path) as table:
        yield from table.iter_batches(batch_size=ROW_GROUP_ROWS, columns=list(columns))


def open_beside(scores: Scores, tables: Tables, beside: Mapping[str, str]) -> dict[str, Beside]:
    """Other runs' scores folders, and selections, by the names that they are to have.

    Raises:
        CorpusError: a name is none; that run has not scored every shard of ``tables``, as it is now; or the selection
            is not one of these scores.
    """
    opened = {}
    for name, url in beside.items():
        option = f"--with {name}={url}"
        if not _NAME.fullmatch(name):
            raise CorpusError(f"{option}: expected a name of letters, digits and _, as in other={url}")
        store = Store.at(url)
        open_ = _open_selection if is_selection(store) else _open_run
        opened[name] = open_(scores, tables, store, option)
    return opened


def _open_run(scores: Scores, tables: Tables, store: Store, option: str) -> Beside:
    other = open_scores(store.url, scores.corpus_path)
    try:
        there = {shard.path for shard, _ in scored_shards(other)}
    except CorpusError as error:
        raise CorpusError(f"{option}: not of the same shards: {error}") from error
    if missing := [shard.path for shard, _ in tables if shard.path not in there]:
        raise CorpusError(f"{option}: not of the same shards: it could not read {missing[0]}")
    types = {name: kind for name, kind in _types(store, tables[0][0]).items() if name not in ("row", "id")}
    identity = other.identity
    facts = {"scores": store.url, "recipe": identity.recipe, "models": identity.models}
    return Beside(store, table_path, types, facts, (identity.corpus, *other.inputs))


def _open_selection(scores: Scores, tables: Tables, store: Store, option: str) -> Beside:
    manifest = read_selection(store, option)
    listed = {shard.path: shard.table_sha256 for shard in manifest.shards}
    for shard, _ in tables:
        if listed.get(shard.path) != scores.store.sha256(table_path(shard)):
            raise CorpusError(
                f"{option}: made of other scores of {shard.path} than {scores.store.url} has; select again from these"
            )
    return Beside(store, selection_path, _OF_SELECTIONS, {"selection": store.url, "rule": manifest.rule})


def _below(name: str, names: Sequence[str]) -> list[str]:
    return [full[len(name) + 1 :] for full in names if full.startswith(f"{name}.")]


def _types(store: Store, shard: Shard) -> dict[str, pa.DataType]:
    return {found.name: found.type for found in table_schema(store, table_path(shard))}
