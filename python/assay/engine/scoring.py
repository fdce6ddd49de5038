"""Scoring one shard: windows of rows, sorted by length, in batches under a budget, back in row order."""

from __future__ import annotations

import gc
import tempfile
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import IO, Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from assay.corpus.errors import ShardError
from assay.corpus.quarantine import QuarantineWriter
from assay.corpus.readers import read, shard_errors
from assay.corpus.score_files import ScoreWriter
from assay.corpus.shards import Shard, find_shards
from assay.corpus.storage import Store
from assay.engine.errors import EngineError
from assay.engine.fitting import Batches, draw_samples, read_target
from assay.engine.footer import Footer, Identity, InputFacts, RowCounts
from assay.engine.recipe import BatchSpec, Recipe
from assay.engine.samples import Encoded, Encoder, Rejected, RowReader, Sample
from assay.engine.stored_features import FeatureColumn, FeatureWriters, Keeper, Scores, open_stored
from assay.engine.targeted import CheckpointsSpec, FittedMethod, TargetedSpec
from assay.methods import Column, Method, Scorer
from assay.methods.scorer import all_columns
from assay.tasks import Task

WINDOW_ROWS = 4096
WINDOW_BYTES = 64 << 20


class BatchScorer(Protocol):
    """Batch in, one tensor per column out; `assay.methods.Scorer` is one."""

    columns: list[Column]

    def __call__(self, batch: Any) -> Mapping[str, Tensor]: ...


@dataclass(frozen=True)
class Workshop:
    """Everything that a recipe's shards are scored with, loaded once."""

    recipe: Recipe
    identity: Identity
    task: Task
    models: Mapping[str, nn.Module]
    encoder: Encoder
    fitted: Mapping[int, Method]
    """The methods that are fitted before they score, by their place in the recipe: one fit serves all shards."""
    ready: bool = True
    """Whether they have been fitted."""

    def methods(self) -> list[Method]:
        """The recipe's methods, fresh: what they gather (a correlation, a warning) is about one shard."""
        torch.manual_seed(self.recipe.seed)
        return [
            self.fitted[i] if i in self.fitted else spec.build(self.models, self.task, self.recipe.seed)
            for i, spec in enumerate(self.recipe.methods)
        ]

    def keepers(self) -> dict[int, Keeper]:
        """The methods that keep their features, by their place in the recipe."""
        return {
            i: Keeper(self.fitted[i], spec, self.recipe, self.identity)
            for i, spec in enumerate(self.recipe.methods)
            if isinstance(spec, CheckpointsSpec) and spec.keep_features is not None
        }

    def columns(self) -> list[Column]:
        """The columns of every table. An EngineError if the methods refuse the models, or one another."""
        try:
            methods = self.methods()
            # It taps the models, which may be refused too.
            Scorer([method for i, method in enumerate(methods) if self.ready or i not in self.fitted])
            self.keepers()
            return all_columns(methods)
        except (ValueError, TypeError) as error:
            raise EngineError(f"methods: {error}") from error


def open_workshop(recipe: Recipe, identity: Identity, fit: bool = True) -> Workshop:
    """Load a recipe's models, check that they, the task and the methods fit together, and ``fit`` the methods that
    look at targets or at the pool."""
    task = recipe.task.task()
    loaded = {name: (spec, spec.build()) for name, spec in recipe.models_used.items()}
    encoder = recipe.task.encoder(loaded)
    models = {name: model for name, (_, model) in loaded.items()}
    fitted = _prepare(recipe, models, task, encoder)
    workshop = Workshop(recipe, identity, task, models, encoder, fitted, ready=False)
    workshop.columns()  # what can be refused before the work of fitting, is
    if fit and fitted:
        _fit(recipe, fitted, encoder)
    workshop = replace(workshop, ready=fit)
    workshop.columns()
    return workshop


