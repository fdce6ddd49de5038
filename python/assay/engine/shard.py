"""Scoring one shard: windows of rows in, a table, a quarantine list and perhaps features out."""

from __future__ import annotations

import tempfile
import time
from collections import Counter
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from itertools import pairwise
from typing import IO

from assay.corpus.errors import ShardError
from assay.corpus.footer import Footer, InputFacts, RowCounts
from assay.corpus.layout import table_path
from assay.corpus.named_files import NamedFiles, save_files
from assay.corpus.quarantine import QuarantineWriter, list_digest
from assay.corpus.readers import read, shard_errors
from assay.corpus.score_files import ScoreWriter
from assay.corpus.shards import Shard
from assay.corpus.storage import Fingerprint, Store
from assay.corpus.tables import count_nan
from assay.engine.ahead import read_ahead
from assay.engine.batches import score_samples
from assay.engine.groups import make_groups, score_groups
from assay.engine.kept_features import FeatureWriters, Scores, open_stored
from assay.engine.rows import Rejected, RowReader, Sample, StackedSamples
from assay.engine.timing import Times
from assay.engine.workshop import Workshop
from assay.methods import Scorer
from assay.recipe.errors import EngineError

WINDOW_ROWS = 4096
WINDOW_BYTES = 64 << 20
# No window crosses a multiple of so many rows, so that which windows there are does not depend on who scores them.
BLOCK_WINDOWS = 4
# What a row takes beside its encoded data, roughly.
_ROW_BYTES = 256


@dataclass(frozen=True)
class Share:
    """Part ``index`` of ``count`` of a shard: of its blocks of rows every ``count``-th, from that on."""

    index: int = 0
    count: int = 1

    def holds(self, row: int) -> bool:
        """Whether the row is in this part."""
        return self.count == 1 or _block(row) % self.count == self.index


def _block(row: int) -> int:
    return row // (BLOCK_WINDOWS * WINDOW_ROWS)


def _end_of_block(row: int) -> int:
    """The first row of the block after that of ``row``."""
    return (_block(row) + 1) * BLOCK_WINDOWS * WINDOW_ROWS


@dataclass(frozen=True)
class Window:
    """Rows after one another that are batched together: of one block, and how far into the shard they reach."""

    rows: StackedSamples | Sequence[Sample | Rejected]
    nbytes: int
    progress: float

    @property
    def samples(self) -> Sequence[Sample]:
        """Those that are to be scored."""
        if isinstance(self.rows, StackedSamples):
            return self.rows
        return [row for row in self.rows if isinstance(row, Sample)]

    @property
    def block(self) -> int:
        """The block that they are of."""
        return _block(self.rows[0].row)


@dataclass(frozen=True)
class Scored:
    """A window's rows that have scores, and those that have none, each in order."""

    window: Window
    rows: Sequence[int]
    ids: Sequence[str]
    scores: Scores
    rejected: Sequence[Rejected]


@dataclass(frozen=True)
class Source:
    """What was read: the shard, before and after, and the files that its rows name."""

    fingerprint: Fingerprint
    files: NamedFiles = field(default_factory=dict)

    def save(self, output: Store, shard: Shard, rows: int) -> InputFacts:
        """Write the list of files, if there are any -> what the footer says of a shard of so many rows."""
        files = save_files(output, shard, self.files)
        return InputFacts(path=shard.path, rows=rows, files=files, **vars(self.fingerprint))


def score_shard(
    workshop: Workshop,
    shard: Shard,
    output: Store,
    on_progress: Callable[[int, float], None] = lambda rows, progress: None,
) -> Footer:
    """Score a shard and write its table, its quarantine list and the features to be kept; returns the table's footer.

    A shard that cannot be read to its end, or that changes meanwhile, is a ShardError, and no table appears.
    """
    assert workshop.scorer is not None
    scorer, feature_methods = workshop.scorer.fresh(), workshop.feature_methods.values()
    with ExitStack() as spools:

        def spool() -> IO[bytes]:
            return spools.enter_context(tempfile.TemporaryFile())

        table = ScoreWriter(workshop.columns, spool())
        quarantine = QuarantineWriter(shard, spool())
        features = FeatureWriters(feature_methods, shard, spool)
        writers = _ShardWriters(table, quarantine, features)
        source = score_windows(workshop, scorer, shard, writers.record, on_progress, features.bytes_per_row)
        with workshop.times.measure("write"):
            facts = source.save(output, shard, writers.rows)
            counts, listed = writers.counts(), quarantine.save(output)
            footer = Footer.make(workshop.identity, facts, counts, listed, writers.nan, scorer.metadata())
            features.save(output, facts, footer.rows)
            table.save(output, table_path(shard), footer.to_json())
    return footer


