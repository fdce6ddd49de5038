"""Processes that do rows for a phase, watched by one that does none: what dies or hangs costs the row it was at.

A pool's processes share its rows. Whoever dies or is killed over a row is replaced, and the row is not tried again.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import subprocess
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tests.gpu.commands import end, tail
from tests.gpu.outcomes import Journal, last, read
from tests.gpu.settings import LOGS, ROOT
from tests.gpu.worker import REPLY

TICK = 0.1  # seconds between looks at what is slow or dead
FALSE_STARTS = 2  # processes in a row that end before their first row: the pool's remaining rows are given up


@dataclass(frozen=True)
class Pool:
    """``processes`` of ``command``, which do the same rows; see tests.gpu.worker."""

    phase: str
    name: str
    command: Sequence[str]
    environment: Mapping[str, str]
    limit: float  # seconds for one row
    starting: float = 60.0  # seconds until a process says what it can do
    processes: int = 1
    rows: Callable[[Sequence[str]], Sequence[str]] = list  # what to do of what it can do, and in which order


@dataclass
class _Worker:
    process: subprocess.Popen[bytes]
    replies: int  # the pipe's end to read from
    log: Path
    since: float  # when it was started, or got its row
    ready: bool = False
    row: str | None = None
    heard: bytes = b""


@dataclass
class _Crew:
    """A pool at work."""

    pool: Pool
    queue: deque[str] | None = None  # None: no process has said yet what it can do
    workers: list[_Worker] = field(default_factory=list)
    false_starts: int = 0
    started: int = 0

    @property
    def busy(self) -> bool:
        return any(w.row is not None for w in self.workers)

    @property
    def over(self) -> bool:
        return self.queue is not None and not self.queue and not self.busy


def supervise(pools: Sequence[Pool], journal: Journal, deadline: float, *, one_at_a_time: bool = False) -> None:
    """Every row of every pool, until time.monotonic() is ``deadline``.

    ``one_at_a_time``: no two rows at once, of all pools: the pools' first rows, their second ones, and so on.
    """
    crews = [_Crew(pool) for pool in pools]
    turn = 0
    try:
        while not all(crew.over for crew in crews) and time.monotonic() < deadline:
            for crew in crews:
                _staff(crew, journal)
            if one_at_a_time:
                turn = _give_in_turn(crews, turn, journal)
            else:
                for crew in crews:
                    while _give(crew, journal):
                        pass
            _listen(crews, journal, min(TICK, max(0.0, deadline - time.monotonic())))
            for crew in crews:
                for worker in list(crew.workers):
                    _look_at(crew, worker, journal)
    finally:
        for crew in crews:
            _dismiss(crew, journal)


def _staff(crew: _Crew, journal: Journal) -> None:
    """As many processes as there is work for; dismissed when there is none left."""
    if crew.over:
        _dismiss(crew, journal)
        return
    if crew.false_starts >= FALSE_STARTS:
        if not crew.workers:
            reason = f"no process for it: {_tail(_log(crew, crew.started))}"
            if crew.queue is None:
                journal.add(crew.pool.phase, crew.pool.name, "died", reason)
            journal.mark(crew.pool.phase, crew.queue or (), "not reached", reason)
            crew.queue = deque()
        return
    work = crew.pool.processes if crew.queue is None else len(crew.queue)
    idle = sum(w.row is None for w in crew.workers)
    for _ in range(min(crew.pool.processes - len(crew.workers), work - idle)):
        crew.workers.append(_start(crew))


def _log(crew: _Crew, number: int) -> Path:
    return LOGS / f"{crew.pool.phase}-{crew.pool.name}-{number}.log".replace(" ", "-").replace("/", "-")


def _start(crew: _Crew) -> _Worker:
    crew.started += 1
    log = _log(crew, crew.started)
    log.parent.mkdir(parents=True, exist_ok=True)
    replies, tell = os.pipe()
    environment = {**crew.pool.environment, REPLY: str(tell)}
    with log.open("wb") as file:
        process = subprocess.Popen(
            crew.pool.command,
            cwd=ROOT,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=file,
            stderr=file,
            pass_fds=(tell,),
            start_new_session=True,  # with what it starts it can be killed as one
        )
    os.close(tell)
    os.set_blocking(replies, False)
    return _Worker(process, replies, log, time.monotonic())


def _give(crew: _Crew, journal: Journal) -> bool:
    """The next row to an idle process, if there are both."""
    idle = next((w for w in crew.workers if w.ready and w.row is None), None)
    if not idle or not crew.queue:
        return False
    row = crew.queue.popleft()
    journal.add(crew.pool.phase, row, "begun")
    idle.row, idle.since = row, time.monotonic()
    with contextlib.suppress(BrokenPipeError):  # it is dead, and found so at the next look
        assert idle.process.stdin is not None
        idle.process.stdin.write(json.dumps(row).encode() + b"\n")
        idle.process.stdin.flush()
    return True


def _give_in_turn(crews: Sequence[_Crew], turn: int, journal: Journal) -> int:
    """Whose turn is next. A crew that still starts is waited for only where nobody else can go on."""
    if any(crew.busy for crew in crews):
        return turn
    for step in range(len(crews)):
        if _give(crews[(turn + step) % len(crews)], journal):
            return (turn + step + 1) % len(crews)
    return turn


def _listen(crews: Sequence[_Crew], journal: Journal, seconds: float) -> None:
    with selectors.DefaultSelector() as selector:
        for crew in crews:
            for worker in crew.workers:
                selector.register(worker.replies, selectors.EVENT_READ, (crew, worker))
        if not selector.get_map():
            time.sleep(seconds)
            return
        for key, _ in selector.select(seconds):
            crew, worker = key.data
            _hear(crew, worker, journal)


def _hear(crew: _Crew, worker: _Worker, journal: Journal) -> None:
    with contextlib.suppress(BlockingIOError):
        worker.heard += os.read(worker.replies, 1 << 20)
    *lines, worker.heard = worker.heard.split(b"\n")
    for line in lines:
        message = json.loads(line)
        if "rows" in message:
            worker.ready = True
            crew.false_starts = 0
            if crew.queue is None:
                crew.queue = deque(crew.pool.rows(message["rows"]))
                journal.mark(crew.pool.phase, crew.queue, "planned")
        else:
            worker.row = None


def _look_at(crew: _Crew, worker: _Worker, journal: Journal) -> None:
    """Whether it lives, and is not too slow."""
    status = worker.process.poll()
    taken = time.monotonic() - worker.since
    limit = crew.pool.limit if worker.row is not None else crew.pool.starting
    if status is None and (taken < limit or (worker.ready and worker.row is None)):
        return
    _end(worker)
    _hear(crew, worker, journal)  # what it said before
    crew.workers.remove(worker)
    os.close(worker.replies)
    if worker.row is None:
        crew.false_starts += not worker.ready
        return
    if last(read(journal.path.parent))[crew.pool.phase, worker.row].state != "unfinished":
        return  # it ended the row, and then died: as it does when its GPU context is lost
    if status is None:
        journal.add(crew.pool.phase, worker.row, "hung", f"killed after {limit:.0f} s", taken)
    else:
        journal.add(crew.pool.phase, worker.row, "died", f"{_cause(status)}; {_tail(worker.log)}", taken)


def _dismiss(crew: _Crew, journal: Journal) -> None:
    """At the end of the work, or of the time."""
    for worker in crew.workers:
        _end(worker)
        _hear(crew, worker, journal)
        os.close(worker.replies)
        if worker.row is not None:
            taken = time.monotonic() - worker.since
            journal.add(crew.pool.phase, worker.row, "not reached", "the phase's time ended while it ran", taken)
    crew.workers.clear()
    journal.mark(crew.pool.phase, crew.queue or (), "not reached", "the phase's time ended")
    if crew.queue is None:
        journal.add(crew.pool.phase, crew.pool.name, "not reached", "its process did not start in the phase's time")
    crew.queue = deque()


def _end(worker: _Worker) -> None:
    end(worker.process)
    with contextlib.suppress(BrokenPipeError):
        assert worker.process.stdin is not None
        worker.process.stdin.close()


def _cause(status: int) -> str:
    return f"killed by {signal.Signals(-status).name}" if status < 0 else f"exit status {status}"


def _tail(log: Path) -> str:
    return tail(log.read_text(errors="replace") if log.exists() else "")