def _prepare(recipe: Recipe, models: Mapping[str, nn.Module], task: Task, encoder: Encoder) -> dict[int, FittedMethod]:
    """The methods to be fitted, with their targets; each target is read once, whoever wants it."""
    split = partial(make_batches, limits=recipe.batch)
    targets: dict[str, Batches] = {}
    for name, target in recipe.targets_used.items():
        targets[name] = Batches(read_target(name, find_shards(target.path), encoder), encoder, split)
    methods = {}
    for i, spec in enumerate(recipe.methods):
        if isinstance(spec, TargetedSpec):
            own = {name: targets[name] for name in spec.targets_of(recipe.targets)}
            with _refusals(i, spec.method):
                methods[i] = spec.build_fitted(models, task, recipe.seed, own)
    return methods


def _fit(recipe: Recipe, methods: Mapping[int, FittedMethod], encoder: Encoder) -> None:
    drawn: list[Encoded] = []
    if recipe.uses_pool:
        corpus = find_shards(recipe.fit.path or recipe.corpus.path)
        drawn = draw_samples(corpus, encoder, recipe.fit.samples, recipe.seed)
    pool = Batches(drawn, encoder, partial(make_batches, limits=recipe.batch))
    for i, method in methods.items():
        torch.manual_seed(recipe.seed)  # labels may be drawn from the model
        with _refusals(i, recipe.methods[i].method):
            method.fit(pool)


@contextmanager
def _refusals(i: int, method: str) -> Iterator[None]:
    try:
        yield
    except EngineError:
        raise
    except Exception as error:  # whatever a model or a method may raise
        if is_out_of_memory(error):
            raise EngineError(
                f"methods.{i} ({method}): ran out of memory; take a smaller sketch or batch ({error})"
            ) from error
        what = str(error) if isinstance(error, ValueError | TypeError) else f"{type(error).__name__}: {error}"
        raise EngineError(f"methods.{i} ({method}): {what}") from error


def score_shard(
    workshop: Workshop,
    shard: Shard,
    output: Store,
    version: str,
    on_progress: Callable[[int, float], None] = lambda rows, progress: None,
    verify: bool = True,
) -> Footer:
    """Score a shard and write its table, its quarantine list and the features to be kept; returns the table's footer.

    A shard that cannot be read to its end, or that changes meanwhile, is a ShardError, and no table appears.
    """
    with shard_errors():
        before = shard.fingerprint()
    reader = RowReader(shard, workshop.encoder, workshop.recipe.corpus.id_column)
    methods, keepers = workshop.methods(), workshop.keepers()
    scorer = Scorer([keepers.get(i, method) for i, method in enumerate(methods)], verify=verify)
    with ExitStack() as spools:

        def spool() -> IO[bytes]:
            return spools.enter_context(tempfile.TemporaryFile())

        table = ScoreWriter(all_columns(methods), spool())
        quarantine = QuarantineWriter(shard, spool())
        features = FeatureWriters(keepers.values(), shard, spool)
        ledger = _Ledger(table, quarantine, features)
        for window, progress in _windows(shard, reader, features.bytes_per_row):
            samples = [row for row in window if isinstance(row, Sample)]
            try:
                scores, failed = score_samples(scorer, workshop.encoder, samples, workshop.recipe.batch)
            except Exception as error:  # whatever a model or a method may raise
                where = f"{shard.path}, rows {window[0].row} to {window[-1].row}"
                raise EngineError(f"{where}: scoring failed: {type(error).__name__}: {error}") from error
            ledger.record(window, samples, scores, failed)
            on_progress(len(window), progress)
        with shard_errors():
            if shard.fingerprint() != before:
                raise ShardError("changed while it was being scored; run again when nobody writes to it")
        facts = InputFacts(path=shard.path, rows=ledger.rows, **vars(before))
        footer = Footer.make(workshop.identity, version, facts, ledger.counts(), ledger.nan, scorer.metadata())
        quarantine.save(output)
        features.save(output, version, facts, footer.rows)
        table.save(output, shard.table, footer.to_json())
    return footer


