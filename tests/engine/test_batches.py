"""Batches, windows and memory: none of them changes what a row's score is, or loses one."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from assay.engine.batches import Budget, is_out_of_memory, make_batches, score_samples
from assay.engine.rows import Sample
from assay.methods import Column
from assay.recipe.library_calls import bounded_memory
from assay.recipe.recipe import BatchSpec
from assay.recipe.tasks import Encoded

NO_MEMORY = RuntimeError("DefaultCPUAllocator: not enough memory")


@pytest.fixture(autouse=True, scope="module")
def _no_garbage_collection():
    """Halving collects garbage, a third of a second each time in a process as big as a test session's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("assay.engine.batches.gc.collect", lambda: None)
        yield


class Halves:
    """A scorer and encoder over plain numbers: the score of x is x / 2, unless the batch is too big."""

    columns = (Column("half", "high", "x / 2"),)

    def __init__(self, capacity=math.inf, error=NO_MEMORY, cursed=()):
        self.capacity, self.error, self.cursed = capacity, error, cursed
        self.sizes = []

    def collate(self, data):
        return torch.tensor(data, dtype=torch.float32)

    def __call__(self, batch):
        self.sizes.append(len(batch))
        if len(batch) > self.capacity or any(x in self.cursed for x in batch.tolist()):
            raise self.error
        return {"half": batch / 2}


def samples_of(lengths) -> list[Sample]:
    return [Sample(i, str(i), Encoded(float(i), length, 4)) for i, length in enumerate(lengths)]


@given(st.lists(st.integers(1, 100), max_size=60), st.integers(1, 300), st.integers(1, 20))
def test_batches_hold_every_row_once_within_their_limits(lengths, tokens, count):
    samples = [sample.encoded for sample in samples_of(lengths)]
    batches = make_batches(samples, BatchSpec(tokens=tokens, samples=count))
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    for batch in batches:
        longest = max(lengths[i] for i in batch)
        assert len(batch) <= count
        assert len(batch) == 1 or longest * len(batch) <= tokens
        assert lengths[batch[0]] == longest  # so the batch most likely not to fit comes first
    assert batches == make_batches(samples, BatchSpec(tokens=tokens, samples=count))


@given(st.lists(st.tuples(st.integers(1, 3), st.integers(1, 9)), max_size=40), st.integers(1, 60))
def test_samples_of_different_shapes_share_no_batch(shapes, tokens):
    samples = [Encoded(0.0, height * width, 4, (height, width)) for height, width in shapes]
    batches = make_batches(samples, BatchSpec(tokens=tokens))
    assert sorted(i for batch in batches for i in batch) == list(range(len(samples)))
    for batch in batches:
        assert len({samples[i].shape for i in batch}) == 1
        assert len(batch) == 1 or sum(samples[i].length for i in batch) <= tokens
    if tokens >= sum(sample.length for sample in samples):
        assert len(batches) == len(set(shapes))


def test_sorting_by_length_saves_padding():
    lengths = [1, 100] * 50
    batches = make_batches([sample.encoded for sample in samples_of(lengths)], BatchSpec(tokens=1000, samples=100))
    padded = sum(max(lengths[i] for i in batch) * len(batch) for batch in batches)
    assert padded < 1.2 * sum(lengths)


@given(st.lists(st.integers(1, 9), max_size=40), st.integers(1, 6))
def test_a_batch_too_big_is_halved_until_it_fits(lengths, capacity):
    scorer = Halves(capacity)
    scores, failed = score_samples(scorer, scorer, samples_of(lengths), BatchSpec(samples=16))
    np.testing.assert_array_equal(scores["half"], np.arange(len(lengths)) / 2)
    assert failed == {}


@pytest.mark.parametrize("error", [MemoryError(), torch.OutOfMemoryError("CUDA"), RuntimeError("out of memory")])
def test_a_row_that_never_fits_is_listed_and_the_rest_is_scored(error):
    scorer = Halves(error=error, cursed=(3.0, 7.0))
    scores, failed = score_samples(scorer, scorer, samples_of([5] * 20), BatchSpec(samples=8))
    assert set(failed) == {3, 7}
    assert failed[3] == "ran out of memory on its own, at length 5"
    good = np.setdiff1d(np.arange(20), [3, 7])
    np.testing.assert_array_equal(scores["half"][good], good / 2)
    assert np.isnan(scores["half"][[3, 7]]).all()


