"""Rows are read on a thread of their own, so that the model does not wait for them."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from typing import Generic, TypeVar

from assay.engine.timing import Times

T = TypeVar("T")


@contextmanager
def read_ahead(items: Generator[T], size: Callable[[T], int], limit: int, times: Times) -> Iterator[Iterator[T]]:
    """Go through ``items`` on a thread, as far ahead as ``limit`` bytes allow; one of them is always made.

    What the thread raises is raised here, after the items before it. The thread has ended, and ``items`` is closed,
    when the block ends, however it ends.

    Args:
        items: what makes them; only the thread runs it.
        size: an item's bytes.
        limit: the bytes that may wait.
        times: its ``wait`` grows by how long was waited for the next item.
    """
    queue: _Queue[T] = _Queue(limit)
    thread = threading.Thread(target=_fill, args=(queue, items, size), name="assay-reader", daemon=True)
    thread.start()
    try:
        yield queue.items(times)
    finally:
        queue.close()
        thread.join()


def _fill(queue: _Queue[T], items: Generator[T], size: Callable[[T], int]) -> None:
    try:
        try:
            for item in items:
                if not queue.put(item, size(item)):
                    return
        finally:
            items.close()
    except BaseException as error:  # it is raised where the items are wanted
        queue.end(error)
    else:
        queue.end(None)


class _Queue(Generic[T]):
    """Bounded by bytes; an item larger than all of them passes when nothing else waits."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._waiting: deque[tuple[T, int]] = deque()
        self._held = 0
        self._closed = self._ended = False
        self._error: BaseException | None = None
        self._changed = threading.Condition()

    def put(self, item: T, size: int) -> bool:
        """False when nobody wants any more."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or not self._waiting or self._held + size <= self._limit)
            if self._closed:
                return False
            self._waiting.append((item, size))
            self._held += size
            self._changed.notify_all()
            return True

    def end(self, error: BaseException | None) -> None:
        with self._changed:
            self._ended, self._error = True, error
            self._changed.notify_all()

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._waiting.clear()
            self._changed.notify_all()

    def items(self, times: Times) -> Iterator[T]:
        while True:
            began = time.perf_counter()
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._ended)
                times.wait += time.perf_counter() - began
                if not self._waiting:
                    break
                item, size = self._waiting.popleft()
                self._held -= size
                self._changed.notify_all()
            yield item
        if self._error is not None:
            raise self._error