def score_stored(workshop: Workshop, shard: Shard, output: Store, version: str) -> Footer | None:
    """Score a shard from the features that an earlier run stored, and write its table; no model runs.

    None if that cannot be: a method keeps no features, or a shard's are not there, or not those of this run.
    """
    methods, keepers = workshop.methods(), workshop.keepers()
    if not keepers:
        return None
    with shard_errors():
        fingerprint = shard.fingerprint()
    files = open_stored(keepers.values(), shard, fingerprint, output)
    if files is None or len(keepers) < len(methods):
        return None
    scores: Scores = {}
    for keeper in keepers.values():
        scores |= keeper.stored_scores(files[keeper.name])
    first = files[keepers[0].name][0]
    with tempfile.TemporaryFile() as spool:
        table = ScoreWriter(all_columns(methods), spool)
        for batch in first.batches():
            part = slice(table.rows, table.rows + len(batch.rows))
            table.add(batch.rows, batch.ids.to_pylist(), {name: values[part] for name, values in scores.items()})
        nan = {name: int(np.isnan(values).sum()) for name, values in scores.items()}
        facts, rows = (first.metadata[key] for key in ("input", "rows"))
        metadata = Scorer(methods, verify=False).metadata()
        footer = Footer.make(workshop.identity, version, InputFacts(**facts), RowCounts(**rows), nan, metadata)
        table.save(output, shard.table, footer.to_json())
    return footer


class _Ledger:
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


def score_samples(
    scorer: BatchScorer, encoder: Encoder, samples: Sequence[Sample], limits: BatchSpec
) -> tuple[Scores, dict[int, str]]:
    """One score per sample and column, in the samples' order, and the samples that did not fit into memory.

    A batch that runs out of memory is halved until it passes; a sample that fails on its own is listed with
    its reason, and its scores are NaN.
    """
    widths = {c.name: (c.width,) if isinstance(c, FeatureColumn) else () for c in scorer.columns}
    scores: Scores = {name: np.full((len(samples), *width), np.nan, np.float32) for name, width in widths.items()}
    failed: dict[int, str] = {}
    waiting = deque(make_batches([sample.encoded.length for sample in samples], limits))
    while waiting:
        batch = waiting.popleft()
        result = _unless_out_of_memory(scorer, encoder, [samples[i] for i in batch])
        if result is not None:
            for name, values in result.items():
                if values.shape != (len(batch), *widths[name]):
                    raise ValueError(f"{name}: {tuple(values.shape)} scores for a batch of {len(batch)} samples")
                scores[name][batch] = values.numpy()
        elif len(batch) == 1:
            failed[batch[0]] = f"ran out of memory on its own, at length {samples[batch[0]].encoded.length}"
        else:
            middle = len(batch) // 2
            waiting.extendleft([batch[middle:], batch[:middle]])
    return scores, failed


def make_batches(lengths: Sequence[int], limits: BatchSpec) -> list[list[int]]:
    """Positions in batches of like lengths, longest first, within the limits of samples and padded tokens.

    A sample beyond the token budget is a batch of its own.
    """
    batches: list[list[int]] = []
    longest = 0
    for position in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        batch = batches[-1] if batches else None
        if batch is None or len(batch) == limits.samples or longest * (len(batch) + 1) > limits.tokens:
            batches.append([position])
            longest = lengths[position]
        else:
            batch.append(position)
    return batches


def _unless_out_of_memory(
    scorer: BatchScorer, encoder: Encoder, samples: Sequence[Sample]
) -> Mapping[str, Tensor] | None:
    try:
        return scorer(encoder.collate([sample.encoded.data for sample in samples]))
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
    # Out of the except block the traceback no longer holds the tensors of the failed attempt.
    gc.collect()
    return None


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out; torch's CPU allocator says so only in words."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    words = ("not enough memory", "DefaultCPUAllocator", "out of memory")
    return isinstance(error, RuntimeError) and any(word in str(error) for word in words)
