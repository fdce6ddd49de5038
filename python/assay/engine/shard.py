"""Scoring one shard: windows of rows in, a table, a quarantine list and perhaps features out."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import IO

import numpy as np

from assay.corpus.errors import ShardError
from assay.corpus.footer import Footer, InputFacts, RowCounts
from assay.corpus.layout import table_path
from assay.corpus.quarantine import QuarantineWriter
from assay.corpus.readers import read, shard_errors
from assay.corpus.score_files import ScoreWriter
from assay.corpus.shards import Shard
from assay.corpus.storage import Store
from assay.engine.batches import score_samples
from assay.engine.kept_features import FeatureWriters, Scores, open_stored
from assay.engine.rows import Rejected, RowReader, Sample
from assay.engine.workshop import Workshop
from assay.recipe.errors import EngineError

WINDOW_ROWS = 4096
WINDOW_BYTES = 64 << 20


def score_shard(
    workshop: Workshop,
    shard: Shard,
    output: Store,
    on_progress: Callable[[int, float], None] = lambda rows, progress: None,
) -> Footer:
    """Score a shard and write its table, its quarantine list and the features to be kept; returns the table's footer.

    A shard that cannot be read to its end, or that changes meanwhile, is a ShardError, and no table appears.
    """
    with shard_errors():
        before = shard.fingerprint()
    reader = RowReader(shard, workshop.encoder, workshop.recipe.corpus.id_column)
    assert workshop.scorer is not None
    scorer, feature_methods = workshop.scorer.fresh(), workshop.feature_methods.values()
    with ExitStack() as spools:

        def spool() -> IO[bytes]:
            return spools.enter_context(tempfile.TemporaryFile())

        table = ScoreWriter(workshop.columns, spool())
        quarantine = QuarantineWriter(shard, spool())
        features = FeatureWriters(feature_methods, shard, spool)
        writers = _ShardWriters(table, quarantine, features)
        for window, progress in _windows(shard, reader, features.bytes_per_row):
            samples = [row for row in window if isinstance(row, Sample)]
            try:
                scores, failed = score_samples(scorer, workshop.encoder, samples, workshop.recipe.batch)
            except Exception as error:  # whatever a model or a method may raise
                where = f"{shard.path}, rows {window[0].row} to {window[-1].row}"
                raise EngineError(f"{where}: scoring failed: {type(error).__name__}: {error}") from error
            writers.record(window, samples, scores, failed)
            on_progress(len(window), progress)
        with shard_errors():
            if shard.fingerprint() != before:
                raise ShardError("changed while it was being scored; run again when nobody writes to it")
        facts = InputFacts(path=shard.path, rows=writers.rows, **vars(before))
        footer = Footer.make(workshop.identity, facts, writers.counts(), writers.nan, scorer.metadata())
        quarantine.save(output)
        features.save(output, facts, footer.rows)
        table.save(output, table_path(shard), footer.to_json())
    return footer


def score_stored(workshop: Workshop, shard: Shard, output: Store) -> Footer | None:
    """Score a shard from the features that an earlier run stored, and write its table; no model runs.

    None if that cannot be: a method keeps no features, or a shard's are not there, or not those of this run.
    """
    feature_methods = workshop.feature_methods
    if not feature_methods or workshop.scorer is None:
        return None
    with shard_errors():
        fingerprint = shard.fingerprint()
    files = open_stored(feature_methods.values(), shard, fingerprint, output)
    if files is None or len(feature_methods) < len(workshop.methods):
        return None
    scores: Scores = {}
    for method in feature_methods.values():
        scores |= method.stored_scores(files[method.name])
    first = files[feature_methods[0].name][0]
    with tempfile.TemporaryFile() as spool:
        table = ScoreWriter(workshop.columns, spool)
        for batch in first.batches():
            part = slice(table.rows, table.rows + len(batch.rows))
            table.add(batch.rows, batch.ids.to_pylist(), {name: values[part] for name, values in scores.items()})
        nan = {name: int(np.isnan(values).sum()) for name, values in scores.items()}
        facts, rows = (first.metadata[key] for key in ("input", "rows"))
        metadata = workshop.scorer.fresh().metadata()
        footer = Footer.make(workshop.identity, InputFacts(**facts), RowCounts(**rows), nan, metadata)
        table.save(output, table_path(shard), footer.to_json())
    return footer


class _ShardWriters:
    """Where a shard's rows end up: every one of them in the table or in quarantine."""

    def __init__(self, table: ScoreWriter, quarantine: QuarantineWriter, features: FeatureWriters) -> None:
        self.rows = 0
        self.nan: Counter[str] = Counter()
        self._table = table
        self._quarantine = quarantine
        self._features = features

    def record(
        self,
        window: Sequence[Sample | Rejected],
        samples: Sequence[Sample],
        scores: Scores,
        failed: Mapping[int, str],
    ) -> None:
        """Book a window: the scores of its samples, the samples that failed, the rows that never were any."""
        rejected = [row for row in window if isinstance(row, Rejected)]
        rejected += [Rejected(samples[i].row, samples[i].id, reason) for i, reason in failed.items()]
        for bad in sorted(rejected, key=lambda bad: bad.row):
            self._quarantine.add(bad.row, bad.id, bad.reason)
        good = [i for i in range(len(samples)) if i not in failed]
        rows, ids = [samples[i].row for i in good], [samples[i].id for i in good]
        kept = self._features.add(rows, ids, {name: values[good] for name, values in scores.items()})
        self._table.add(rows, ids, kept)
        self.nan.update({name: int(np.isnan(values).sum()) for name, values in kept.items()})
        self.rows += len(window)

    def counts(self) -> RowCounts:
        """Rows scored and quarantined. They add up to the rows seen, or something is wrong with assay."""
        counts = RowCounts(scored=self._table.rows, quarantined=self._quarantine.count)
        if self.rows != counts.scored + counts.quarantined:
            raise EngineError(f"{self.rows} rows in, but {counts}; please report this as a bug in assay")
        return counts


def _windows(shard: Shard, reader: RowReader, bytes_per_row: int) -> Iterator[tuple[list[Sample | Rejected], float]]:
    """Rows of a few chunks; ``bytes_per_row`` is what scoring makes of one, beside its scores."""
    window: list[Sample | Rejected] = []
    held = 0
    for chunk in read(shard, reader.columns):
        for row in reader.rows(chunk):
            window.append(row)
            held += row.encoded.nbytes + bytes_per_row if isinstance(row, Sample) else 0
        if len(window) >= WINDOW_ROWS or held >= WINDOW_BYTES:
            yield window, chunk.progress
            window, held = [], 0
    yield window, 1.0
