"""Batches that also hold the samples' own columns, for methods that read them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from assay.corpus.errors import BadRow
from assay.corpus.named_files import NamedFiles
from assay.corpus.shards import Shard
from assay.methods import Views
from assay.recipe.tasks.base import (
    Columns,
    Encoded,
    Encoder,
    OwnShapes,
    ReadsColumns,
    ReadsFiles,
    ReadsOptional,
    ShowsTokens,
)


@dataclass(frozen=True)
class _Row:
    """What the task made of a row, and the row's own values."""

    main: Any
    raw: tuple[Any, ...]


class WithColumns:
    """A task's encoder whose batches are `Views` with the ``raw`` columns; which rows are samples, the task says."""

    def __init__(self, task: Encoder, raw: Sequence[str]) -> None:
        self._task, self._raw = task, tuple(raw)
        self.columns = tuple(dict.fromkeys((*task.columns, *raw)))
        self._places = [self.columns.index(column) for column in raw]
        self._more = range(len(task.columns), len(self.columns))

    @property
    def identity(self) -> dict[str, Any]:
        return self._task.identity

    def encode(self, rows: Sequence[tuple[Any, ...]]) -> list[Encoded | BadRow]:
        own = self._task.encode([row[: self._more.start] for row in rows])
        return [self._encoded(result, row) for result, row in zip(own, rows, strict=True)]

    def _encoded(self, result: Encoded | BadRow, row: tuple[Any, ...]) -> Encoded | BadRow:
        if isinstance(result, BadRow):
            return result
        more = sum(len(row[i]) for i in self._more if isinstance(row[i], str | bytes))
        data = _Row(result.data, tuple(row[i] for i in self._places))
        return result._replace(data=data, nbytes=result.nbytes + more)

    def collate(self, data: Sequence[_Row]) -> Views:
        raw = {column: [row.raw[i] for row in data] for i, column in enumerate(self._raw)}
        return Views(self._task.collate([row.main for row in data]), raw=raw)

    def for_columns(self, columns: Columns) -> WithColumns:
        return self._of(self._task.for_columns(columns) if isinstance(self._task, ReadsColumns) else self._task)

    def beside(self, shard: Shard) -> WithColumns:
        return self._of(self._task.beside(shard) if isinstance(self._task, ReadsFiles) else self._task)

    def _of(self, task: Encoder) -> WithColumns:
        return type(self)(task, self._raw)

    @property
    def optional(self) -> frozenset[str]:
        return self._task.optional if isinstance(self._task, ReadsOptional) else frozenset()

    @property
    def files(self) -> NamedFiles:
        return self._task.files if isinstance(self._task, ReadsFiles) else {}

    def misfit(self, data: _Row) -> BadRow | None:
        return self._task.misfit(data.main) if isinstance(self._task, OwnShapes) else None

    @property
    def apart(self) -> bool:
        return isinstance(self._task, OwnShapes) and self._task.apart


class TokensWithColumns(WithColumns):
    """Of a task whose samples are tokens."""

    def tokens(self, data: _Row) -> list[tuple[str, bool]]:
        assert isinstance(self._task, ShowsTokens)
        return self._task.tokens(data.main)


class WithoutColumns:
    """The samples of a `WithColumns` as the task's own batches, for methods that read no column."""

    def __init__(self, encoder: Encoder) -> None:
        self._encoder = encoder
        self.columns = encoder.columns

    @property
    def identity(self) -> dict[str, Any]:
        return self._encoder.identity

    def encode(self, rows: Sequence[tuple[Any, ...]]) -> list[Encoded | BadRow]:
        return self._encoder.encode(rows)

    def collate(self, data: Sequence[_Row]) -> Any:
        return self._encoder.collate(data).main


def with_columns_of(task: Encoder, raw: Sequence[str]) -> Encoder:
    """The task's encoder, or one whose batches have the ``raw`` columns, too."""
    if not raw:
        return task
    return TokensWithColumns(task, raw) if isinstance(task, ShowsTokens) else WithColumns(task, raw)


def without_columns(encoder: Encoder) -> Encoder:
    """An encoder whose batches are the task's alone."""
    return WithoutColumns(encoder) if isinstance(encoder, WithColumns) else encoder
