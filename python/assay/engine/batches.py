"""Samples in batches under a budget, by length and halved where memory runs out; scores in the samples' order."""

from __future__ import annotations

import gc
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from assay.engine.kept_features import Scores
from assay.engine.rows import Sample, StackedSamples
from assay.engine.timing import Times
from assay.methods import Column
from assay.probe.quiet import is_out_of_memory
from assay.recipe.library_calls import memory_limits, unbounded_memory
from assay.recipe.recipe import BatchSpec
from assay.recipe.tasks import Encoded, Encoder, OwnShapes, Stacks


class BatchScorer(Protocol):
    """Batch in, one tensor per column out; `assay.methods.Scorer` is one."""

    columns: list[Column]

    def __call__(self, batch: Any) -> Mapping[str, Tensor]: ...


class Budget:
    """How many padded tokens a batch may have: as many as the recipe says, and less where memory has run out.

    What halving has found is remembered for the batches to come. It doubles again after a number of batches that
    passed, which doubles itself whenever that was too early: for what fits depends on more than the tokens.
    """

    def __init__(self, most: int) -> None:
        self.tokens = self._most = most
        self._passed, self._needed, self._grown = 0, 16, False

    def ran_out(self, padded: int) -> None:
        """Memory did not suffice for a batch of so many tokens."""
        if self._grown:
            self._needed = min(2 * self._needed, 1024)
        self.tokens, self._passed, self._grown = max(1, min(self.tokens, padded) // 2), 0, False

    def passed(self) -> None:
        """It did for a batch within the budget."""
        self._passed += self.tokens < self._most
        if self._passed >= self._needed:
            self.tokens, self._passed, self._grown = min(2 * self.tokens, self._most), 0, True


def score_samples(
    scorer: BatchScorer,
    encoder: Encoder,
    samples: Sequence[Sample],
    limits: BatchSpec,
    budget: Budget | None = None,
    times: Times | None = None,
) -> tuple[Scores, dict[int, str]]:
    """One score per sample and column, in the samples' order, and the samples that did not fit into memory.

    A batch that is beyond the ``budget``, or runs out of memory, is halved until it passes; a sample that fails on its
    own is listed with its reason, and its scores are NaN.
    """
    budget, times = budget or Budget(limits.tokens), times or Times()
    columns = {column.name: column for column in scorer.columns}
    scores = empty_scores(scorer.columns, len(samples))
    failed: dict[int, str] = {}
    waiting = deque(_batches(samples, limits))
    while waiting:
        batch = waiting.popleft()
        padded = len(batch) * max(_lengths(samples, batch))
        result = None
        if len(batch) == 1 or padded <= budget.tokens:
            try:
                result = unless_out_of_memory(scorer, partial(_collate, encoder), _part(samples, batch), times)
            except Exception:
                misfit = why_misfit(encoder, samples[batch[0]])  # of all of them, which are of one shape
                if misfit is None:
                    raise
                failed |= dict.fromkeys(batch, misfit)
                continue
            if result is not None:
                budget.passed()
            elif len(batch) > 1:
                budget.ran_out(padded)
        if result is not None:
            places = np.array(batch)
            for name, values in result.items():
                lengths = _lengths(samples, batch) if columns[name].width is None else []
                _put(scores[name], columns[name], places, values.numpy(), lengths)
        elif len(batch) == 1:
            failed[batch[0]] = f"ran out of memory on its own, at length {samples[batch[0]].encoded.length}"
        else:
            middle = len(batch) // 2
            waiting.extendleft([batch[middle:], batch[:middle]])
    return scores, failed


def _batches(samples: Sequence[Sample], limits: BatchSpec) -> list[list[int]]:
    """As ``make_batches``, where it is told of each sample."""
    if not isinstance(samples, StackedSamples):
        return make_batches([sample.encoded for sample in samples], limits)
    most = max(1, min(limits.samples, limits.tokens))
    return [list(range(start, min(start + most, len(samples)))) for start in range(0, len(samples), most)]


def _lengths(samples: Sequence[Sample], batch: Sequence[int]) -> list[int]:
    return [1] * len(batch) if isinstance(samples, StackedSamples) else [samples[i].encoded.length for i in batch]


def _part(samples: Sequence[Sample], batch: Sequence[int]) -> Sequence[Sample]:
    return samples.part(batch[0], batch[-1] + 1) if isinstance(samples, StackedSamples) else [samples[i] for i in batch]


def _collate(encoder: Encoder, samples: Sequence[Sample]) -> Any:
    if isinstance(samples, StackedSamples):
        assert isinstance(encoder, Stacks)
        return encoder.collate_stacked(samples.encoded)
    return encoder.collate([sample.encoded.data for sample in samples])


def empty_scores(columns: Sequence[Column], count: int) -> Scores:
    """NaN for every sample and column; of a number per token an empty array."""
    return {column.name: _no_scores(column, count) for column in columns}


def _no_scores(column: Column, count: int) -> npt.NDArray[Any]:
    """NaN for every sample; of a number per token an empty array."""
    if column.width is None:
        empty = np.empty(count, object)
        empty[:] = [np.empty(0, np.float32)] * count
        return empty
    return np.full((count,) if column.width == 1 else (count, column.width), np.nan, np.float32)


def _put(
    scores: npt.NDArray[Any],
    column: Column,
    batch: npt.NDArray[np.int64],
    values: npt.NDArray[Any],
    lengths: Sequence[int],
) -> None:
    """A batch's scores at its samples' places; of a number per token without those of padding."""
    per_token = (len(batch), max(lengths, default=0))
    if values.shape != (per_token if column.width is None else (len(batch), *scores.shape[1:])):
        raise ValueError(f"{column.name}: {values.shape} scores for a batch of {len(batch)} samples")
    if column.width is not None:
        scores[batch] = values
        return
    for i, row, length in zip(batch, values, lengths, strict=True):
        scores[i] = row[:length].copy()  # a view would hold the whole batch's


def make_batches(samples: Sequence[Encoded], limits: BatchSpec) -> list[list[int]]:
    """Positions in batches of one shape and like lengths, longest first, within the limits of samples and tokens.

    A sample beyond the token budget is a batch of its own.
    """
    batches: list[list[int]] = []
    first: Encoded | None = None
    keys = [(-sample.length, sample.shape) for sample in samples]
    for i in sorted(range(len(samples)), key=keys.__getitem__):
        own, batch = samples[i], batches[-1] if batches else []
        is_full = len(batch) == limits.samples or (first and first.length * (len(batch) + 1) > limits.tokens)
        if first is None or is_full or own.shape != first.shape:
            batches.append([i])
            first = own
        else:
            batch.append(i)
    return batches


def why_misfit(encoder: Encoder, sample: Sample) -> str | None:
    """Why a batch with this sample has failed, if models cannot be run on samples of its shape."""
    found = encoder.misfit(sample.encoded.data) if isinstance(encoder, OwnShapes) else None
    return None if found is None else str(found)


def unless_out_of_memory(
    scorer: BatchScorer, collate: Callable[[Sequence[Sample]], Any], samples: Sequence[Sample], times: Times
) -> Mapping[str, Tensor] | None:
    """The scores of a batch; None if memory runs out."""
    before = memory_limits()
    result = _scores(scorer, collate, samples, times)
    if result is None and len(samples) == 1 and (before % 2 or memory_limits() != before):
        with unbounded_memory():  # a row that was encoded meanwhile had bounded the whole process
            result = _scores(scorer, collate, samples, times)
    return result


def _scores(
    scorer: BatchScorer, collate: Callable[[Sequence[Sample]], Any], samples: Sequence[Sample], times: Times
) -> Mapping[str, Tensor] | None:
    try:
        with times.measure("collate"):
            batch = collate(samples)
        return scorer(batch)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
    # Out of the except block the traceback no longer holds the tensors of the failed attempt.
    gc.unfreeze()  # see `assay.engine.workshop.settled`
    gc.collect()
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.empty_cache()  # what is cached in pieces of the failed batch's sizes may not serve a smaller one
    return None
