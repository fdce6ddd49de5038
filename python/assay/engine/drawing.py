"""A random sample of a corpus, drawn by all workers of a run together: each reads a part of the shards."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from assay.corpus.errors import ShardError
from assay.corpus.format import Chunk
from assay.corpus.readers import read
from assay.corpus.shards import Corpus, Shard
from assay.engine.columns import for_shard, optional_columns
from assay.engine.fitting import Together
from assay.engine.pool import encoded_rows
from assay.methods.parts import State
from assay.recipe.errors import EngineError
from assay.recipe.tasks import Encoded, Encoder

log = logging.getLogger("assay")

# Into so many parts are a corpus's shards divided at most, those of a part one after another.
PARTS = 64
Place = tuple[int, int]
"""Of a row: its shard's number, and its own there."""


@dataclass(frozen=True)
class _Row:
    key: float
    place: Place
    values: tuple[Any, ...]
    encoded: Encoded

    @property
    def rank(self) -> tuple[float, Place]:
        return self.key, self.place


def draw_samples(
    corpus: Corpus, encoder: Encoder, count: int, seed: int, together: Together | None = None
) -> list[Encoded]:
    """``count`` random rows of a corpus, or all it has: which ones follows from the seed, the shards' relative paths
    and the rows' positions. One pass; only rows that may be drawn are encoded.

    With several workers each reads a part of the corpus, and leaves the drawn rows of it to the others.
    """
    draw = _Draw(corpus, encoder, count, seed)
    if together is not None:
        together.begin("draw")
    chosen = draw.choose(_states(together, len(draw.parts), draw.candidates))
    if together is not None:
        for state in _states(together, len(draw.parts), lambda i: draw.drawn(i, chosen)):
            draw.take(state)
    return [draw.samples[place] for place in chosen]


def _states(together: Together | None, count: int, make: Callable[[int], State]) -> Iterable[State]:
    """Whoever has read a part's shards leaves what it took from them, or the others would read them, too."""
    return map(make, range(count)) if together is None else together.states(count, make, None, always=True)


@dataclass
class _Draw:
    corpus: Corpus
    encoder: Encoder
    count: int
    seed: int
    rows: list[_Row] = field(default_factory=list)
    """Those read here that may be drawn."""
    bound: float = 1.0
    seen: set[int] = field(default_factory=set)
    """The shards that were read: a state that has vanished is made of their rows again."""

    @cached_property
    def parts(self) -> list[range]:
        shards = len(self.corpus.shards)
        count = min(PARTS, shards)
        return [range(shards * i // count, shards * (i + 1) // count) for i in range(count)]

    def candidates(self, i: int) -> State:
        """Keys and places of the rows of a part that may be drawn."""
        for number in self.parts[i]:
            if number not in self.seen:
                self._read(number)
                self.seen.add(number)
        own = [row for row in self.rows if row.place[0] in self.parts[i]]
        places = torch.tensor([row.place for row in own], dtype=torch.int64).reshape(-1, 2)
        return {"keys": torch.tensor([row.key for row in own], dtype=torch.float64), "places": places}

    def choose(self, states: Iterable[State]) -> list[Place]:
        """The rows that are drawn, of all parts' candidates."""
        found: list[tuple[float, int, int]] = []
        for state in states:
            keys, places = state["keys"].tolist(), state["places"].tolist()
            found += [(key, *place) for key, place in zip(keys, places, strict=True)]
        return [(shard, row) for _, shard, row in sorted(found)[: self.count]]

    def drawn(self, i: int, chosen: Sequence[Place]) -> State:
        """What the chosen rows of a part hold: shard, row, values."""
        wanted = [place for place in chosen if place[0] in self.parts[i]]
        held = {row.place: row.values for row in self.rows}
        held |= self._read_again([place for place in wanted if place not in held])
        return [[*place, _plain(list(held[place]))] for place in wanted]

    def take(self, state: State) -> None:
        """Rows that other workers may have read."""
        for shard, row, values in state:
            if (shard, row) not in self.samples:
                (sample,) = self._encoder(shard).encode([tuple(_as_read(values))])
                if not isinstance(sample, Encoded):
                    raise EngineError(f"fit: {self.corpus.shards[shard].path}, row {row}: {sample}")
                self.samples[shard, row] = sample

    @cached_property
    def samples(self) -> dict[Place, Encoded]:
        """By place; of the rows that were read here once all are."""
        return {row.place: row.encoded for row in self.rows}

    def _encoder(self, number: int) -> Encoder:
        return for_shard(self.encoder, self.corpus.shards[number])

    def _chunks(self, number: int) -> Iterator[tuple[Encoder, Chunk]]:
        own = self._encoder(number)
        for chunk in read(self.corpus.shards[number], list(dict.fromkeys(own.columns)), optional_columns(own)):
            yield own, chunk

    def _read(self, number: int) -> None:
        shard = self.corpus.shards[number]
        rng = np.random.Generator(np.random.Philox(key=_key(self.seed, shard)))
        try:
            for encoder, chunk in self._chunks(number):
                self._take(number, encoder, chunk, rng.random(chunk.length))
        except ShardError as error:  # scoring will list it; what was read of it is as good as any sample
            log.warning("fit: %s: %s", shard.path, error)

    def _take(self, number: int, encoder: Encoder, chunk: Chunk, keys: NDArray[np.float64]) -> None:
        for row, result in encoded_rows(chunk, np.flatnonzero(keys < self.bound).tolist(), encoder):
            if isinstance(result, Encoded):
                key = float(keys[row - chunk.first])
                self.rows.append(_Row(key, (number, row), _values(chunk, row, encoder), result))
        if len(self.rows) >= 2 * self.count:
            self.rows = sorted(self.rows, key=lambda row: row.rank)[: self.count]
            self.bound = self.rows[-1].key

    def _read_again(self, places: Sequence[Place]) -> dict[Place, tuple[Any, ...]]:
        """Rows that another worker has read, which has not left them (yet)."""
        found: dict[Place, tuple[Any, ...]] = {}
        for number in sorted({shard for shard, _ in places}):
            rows = {row for shard, row in places if shard == number}
            for encoder, chunk in self._chunks(number):
                for row in rows & set(range(chunk.first, chunk.first + chunk.length)):
                    found[number, row] = _values(chunk, row, encoder)
                if max(rows) < chunk.first + chunk.length:
                    break
        if len(found) < len(places):
            path = self.corpus.shards[next(place for place in places if place not in found)[0]].path
            raise EngineError(f"fit: {path}: has fewer rows than when it was read before; run again")
        return found


def _values(chunk: Chunk, row: int, encoder: Encoder) -> tuple[Any, ...]:
    return tuple(chunk.columns[name][row - chunk.first] for name in encoder.columns)


def _plain(value: Any) -> Any:
    """A row's value as a state holds it: arrays as tensors."""
    if isinstance(value, np.ndarray) and value.dtype.kind in "fiub":
        return torch.from_numpy(value.copy())
    if isinstance(value, dict):
        return {key: _plain(each) for key, each in value.items()}
    return [_plain(each) for each in value] if isinstance(value, list) else value


def _as_read(value: Any) -> Any:
    """The inverse of ``_plain``."""
    if isinstance(value, torch.Tensor):
        return value.numpy()
    if isinstance(value, dict):
        return {key: _as_read(each) for key, each in value.items()}
    return [_as_read(each) for each in value] if isinstance(value, list) else value


def _key(seed: int, shard: Shard) -> int:
    return int.from_bytes(hashlib.sha256(f"fit\0{seed}\0{shard.path}".encode()).digest()[:16], "little")
