"""What methods look at before they score: the targets' samples, and a random sample of the pool."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from assay.corpus.errors import BadRow, ShardError
from assay.corpus.format import Chunk
from assay.corpus.named_files import files_named
from assay.corpus.readers import read
from assay.corpus.shards import Corpus, Shard
from assay.corpus.storage import Fingerprint, may_pass
from assay.engine.columns import for_shard, optional_columns
from assay.engine.groups import batches_of
from assay.methods.parts import Make, State
from assay.recipe.errors import EngineError
from assay.recipe.recipe import Recipe
from assay.recipe.tasks import Encoded, Encoder, without_columns

if TYPE_CHECKING:
    from assay.engine.fitting import Together

log = logging.getLogger("assay")

# A fit's parts: so many samples at least, for a state may be large, and so many parts at most.
PART_SAMPLES, MOST_PARTS = 256, 16


@dataclass(frozen=True)
class Batches:
    """Samples as batches of the recipe's task, collated anew each time they are gone through."""

    samples: Sequence[Encoded]
    encoder: Encoder
    recipe: Recipe
    together: Together | None = None
    """With whom parts are shared; None: with nobody."""

    def __iter__(self) -> Iterator[Any]:
        return batches_of(self.recipe, self.encoder, self.samples)

    def states(self, make: Make, given: State) -> Iterator[State]:
        """As ``methods.parts.states``, each part a range of samples."""
        size = max(PART_SAMPLES, -(-len(self.samples) // MOST_PARTS))
        if self.recipe.task.group_rows is not None:  # what is compared stays together
            size = max(1, len(self.samples))
        starts = range(0, max(1, len(self.samples)), size)

        def part(i: int) -> State:
            return make(replace(self, samples=self.samples[starts[i] : starts[i] + size]), starts[i])

        if self.together is None:
            return map(part, range(len(starts)))
        return self.together.states(len(starts), part, given)

    @property
    def plain(self) -> Batches:
        """Without the columns that are not the task's."""
        return replace(self, encoder=without_columns(self.encoder))


def corpus_fingerprint(corpus: Corpus, as_found: bool = False, images: str | None = None) -> str:
    """Changes with any shard's name, size, modification time or etag, as a score table's input does.

    Args:
        as_found: as the listing found the shards, where it tells, instead of by one more.
        images: the column in which rows may name files, which count as the shards do.
    """
    files = [shard.path for shard in corpus.shards if not (shard.is_folder or (as_found and shard.listed))]
    now = corpus.store.fingerprints(files) if files else {}
    digest = hashlib.sha256()
    for shard in corpus.shards:
        found = now[shard.path] if shard.path in now else _found(shard)
        facts: object = "not there" if found is None else sorted(found.to_json().items())
        digest.update(f"{shard.path}\0{facts}\n".encode())
    for path, named in corpus.store.fingerprints(_named(corpus, images)).items() if images is not None else ():
        facts = "not there" if named is None else sorted(named.to_json().items())
        digest.update(f"named\0{path}\0{facts}\n".encode("utf-8", "surrogatepass"))
    return f"sha256:{digest.hexdigest()}"


def _found(shard: Shard) -> Fingerprint | None:
    """As a listing found it, or as it is now; None if it is not there: reading it will say what is the matter."""
    try:
        return shard.as_found()
    except OSError as error:
        if may_pass(error):
            raise
        return None


def _named(corpus: Corpus, column: str) -> list[str]:
    """The files that rows name, of the shards that can be read: of the others whoever reads them will say so."""
    return sorted({path for shard in corpus.shards for path in _named_in(shard, column)})


def _named_in(shard: Shard, column: str) -> Iterator[str]:
    try:
        yield from files_named(shard, column)
    except (ShardError, OSError) as error:
        if may_pass(error.__cause__ or error):
            raise EngineError(f"{shard.path}: storage failed ({error}); run again") from error


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
                for row, result in encoded_rows(chunk, range(chunk.length), own):
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


def encoded_rows(chunk: Chunk, offsets: Sequence[int], encoder: Encoder) -> Iterator[tuple[int, Encoded | BadRow]]:
    """The chunk's rows at these offsets, with their number in the shard."""
    good = [i for i in offsets if i not in chunk.faults]
    values = [tuple(chunk.columns[name][i] for name in encoder.columns) for i in good]
    encoded: Mapping[int, Encoded | BadRow] = dict(zip(good, encoder.encode(values), strict=True))
    for i in offsets:
        yield chunk.first + i, encoded[i] if i in encoded else BadRow(chunk.faults[i])
