"""Calls of libraries on strangers' files."""

from __future__ import annotations

import resource
import threading

import pytest

from assay.recipe.library_calls import bounded_memory, memory_limits, unbounded_memory


def test_memory_is_bounded_for_as_long_as_it_lasts():
    before = resource.getrlimit(resource.RLIMIT_AS)
    with bounded_memory(1 << 26):
        assert len(bytearray(1 << 20)) == 1 << 20
        with pytest.raises(MemoryError):
            bytearray(1 << 30)
    assert resource.getrlimit(resource.RLIMIT_AS) == before
    assert len(bytearray(1 << 28)) == 1 << 28


def test_bounds_of_two_threads_do_not_outlast_them():
    before, count = resource.getrlimit(resource.RLIMIT_AS), memory_limits()
    inside, done = threading.Event(), threading.Event()

    def other():
        with bounded_memory(1 << 30):
            inside.set()
            done.wait(10)

    thread = threading.Thread(target=other)
    thread.start()
    inside.wait(10)
    assert memory_limits() == count + 1
    release = threading.Timer(0.05, done.set)
    release.start()
    with bounded_memory(1 << 30):
        assert done.is_set()
    thread.join()
    assert resource.getrlimit(resource.RLIMIT_AS) == before
    assert memory_limits() == count + 4
    with unbounded_memory():
        assert resource.getrlimit(resource.RLIMIT_AS) == before
    assert memory_limits() == count + 4
