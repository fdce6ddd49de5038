"""A shard's rows as samples that are ready to be scored, or rejected with a reason."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, NamedTuple, cast

from assay.corpus.checks import SeenIds, check_id
from assay.corpus.errors import BadRow
from assay.corpus.format import Chunk
from assay.corpus.named_files import NamedFiles
from assay.corpus.quarantine import row_id
from assay.corpus.shards import Shard
from assay.engine.columns import for_shard, optional_columns
from assay.recipe.tasks import Encoded, Encoder, ReadsFiles, Stacked, Stacks, attempt

# What is encoded at once: samples may be a thousand times as large as the rows that they are made of.
ROWS_AT_ONCE = 128


class Sample(NamedTuple):
    """A row that is ready to be scored."""

    row: int
    id: str
    encoded: Encoded


class Rejected(NamedTuple):
    """A row that is not, and why."""

    row: int
    id: str | None
    reason: str


@dataclass(frozen=True)
class StackedSamples(Sequence["Sample"]):
    """Rows after one another that are all samples, encoded together."""

    first: int
    ids: Sequence[str]
    encoded: Stacked

    @property
    def rows(self) -> range:
        """Their numbers in the shard."""
        return range(self.first, self.first + len(self.ids))

    def part(self, start: int, end: int) -> StackedSamples:
        return StackedSamples(self.first + start, self.ids[start:end], self.encoded.part(start, end))

    @classmethod
    def joined(cls, several: Sequence[StackedSamples]) -> StackedSamples:
        """Samples that follow one another."""
        ids = list(chain.from_iterable(one.ids for one in several))
        return cls(several[0].first, ids, Stacked.joined([one.encoded for one in several]))

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, i: Any) -> Any:
        """A sample by its place, or a list of several, as any `Sequence` has them."""
        place = range(len(self))[i]
        return [self._sample(one) for one in place] if isinstance(place, range) else self._sample(place)

    def _sample(self, i: int) -> Sample:
        return Sample(self.first + i, self.ids[i], self.encoded.row(i))


class RowReader:
    """Turns one shard's chunks into samples and rejections, in row order. ShardError if its columns do not fit."""

    def __init__(self, shard: Shard, encoder: Encoder, id_column: str | None) -> None:
        self._shard = shard
        self._encoder = for_shard(encoder, shard)
        self._id_column = id_column
        self._seen = SeenIds()

    @property
    def columns(self) -> list[str]:
        """The columns to read."""
        wanted = [*self._encoder.columns, *([self._id_column] if self._id_column else [])]
        return list(dict.fromkeys(wanted))

    @property
    def optional(self) -> frozenset[str]:
        """Those of them that a row may lack."""
        return optional_columns(self._encoder) - {str(self._id_column)}

    @property
    def names(self) -> frozenset[str]:
        """Those of them whose values are names."""
        return frozenset([self._id_column] if self._id_column else [])

    @property
    def files(self) -> NamedFiles:
        """The files that rows have named so far."""
        return self._encoder.files if isinstance(self._encoder, ReadsFiles) else {}

    def rows(
        self, chunk: Chunk, wanted: Callable[[int], bool] | None = None
    ) -> StackedSamples | Iterator[Sample | Rejected]:
        """Every row of the chunk whose number in the shard is ``wanted``, if not all; of the others only their ids are
        looked at.

        The first row with an id uses it up, whatever becomes of that row.
        """
        ids = self._ids(chunk)
        faults: dict[int, str] = {i: str(id_) for i, id_ in enumerate(ids) if isinstance(id_, BadRow)}
        faults |= self._repeated(ids)
        faults |= chunk.faults
        own: Sequence[int] = range(chunk.length)
        own = own if wanted is None else [i for i in own if wanted(chunk.first + i)]
        if not faults and 0 < len(own) == chunk.length and isinstance(self._encoder, Stacks):
            stacked = self._encoder.stack([chunk.columns[name] for name in self._encoder.columns])
            if stacked is not None:
                return StackedSamples(chunk.first, cast("list[str]", ids), stacked)
        return self._one_by_one(chunk, ids, faults, own)

    def _one_by_one(
        self, chunk: Chunk, ids: Sequence[str | BadRow], faults: Mapping[int, str], own: Sequence[int]
    ) -> Iterator[Sample | Rejected]:
        """The chunk's ``own`` rows."""
        encoded = self._encoded(chunk, [i for i in own if i not in faults])
        for i in own:
            id_ = ids[i]
            row, known = chunk.first + i, None if isinstance(id_, BadRow) else id_
            result = None if i in faults else next(encoded)
            if known is not None and isinstance(result, Encoded):
                yield Sample(row, known, result)
            else:
                yield Rejected(row, known, faults.get(i) or str(result))

    def _encoded(self, chunk: Chunk, offsets: Sequence[int]) -> Iterator[Encoded | BadRow]:
        """The chunk's rows at these offsets, in order."""
        columns = [chunk.columns[name] for name in self._encoder.columns]
        for start in range(0, len(offsets), ROWS_AT_ONCE):
            part = offsets[start : start + ROWS_AT_ONCE]
            values = [[column[i] for i in part] for column in columns]
            yield from self._encoder.encode(list(zip(*values, strict=True)))

    def _ids(self, chunk: Chunk) -> list[str | BadRow]:
        if self._id_column is None:
            return [row_id(self._shard.path, chunk.first + i) for i in range(chunk.length)]
        values = chunk.columns[self._id_column]
        return [
            BadRow(chunk.faults[i]) if i in chunk.faults else attempt(check_id, self._id_column, value)
            for i, value in enumerate(values)
        ]

    def _repeated(self, ids: Sequence[str | BadRow]) -> dict[int, str]:
        if self._id_column is None:
            return {}
        known = [(i, id_) for i, id_ in enumerate(ids) if isinstance(id_, str)]
        repeats = self._seen.repeats([id_ for _, id_ in known])
        reason = f"{self._id_column} repeats that of an earlier row"
        return {i: reason for (i, _), repeated in zip(known, repeats, strict=True) if repeated}
