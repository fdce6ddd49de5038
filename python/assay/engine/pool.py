"""What methods look at before they score: the targets' samples, and a random sample of the pool."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from assay.corpus.errors import BadRow, ShardError
from assay.corpus.format import Chunk
from assay.corpus.readers import read
from assay.corpus.shards import Corpus, Shard
from assay.corpus.storage import may_pass
from assay.engine.columns import for_shard, optional_columns
from assay.engine.groups import batches_of
from assay.recipe.errors import EngineError
from assay.recipe.recipe import Recipe
from assay.recipe.tasks import Encoded, Encoder, without_columns

log = logging.getLogger("assay")


@dataclass(frozen=True)
class Batches:
    """Samples as batches of the recipe's task, collated anew each time they are gone through."""

    samples: Sequence[Encoded]
    encoder: Encoder
    recipe: Recipe

    def __iter__(self) -> Iterator[Any]:
        return batches_of(self.recipe, self.encoder, self.samples)

    @property
    def plain(self) -> Batches:
        """Without the columns that are not the task's."""
        return replace(self, encoder=without_columns(self.encoder))


def corpus_fingerprint(corpus: Corpus) -> str:
    """Changes with any shard's name, size, modification time or etag, as a score table's input does."""
    digest = hashlib.sha256()
    for shard in corpus.shards:
        try:
            facts: object = sorted(shard.fingerprint().to_json().items())
        except OSError as error:
            if may_pass(error):
                raise
            facts = "not there"  # reading it will say what is the matter
        digest.update(f"{shard.path}\0{facts}\n".encode())
    return f"sha256:{digest.hexdigest()}"


def samples_by_row(what: str, corpus: Corpus, encoder: Encoder) -> dict[int, Encoded]:
    """A corpus's samples by row, which counts those of all shards one after another. Rows that cannot be one are left
    out with a warning.

    Args:
        what: what they are for, which errors and the warning begin with.

    Raises:
        EngineError: a shard that cannot be read, or no sample at all.
    """
    samples: dict[int, Encoded] = {}
    faults, start = [], 0
    for shard in corpus.shards:
        rows = 0
        try:
            own = for_shard(encoder, shard)
            for chunk in read(shard, list(dict.fromkeys(own.columns)), optional_columns(own)):
                for row, result in _encoded(chunk, range(chunk.length), own):
                    if isinstance(result, Encoded):
                        samples[start + row] = result
                    else:
                        faults.append(f"{shard.path}, row {row}: {result}")
                rows = chunk.first + chunk.length
        except (ShardError, OSError) as error:
            raise EngineError(f"{what}: {shard.path}: {error}") from error
        start += rows
    first = f"; {len(faults)} rows are none, the first: {faults[0]}" if faults else ""
    if not samples:
        raise EngineError(f"{what}: no samples in {corpus.store.url}{first}")
    if faults:
        log.warning("%s: %d samples%s", what, len(samples), first)
    return samples


def draw_samples(corpus: Corpus, encoder: Encoder, count: int, seed: int) -> list[Encoded]:
    """``count`` random rows of a corpus, or all it has: which ones follows from the seed, the shards' relative paths
    and the rows' positions. One pass; only rows that may be drawn are encoded."""
    drawn: list[tuple[float, str, int, Encoded]] = []
    bound = 1.0
    for shard in corpus.shards:
        rng = np.random.Generator(np.random.Philox(key=_key(seed, shard)))
        try:
            own = for_shard(encoder, shard)
            for chunk in read(shard, list(dict.fromkeys(own.columns)), optional_columns(own)):
                keys = rng.random(chunk.length)
                for row, result in _encoded(chunk, np.flatnonzero(keys < bound).tolist(), own):
                    if isinstance(result, Encoded):
                        drawn.append((float(keys[row - chunk.first]), shard.path, row, result))
                if len(drawn) >= 2 * count:
                    drawn = sorted(drawn, key=lambda sample: sample[:3])[:count]
                    bound = drawn[-1][0]
        except ShardError as error:  # scoring will list it; what was read of it is as good as any sample
            log.warning("fit: %s: %s", shard.path, error)
    return [sample for *_, sample in sorted(drawn, key=lambda sample: sample[:3])[:count]]


def _key(seed: int, shard: Shard) -> int:
    return int.from_bytes(hashlib.sha256(f"fit\0{seed}\0{shard.path}".encode()).digest()[:16], "little")


def _encoded(chunk: Chunk, offsets: Sequence[int], encoder: Encoder) -> Iterator[tuple[int, Encoded | BadRow]]:
    """The chunk's rows at these offsets, with their number in the shard."""
    good = [i for i in offsets if i not in chunk.faults]
    values = [tuple(chunk.columns[name][i] for name in encoder.columns) for i in good]
    encoded: Mapping[int, Encoded | BadRow] = dict(zip(good, encoder.encode(values), strict=True))
    for i in offsets:
        yield chunk.first + i, encoded[i] if i in encoded else BadRow(chunk.faults[i])
