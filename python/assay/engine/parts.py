"""Parts of a large shard: scored by several workers into staged files, and joined in the rows' order."""

from __future__ import annotations

import heapq
import json
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from assay._json import dumps
from assay.corpus.errors import ShardError
from assay.corpus.footer import Footer, Identity, RowCounts
from assay.corpus.layout import table_path
from assay.corpus.quarantine import QuarantineWriter
from assay.corpus.score_files import ScoreWriter
from assay.corpus.shards import Shard
from assay.corpus.storage import Fingerprint, Store
from assay.corpus.tables import ScoreColumn, count_nan, make_table, score_schema
from assay.engine import staging
from assay.engine.shard import Scored, Share, Source, score_windows
from assay.engine.workshop import Workshop
from assay.methods.base import samples_gathered
from assay.recipe.errors import EngineError

_KEY = b"assay"


@dataclass
class Part:
    """What a worker says of the part that it has staged."""

    path: str
    source: Source | None = None
    nan: Counter[str] = field(default_factory=Counter)
    metadata: Mapping[str, str] = field(default_factory=dict)
    first_scored: int = 0
    """How many samples of the shard's first block have scores."""
    blocks: int = 0


class PartsDiffer(Exception):
    """The parts do not tell what the methods found out about the whole: it has to be scored in one piece."""


def gathered(workshop: Workshop) -> int | None:
    """How many of a shard's first samples the methods' metadata speaks of; None if a shard cannot be scored in parts.

    It cannot where a method keeps its features or says something of all samples, nor where samples are compared in
    groups, which go on across blocks.
    """
    each = [samples_gathered(method) for method in workshop.methods]
    if workshop.feature_methods or workshop.recipe.task.group_rows is not None or any(count is None for count in each):
        return None
    return max((count for count in each if count is not None), default=0)


def score_part(workshop: Workshop, shard: Shard, share: Share, path: str, on_progress: Any) -> Part:
    """Score a share of a shard and stage what it gives in a new file; errors as of ``score_shard``.

    The file is a stream of Arrow record batches, one for each window, that hold the rows of the table to come. Their
    metadata is JSON: the window's first row, its number of rows, and those that have no score, with their reasons.
    """
    assert workshop.scorer is not None
    scorer, part = workshop.scorer.fresh(), Part(path)
    blocks = set()
    with staging.new(path) as file, pa.ipc.new_stream(file, score_schema(workshop.columns, {})) as stream:

        def record(scored: Scored) -> None:
            table = make_table(scored.rows, scored.ids, scored.scores, workshop.columns, {})
            (batch,) = table.to_batches() or [pa.RecordBatch.from_pylist([], table.schema)]
            rejected = [(bad.row, bad.id, bad.reason) for bad in scored.rejected]
            facts = {"first": scored.window.rows[0].row, "rows": len(scored.window.rows), "rejected": rejected}
            stream.write_batch(batch, custom_metadata={_KEY: dumps(facts).encode()})
            part.nan.update({name: count_nan(values) for name, values in scored.scores.items()})
            part.first_scored += table.num_rows if scored.window.block == 0 else 0
            blocks.add(scored.window.block)

        part.source = score_windows(workshop, scorer, shard, record, on_progress, wanted=share.holds)
    part.metadata, part.blocks = scorer.metadata(), len(blocks)
    return part


def join_parts(
    parts: Sequence[Part],
    identity: Identity,
    columns: Sequence[ScoreColumn],
    gathers: int,
    shard: Shard,
    output: Store,
) -> Footer:
    """Write a shard's table and quarantine list from all its parts, in their order -> the table's footer.

    Byte for byte what ``score_shard`` writes.

    Raises:
        ShardError: the shard has changed between the parts.
        PartsDiffer: its first block holds fewer samples than the methods wanted to gather, and there are others.
    """
    source = _same_source([part.source for part in parts])
    if parts[0].first_scored < gathers and sum(part.blocks for part in parts) > 1:
        raise PartsDiffer
    nan: Counter[str] = Counter()
    for part in parts:
        nan.update(part.nan)
    with tempfile.TemporaryFile() as spool, tempfile.TemporaryFile() as list_spool:
        table, quarantine, rows = ScoreWriter(columns, spool), QuarantineWriter(shard, list_spool), 0
        for first, count, rejected, batch in heapq.merge(*map(_windows, parts), key=lambda window: window[0]):
            if first != rows or count != batch.num_rows + len(rejected):
                raise EngineError(f"{shard.path}: row {rows} is followed by {first}; please report this as a bug")
            for row, sample_id, reason in rejected:
                quarantine.add(row, sample_id, reason)
            table.add_batch(batch)
            rows += count
        counts = RowCounts(scored=table.rows, quarantined=quarantine.count)
        facts = source.save(output, shard, rows)
        listed = quarantine.save(output)
        footer = Footer.make(identity, facts, counts, listed, nan, parts[0].metadata)
        table.save(output, table_path(shard), footer.to_json())
    return footer


def _same_source(sources: Sequence[Source | None]) -> Source:
    """The shard that all parts were read from, with the files that each of them named. ShardError if it has changed."""
    files: dict[str, Fingerprint | None] = {}
    first = sources[0]
    for source in sources:
        assert first is not None
        assert source is not None
        known = {name: found for name, found in files.items() if name in source.files}
        if source.fingerprint != first.fingerprint or any(source.files[name] != at for name, at in known.items()):
            raise ShardError("changed while it was being scored; run again when nobody writes to it")
        files |= source.files
    assert first is not None
    return Source(first.fingerprint, files)


def _windows(part: Part) -> Iterator[tuple[int, int, list[Any], pa.RecordBatch]]:
    with staging.opened(part.path) as file, pa.ipc.open_stream(file) as reader:
        while True:
            try:
                batch, metadata = reader.read_next_batch_with_custom_metadata()
            except StopIteration:
                return
            facts = json.loads(metadata[_KEY])
            yield facts["first"], facts["rows"], facts["rejected"], batch
