"""How far a run is: a bar on a terminal, a plain line every so often elsewhere, or nothing."""

from __future__ import annotations

import logging
import time
from types import TracebackType

log = logging.getLogger("assay")


class Progress:
    """Is told what is done. This one keeps quiet; the others speak."""

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return None

    def start(self, shards: int, size: int) -> None:
        """So many shards of so many bytes together lie ahead; in the second pass of a recipe with a shortlist, anew."""

    def advance(self, rows: int, size: float) -> None:
        """So many rows more, and the bytes that they are taken to be."""

    def finish_shard(self) -> None:
        """One shard more."""


class _Counting(Progress):
    def __init__(self) -> None:
        self._shards = self._shards_done = self._rows = 0
        self._size = self._size_done = 0.0
        self._began = time.monotonic()

    def start(self, shards: int, size: int) -> None:
        self._shards, self._size, self._began = shards, size, time.monotonic()
        self._shards_done, self._rows, self._size_done = 0, 0, 0.0

    def advance(self, rows: int, size: float) -> None:
        self._rows += rows
        self._size_done += size

    def finish_shard(self) -> None:
        self._shards_done += 1

    def _text(self) -> str:
        elapsed = max(time.monotonic() - self._began, 1e-9)
        rate = self._rows / elapsed
        line = f"{self._shards_done}/{self._shards} shards, {self._rows:,} rows, {rate:,.0f} rows/s"
        if self._size_done and self._size_done < self._size:
            line += f", {_duration(elapsed * (self._size / self._size_done - 1))} left"
        return line


class LogProgress(_Counting):
    """One log line per interval."""

    def __init__(self, interval: float = 10.0) -> None:
        super().__init__()
        self._interval = interval
        self._next = time.monotonic() + interval

    def advance(self, rows: int, size: float) -> None:
        super().advance(rows, size)
        if time.monotonic() >= self._next:
            log.info("%s", self._text())
            self._next = time.monotonic() + self._interval


class BarProgress(_Counting):
    """A bar on the terminal's standard error."""

    def __init__(self) -> None:
        super().__init__()
        from rich.console import Console
        from rich.progress import BarColumn, TaskProgressColumn, TextColumn
        from rich.progress import Progress as Bar

        columns = (BarColumn(), TaskProgressColumn(), TextColumn("{task.description}", markup=False))
        self._bar = Bar(*columns, console=Console(stderr=True), transient=True)
        self._task = self._bar.add_task("", total=None)

    def __enter__(self) -> Progress:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def advance(self, rows: int, size: float) -> None:
        super().advance(rows, size)
        self._show()

    def finish_shard(self) -> None:
        super().finish_shard()
        self._show()

    def _show(self) -> None:
        self._bar.update(self._task, total=max(self._size, 1.0), completed=self._size_done, description=self._text())


def _duration(seconds: float) -> str:
    hours, rest = divmod(int(seconds), 3600)
    return f"{hours}:{rest // 60:02}:{rest % 60:02}"
