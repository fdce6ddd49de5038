"""Reading ahead: the same items, errors where they belong, bounded memory, no thread left."""

from __future__ import annotations

import threading
import time

import pytest

from assay.corpus.errors import ShardError
from assay.engine import shard
from assay.engine.ahead import read_ahead
from assay.engine.local import run
from assay.engine.timing import Times
from assay.recipe.errors import EngineError
from assay.recipe.recipe import load_recipe


def readers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "assay-reader"]


class Source:
    """Items of one byte each that says how many were made, on which thread, and whether it was closed."""

    def __init__(self, count, error=None):
        self.count, self.error, self.made, self.closed, self.threads = count, error, 0, False, set()

    def items(self):
        try:
            for i in range(self.count):
                self.made += 1
                self.threads.add(threading.current_thread().name)
                yield i
            if self.error:
                raise self.error
        finally:
            self.closed = True


def settled(source: Source) -> int:
    """How many items have been made when no more are."""
    before, deadline = -1, time.monotonic() + 10
    while before != source.made and time.monotonic() < deadline:
        before = source.made
        time.sleep(0.05)
    return source.made


def test_items_come_in_order_from_a_thread_of_their_own():
    source = Source(100)
    with read_ahead(source.items(), lambda item: 1, 7, Times()) as items:
        assert list(items) == list(range(100))
    assert source.threads == {"assay-reader"}
    assert source.closed
    assert readers() == []


def test_no_more_is_read_than_may_wait():
    source = Source(100)
    with read_ahead(source.items(), lambda item: 1, 7, Times()) as items:
        assert settled(source) == 8  # seven wait, and one more is at hand
        assert [next(items) for _ in range(3)] == [0, 1, 2]
        assert settled(source) == 11


def test_an_item_larger_than_the_bound_passes_alone():
    with read_ahead(Source(5).items(), lambda item: 1000, 7, Times()) as items:
        assert list(items) == [0, 1, 2, 3, 4]


def test_an_error_comes_after_the_items_before_it():
    with read_ahead(Source(3, ShardError("cut off")).items(), lambda i: 1, 9, Times()) as items:
        assert [next(items) for _ in range(3)] == [0, 1, 2]
        with pytest.raises(ShardError, match="cut off"):
            next(items)
    assert readers() == []


def test_who_stops_early_leaves_no_thread_and_closes_the_source():
    source = Source(100)

    def stop_early():
        with read_ahead(source.items(), lambda item: 1, 7, Times()) as items:
            next(items)
            raise KeyError

    with pytest.raises(KeyError):
        stop_early()
    assert source.closed
    assert source.made < 20
    assert readers() == []


def test_waiting_is_measured():
    def slow():
        time.sleep(0.2)
        yield 1

    times = Times()
    with read_ahead(slow(), lambda item: 1, 7, times) as items:
        assert list(items) == [1]
    assert 0.15 < times.wait < 5


@pytest.mark.parametrize("damaged", [False, True])
def test_a_run_leaves_no_thread_when_scoring_or_reading_fails(project, monkeypatch, damaged):
    path = project.root / "data/a.parquet"
    if damaged:
        path.write_bytes(path.read_bytes()[:-10])
        assert set(run(load_recipe(str(project.path))).unreadable) == {"a.parquet"}
    else:

        def fail(*arguments):
            raise RuntimeError("no such kernel")

        monkeypatch.setattr(shard, "score_samples", fail)
        with pytest.raises(EngineError, match="no such kernel"):
            run(load_recipe(str(project.path)))
    assert readers() == []