def score_anew_or_stored(
    workshop: Workshop, shard: Shard, output: Store, on_progress: Callable[[int, float], None], anew: bool = False
) -> tuple[Footer, bool]:
    """Score a shard, from its stored features where that can be -> its table's footer, and whether it could.

    ``anew``: not from its features, which lack the rows that were quarantined.
    """
    stored = None if anew else score_stored(workshop, shard, output)
    if stored is None:
        return score_shard(workshop, shard, output, on_progress), False
    on_progress(stored.input.rows, 1.0)
    return stored, True


def score_windows(
    workshop: Workshop,
    scorer: Scorer,
    shard: Shard,
    record: Callable[[Scored], None],
    on_progress: Callable[[int, float], None] = lambda rows, progress: None,
    bytes_per_row: int = 0,
    wanted: Callable[[int], bool] | None = None,
) -> Source:
    """Score a shard, or some of its rows, window by window -> what was read, which is the same afterwards.

    Args:
        scorer: gathers what the methods find out.
        record: is called with every window in order.
        bytes_per_row: what scoring makes of a row, beside its scores.
        wanted: whether a row is to be scored, if not all are: of the others only their ids are looked at.

    Raises:
        ShardError: the shard cannot be read to its end, or has changed meanwhile.
        EngineError: a model or a method failed.
    """
    with shard_errors():
        before = shard.fingerprint()
    times, limits = workshop.times, workshop.recipe.batch
    reader = RowReader(shard, workshop.encoder, workshop.recipe.corpus.id_column)
    group = workshop.recipe.task.group_rows
    made = _windows(shard, reader, bytes_per_row, wanted, times)
    made = made if group is None else _whole_groups(made, group)
    with read_ahead(made, _size, WINDOW_BYTES, times) as windows:
        for window in windows:
            samples = window.samples
            try:
                if group is None:
                    scores, failed = score_samples(scorer, workshop.encoder, samples, limits, workshop.budget, times)
                else:
                    groups = make_groups([sample.row for sample in samples], window.rows[-1].row + 1, group)
                    scores, failed = score_groups(scorer, workshop.encoder, samples, groups, limits, times)
            except Exception as error:  # whatever a model or a method may raise
                where = f"{shard.path}, rows {window.rows[0].row} to {window.rows[-1].row}"
                raise EngineError(f"{where}: scoring failed: {type(error).__name__}: {error}") from error
            with times.measure("write"):
                record(_scored(window, samples, scores, failed))
            on_progress(len(window.rows), window.progress)
    on_progress(0, 1.0)
    times.model += scorer.model_seconds
    times.ops += scorer.method_seconds
    with shard_errors():
        if shard.fingerprint() != before:
            raise ShardError("changed while it was being scored; run again when nobody writes to it")
    return Source(before, reader.files)


def _size(window: Window) -> int:
    return window.nbytes + _ROW_BYTES * len(window.rows)


def _scored(window: Window, samples: Sequence[Sample], scores: Scores, failed: Mapping[int, str]) -> Scored:
    rejected = [] if samples is window.rows else [row for row in window.rows if isinstance(row, Rejected)]
    rejected += [Rejected(samples[i].row, samples[i].id, reason) for i, reason in failed.items()]
    kept = scores
    if failed:
        good = [i for i in range(len(samples)) if i not in failed]
        samples, kept = [samples[i] for i in good], {name: values[good] for name, values in scores.items()}
    if isinstance(samples, StackedSamples):
        return Scored(window, samples.rows, samples.ids, kept, [])
    rows, ids = [sample.row for sample in samples], [sample.id for sample in samples]
    return Scored(window, rows, ids, kept, sorted(rejected, key=lambda bad: bad.row))


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
        nan = {name: count_nan(values) for name, values in scores.items()}
        facts, rows = (first.metadata[key] for key in ("input", "rows"))
        metadata, listed = workshop.scorer.fresh().metadata(), list_digest(output, shard)
        footer = Footer.make(workshop.identity, InputFacts(**facts), RowCounts(**rows), listed, nan, metadata)
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

    def record(self, scored: Scored) -> None:
        """Book a window: the scores of its samples, the rows that have none."""
        for bad in scored.rejected:
            self._quarantine.add(bad.row, bad.id, bad.reason)
        kept = self._features.add(scored.rows, scored.ids, scored.scores)
        self._table.add(scored.rows, scored.ids, kept)
        self.nan.update({name: count_nan(values) for name, values in kept.items()})
        self.rows += len(scored.window.rows)

    def counts(self) -> RowCounts:
        """Rows scored and quarantined. They add up to the rows seen, or something is wrong with assay."""
        counts = RowCounts(scored=self._table.rows, quarantined=self._quarantine.count)
        if self.rows != counts.scored + counts.quarantined:
            raise EngineError(f"{self.rows} rows in, but {counts}; please report this as a bug in assay")
        return counts