class Interrupted(Halves):
    """While it works, another thread bounds the process's memory for a moment, and the first time it feels it."""

    def __call__(self, batch):
        if not self.sizes:
            self.sizes.append(len(batch))
            with bounded_memory(1 << 30):
                raise MemoryError
        return super().__call__(batch)


def test_memory_that_ran_out_while_another_thread_bounded_it_is_tried_again():
    own = Interrupted()
    scores, failed = score_samples(own, own, samples_of([3]), BatchSpec())
    assert (scores["half"].tolist(), failed, own.sizes) == ([0.0], {}, [1, 1])
    own = Interrupted(capacity=0)
    scores, failed = score_samples(own, own, samples_of([3]), BatchSpec())
    assert (list(failed), own.sizes) == ([0], [1, 1])
    own = Halves(capacity=0)
    score_samples(own, own, samples_of([3]), BatchSpec())
    assert own.sizes == [1]


def test_other_errors_are_not_taken_for_memory():
    scorer = Halves(capacity=0, error=RuntimeError("shapes differ"))
    with pytest.raises(RuntimeError, match="shapes differ"):
        score_samples(scorer, scorer, samples_of([1, 1]), BatchSpec())
    assert scorer.sizes == [2]
    assert not is_out_of_memory(ValueError("out of memory"))
    for said in ("CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"):
        assert is_out_of_memory(RuntimeError(f"error: {said} when calling `create(handle)`"))


def test_a_scorer_that_gives_too_few_scores_is_an_error():
    class Short(Halves):
        def __call__(self, batch):
            return {"half": batch[:1]}

    with pytest.raises(ValueError, match="scores for a batch of 2"):
        score_samples(Short(), Short(), samples_of([1, 1]), BatchSpec())


def test_what_halving_found_is_remembered():
    scorer, budget = Halves(capacity=4), Budget(8192)
    for _ in range(2):
        scorer.sizes.clear()
        scores, failed = score_samples(scorer, scorer, samples_of([10] * 16), BatchSpec(samples=16), budget)
        np.testing.assert_array_equal(scores["half"], np.arange(16) / 2)
        assert failed == {}
    assert scorer.sizes == [4, 4, 4, 4]  # the first time it was [16, 8, 4, 4, 8, …] without memory of it
    assert budget.tokens == 40


def test_the_first_shortage_costs_no_more_than_its_own_halving():
    scorer, budget = Halves(capacity=4), Budget(8192)
    score_samples(scorer, scorer, samples_of([10] * 32), BatchSpec(samples=16), budget)
    assert scorer.sizes == [16, 8, *[4] * 8]


def test_the_budget_grows_again_and_more_slowly_when_that_was_too_early():
    budget = Budget(100)
    budget.ran_out(100)
    for needed in (16, 32):
        for _ in range(needed - 1):
            budget.passed()
            assert budget.tokens == 50
        budget.passed()
        assert budget.tokens == 100
        budget.ran_out(100)


def test_long_samples_that_did_not_fit_do_not_keep_short_ones_small():
    class Quadratic(Halves):
        """Memory goes with the square of the length, which no count of tokens knows."""

        def __init__(self):
            super().__init__()
            self.padded = []

        def collate(self, data):
            return torch.tensor(data, dtype=torch.float32)

        def __call__(self, batch):
            length = 64 if batch.min() < 8 else 1
            if len(batch) * length**2 > 8192:
                raise NO_MEMORY
            self.padded.append(len(batch) * length)
            return {"half": batch / 2}

    scorer, budget = Quadratic(), Budget(512)
    lengths = [64] * 8 + [1] * 4096
    scores, _ = score_samples(scorer, scorer, samples_of(lengths), BatchSpec(tokens=512, samples=256), budget)
    np.testing.assert_array_equal(scores["half"], np.arange(len(lengths)) / 2)
    assert scorer.padded[:4] == [128] * 4
    assert scorer.padded[-1] == 256  # as many as the recipe allows
    assert budget.tokens >= 256


@given(st.lists(st.integers(1, 9), max_size=40), st.integers(1, 6), st.integers(1, 60))
def test_no_budget_changes_a_score_or_loses_a_row(lengths, capacity, tokens):
    scorer, budget = Halves(capacity), Budget(64)
    budget.ran_out(tokens)
    scores, failed = score_samples(scorer, scorer, samples_of(lengths), BatchSpec(tokens=64, samples=16), budget)
    np.testing.assert_array_equal(scores["half"], np.arange(len(lengths)) / 2)
    assert failed == {}