def _windows(
    shard: Shard, reader: RowReader, bytes_per_row: int, wanted: Callable[[int], bool] | None, times: Times
) -> Generator[Window, None, None]:
    """The rows that are wanted, those of a few chunks at a time, and never of two blocks."""
    window = _WindowBuilder(bytes_per_row)
    with closing(read(shard, reader.columns, reader.optional, reader.names)) as chunks:
        while True:
            with times.measure("read"):
                chunk = next(chunks, None)
            if chunk is None:
                break
            began = time.perf_counter()
            rows = reader.rows(chunk, wanted)
            for piece in [rows] if isinstance(rows, StackedSamples) else rows:
                while (rest := window.add(piece)) is not None:
                    times.encode += time.perf_counter() - began
                    yield window.take(chunk.progress)
                    began = time.perf_counter()  # whoever took the window may have waited
                    piece = rest
            times.encode += time.perf_counter() - began
            if window.length >= WINDOW_ROWS or window.held >= WINDOW_BYTES:
                yield window.take(chunk.progress)
    if window.length:
        yield window.take(1.0)


class _WindowBuilder:
    """Rows as they gather."""

    def __init__(self, bytes_per_row: int) -> None:
        self.length = self.held = 0
        self._bytes_per_row = bytes_per_row
        self._end = 0
        self._pieces: list[StackedSamples | Sample | Rejected] = []

    def add(self, piece: StackedSamples | Sample | Rejected) -> StackedSamples | Sample | Rejected | None:
        """Take what fits in -> what does not."""
        row = piece.first if isinstance(piece, StackedSamples) else piece.row
        # By bytes within a chunk, too: a thousand paths of images become as many images.
        if self.length and (row >= self._end or self.held >= WINDOW_BYTES):
            return piece
        if not self.length:
            self._end = _end_of_block(row)
        if not isinstance(piece, StackedSamples):
            self._put(piece, 1, piece.encoded.nbytes + self._bytes_per_row if isinstance(piece, Sample) else 0)
            return None
        each = piece.encoded.nbytes + self._bytes_per_row
        room = min(self._end - row, -(-(WINDOW_BYTES - self.held) // max(1, each)), len(piece))
        self._put(piece.part(0, room), room, room * each)
        return piece.part(room, len(piece)) if room < len(piece) else None

    def _put(self, piece: StackedSamples | Sample | Rejected, rows: int, nbytes: int) -> None:
        self._pieces.append(piece)
        self.length += rows
        self.held += nbytes

    def take(self, progress: float) -> Window:
        """Its rows, which it has no longer."""
        pieces, held = self._pieces, self.held
        self._pieces, self.length, self.held = [], 0, 0
        stacks = [piece for piece in pieces if isinstance(piece, StackedSamples)]
        # Between two of them there may be rows that are not wanted.
        if len(stacks) == len(pieces) and all(one.rows.stop == other.first for one, other in pairwise(stacks)):
            return Window(StackedSamples.joined(stacks), held, progress)
        rows: list[Sample | Rejected] = []
        for piece in pieces:
            rows.extend(piece if isinstance(piece, StackedSamples) else [piece])
        return Window(rows, held, progress)


def _whole_groups(windows: Generator[Window, None, None], group: int) -> Generator[Window, None, None]:
    """A shard's rows in windows that begin where a group of rows does, the last of them with ``group`` rows or more
    unless the shard has fewer; see `assay.engine.groups`."""
    held: list[Sample | Rejected] = []
    with closing(windows):
        for window in windows:
            held += window.rows
            ready = (len(held) // group - 1) * group
            if ready > 0:
                yield _window(held[:ready], window.progress)
                held = held[ready:]
    if held:
        yield _window(held, 1.0)


def _window(rows: Sequence[Sample | Rejected], progress: float) -> Window:
    return Window(rows, sum(row.encoded.nbytes for row in rows if isinstance(row, Sample)), progress)
