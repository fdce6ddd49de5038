"""A run by several workers: units are handed out, deaths made good, parts joined; tables are those of one worker."""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
import signal
import tempfile
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
from fsspec.implementations.memory import MemoryFileSystem

from assay.corpus.errors import CorpusError, ShardError
from assay.corpus.footer import Footer
from assay.corpus.shards import Shard
from assay.corpus.storage import TEMPORARY_SUFFIX, Store
from assay.engine import worker
from assay.engine.devices import threads_each
from assay.engine.messages import Advanced, Began, Failed, Finished, Logged, Ready, Setup, Unit
from assay.engine.parts import Part, PartsDiffer, join_parts
from assay.engine.plan import Plan, write_manifest
from assay.engine.progress import Progress
from assay.engine.shard import Share
from assay.engine.timing import Times
from assay.engine.units import Job, Outcome, shares
from assay.recipe.errors import EngineError
from assay.recipe.models import hashed_files

log = logging.getLogger("assay")

# How a worker's process starts. Not by forking: threads and GPU contexts do not survive it.
START = "spawn"
DIED_TWICE = "a worker died twice on it"
_PATIENCE_SECONDS = 5.0
# Staged parts are given a new age so often: an hour's is what others take for an abandoned one.
_RENEW_SECONDS = 600.0


def score_with_workers(
    plan: Plan,
    sizes: Mapping[Shard, int],
    devices: Sequence[torch.device],
    progress: Progress,
    times: Times,
    on_unreadable: Callable[[Shard, str], None],
) -> dict[Shard, Outcome]:
    """Score a plan's shards with a worker on each device.

    Args:
        sizes: of the shards to score, in bytes.
        progress: starts when the first worker is ready.
        times: the workers' are added up in it.
        on_unreadable: is called as soon as that is known.

    Raises:
        EngineError: a worker cannot start, or what it scores with fails; all have ended.
    """
    _refuse_memory(plan)
    crew = _Crew(plan, sizes, progress, times, on_unreadable)
    with _staging(plan.output) as crew.stage:
        try:
            crew.start(devices)
            crew.prepare()
            with progress:
                crew.work()
            crew.dismiss()
        finally:
            crew.end()
            crew.clear()
    return {shard: crew.outcomes[shard] for shard in plan.todo}


def _refuse_memory(plan: Plan) -> None:
    for store in (plan.output, *(corpus.store for corpus in plan.corpora.values())):
        if isinstance(store.fs, MemoryFileSystem):
            raise CorpusError(f"{store.url}: lives in one process, where no worker sees it; score with run.devices=cpu")


@contextlib.contextmanager
def _staging(output: Store) -> Iterator[Callable[[], str]]:
    """Names for staged parts: hidden temporaries of a local output, which a later run sweeps if this one is killed."""
    with contextlib.ExitStack() as stack:
        folder = output.root if output.is_local else stack.enter_context(tempfile.TemporaryDirectory())
        yield lambda: os.path.join(folder, f".{uuid.uuid4().hex}{TEMPORARY_SUFFIX}")


@dataclass
class _Worker:
    device: torch.device
    process: Any
    connection: Connection
    ready: Ready | None = None
    job: Job | None = None
    began: float = field(default_factory=time.perf_counter)


class _Crew:
    stage: Callable[[], str]

    def __init__(
        self,
        plan: Plan,
        sizes: Mapping[Shard, int],
        progress: Progress,
        times: Times,
        on_unreadable: Callable[[Shard, str], None],
    ) -> None:
        self.outcomes: dict[Shard, Outcome] = {}
        self._sizes = sizes
        self._plan, self._progress, self._times, self._on_unreadable = plan, progress, times, on_unreadable
        self._context: Any = multiprocessing.get_context(START)
        self._workers: list[_Worker] = []
        self._devices: Sequence[torch.device] = ()
        self._threads = 1
        self._starts: dict[torch.device, int] = {}
        self._waiting: deque[Job] = deque()
        self._ready: Ready | None = None
        self._staged: dict[Shard, dict[int, Part]] = {}
        self._renewed = time.monotonic()

    # -- the workers' lives

    def start(self, devices: Sequence[torch.device]) -> None:
        self._devices, self._threads = devices, threads_each(len(devices))
        for each in [self._hire(device) for device in devices]:  # all of them start before one has to listen
            self._brief(each)

    def _hire(self, device: torch.device) -> _Worker:
        """Start a worker's process."""
        mine, theirs = self._context.Pipe()
        process = self._context.Process(target=worker.main, args=(theirs,), daemon=True, name="assay-worker")
        hired = _Worker(device, process, mine)
        resource_tracker.ensure_running()  # it lets interrupts through when it starts
        with _without_interrupts(), theirs:
            try:
                process.start()
            except OSError as error:
                raise EngineError(f"run.devices: no worker can be started on {device} ({error})") from error
            self._workers.append(hired)
        return hired

    def _brief(self, hired: _Worker) -> None:
        """Tell it what it works with. By its pipe: what goes along with a new process must fit into a buffer."""
        recipe = self._plan.recipe
        fitted = {path: self._plan.corpora[path] for path in recipe.fitted_to().values()}
        setup = Setup(
            recipe.model_dump(),
            recipe.task,
            recipe.trust,
            self._plan.identity,
            fitted,
            hashed_files(),
            str(hired.device),
            self._threads,
            logging.getLogger("assay").getEffectiveLevel(),
            hired.began,
        )
        with contextlib.suppress(OSError):  # its death will be noticed where its words are waited for
            hired.connection.send(setup)

    def _bury(self, dead: _Worker) -> None:
        """Make good what a worker's death has cost."""
        self._workers.remove(dead)
        dead.connection.close()
        how = _end_of(dead.process)
        if dead.ready is None:
            self._starts[dead.device] = self._starts.get(dead.device, 0) + 1
            if dead.process.exitcode is None or dead.process.exitcode >= 0 or self._starts[dead.device] > 1:
                raise EngineError(
                    f"run.devices: the worker on {dead.device} ended before it could start ({how}); what it printed "
                    "stands above. A script that runs a recipe does so under `if __name__ == '__main__':`"
                )
            log.warning("the worker on %s ended while it loaded the models (%s); another one starts", dead.device, how)
        elif dead.job is not None:
            self._retry(dead.job, how)
        if self._waiting or self._ready is None:
            self._brief(self._hire(dead.device))

    def _retry(self, job: Job, how: str) -> None:
        self._progress.advance(-job.rows, -job.reached * job.size)
        if job.path is not None:
            _remove([job.path])
        job.deaths += job.began
        job.path, job.began, job.rows, job.reached = None, False, 0, 0.0
        if job.shard in self.outcomes:
            return
        if job.deaths > 1:
            self._settle(job.shard, f"{DIED_TWICE} (the last one was {how})")
            return
        log.warning("%s: a worker died on it (%s); another one tries again", job.shard.path, how)
        self._waiting.appendleft(job)

    def dismiss(self) -> None:
        """Let the workers end by themselves."""
        for each in self._workers:
            with contextlib.suppress(OSError):
                each.connection.send(None)
        _join([each.process for each in self._workers])

    def end(self) -> None:
        """See that no worker is left."""
        processes = [each.process for each in self._workers]
        for process in processes:
            process.terminate()
        _join(processes)
        for each in self._workers:
            each.process.kill()
            each.process.join()
            each.connection.close()

    def clear(self) -> None:
        """Remove what is staged."""
        jobs = [each.job for each in self._workers] + list(self._waiting)
        _remove([job.path for job in jobs if job is not None and job.path is not None])
        _remove([part.path for parts in self._staged.values() for part in parts.values()])

    # -- their work

    def prepare(self) -> None:
        """Wait for the first worker to be ready, write the manifest, and make the units, the largest first."""
        while self._ready is None:
            self._listen()
        write_manifest(self._plan, self._ready.columns)
        total, workers = sum(self._sizes.values()), len(self._devices)
        for shard, size in sorted(self._sizes.items(), key=lambda item: -item[1]):
            count = shares(self._plan, size, total, workers) if self._ready.gathers is not None else 1
            self._waiting += [Job(shard, size / count, Share(i, count)) for i in range(count)]

    def work(self) -> None:
        """Hand out units until every shard has its outcome."""
        self._progress.start(len(self._sizes), sum(self._sizes.values()))
        while len(self.outcomes) < len(self._sizes):
            if not self._workers:
                self._brief(self._hire(self._devices[0]))
            for each in self._workers:
                if each.ready and each.job is None and self._waiting:
                    self._hand_out(each, self._waiting.popleft())
            self._listen()

    def _hand_out(self, to: _Worker, job: Job) -> None:
        job.path = self.stage() if job.share.count > 1 else None
        to.job = job
        with contextlib.suppress(OSError):  # its death will be noticed where its words are waited for
            to.connection.send(Unit(job.shard, job.share, job.path, job.shard in self._plan.retried))

    def _listen(self) -> None:
        heard = wait([each.connection for each in self._workers], timeout=_RENEW_SECONDS)
        for each in [w for w in self._workers if w.connection in heard]:
            message = None
            with contextlib.suppress(EOFError, OSError):
                message = each.connection.recv()
            if message is None:
                self._bury(each)
            else:
                self._hear(each, message)
        if time.monotonic() - self._renewed > _RENEW_SECONDS:
            self._renewed = time.monotonic()
            for part in [part for parts in self._staged.values() for part in parts.values()]:
                with contextlib.suppress(OSError):  # if it is gone, joining the parts will say so
                    os.utime(part.path)

    def _hear(self, who: _Worker, message: Any) -> None:
        job = who.job
        if isinstance(message, Logged):
            # What every worker finds when it loads is said once.
            if who.ready is not None or who is self._workers[0]:
                log.log(message.level, "%s", message.text)
        elif isinstance(message, Failed):
            raise EngineError(message.reason)
        elif isinstance(message, Ready):
            who.ready, self._ready = message, self._ready or message
            self._starts[who.device] = 0
            self._times.add(message.times)
        elif job is not None and isinstance(message, Began):
            job.began = True
        elif job is not None and isinstance(message, Advanced):
            self._progress.advance(message.rows, (message.share - job.reached) * job.size)
            job.rows, job.reached = job.rows + message.rows, message.share
        elif job is not None and isinstance(message, Finished):
            who.job = None
            self._times.add(message.times)
            self._finish(job, message)

    def _finish(self, job: Job, message: Finished) -> None:
        outcome = message.outcome
        if job.path is not None and (isinstance(outcome, str) or job.shard in self.outcomes):
            _remove([job.path])
        if job.shard in self.outcomes:  # another part of it has failed
            return
        if isinstance(outcome, str):
            self._settle(job.shard, outcome)
        elif isinstance(outcome, Footer):
            self._settle(job.shard, (outcome, message.stored))
        else:
            parts = self._staged.setdefault(job.shard, {})
            parts[job.share.index] = outcome
            if len(parts) == job.share.count:
                self._join([parts[i] for i in range(len(parts))], job.shard, job.size * len(parts))

    def _join(self, parts: list[Part], shard: Shard, size: float) -> None:
        assert self._ready is not None
        assert self._ready.gathers is not None
        gathers, identity, columns = self._ready.gathers, self._plan.identity, self._ready.columns
        try:
            with self._times.measure("write"):
                footer = join_parts(parts, identity, columns, gathers, shard, self._plan.output)
        except ShardError as error:
            self._settle(shard, str(error))
        except PartsDiffer:
            log.info("%s: has too few samples at its beginning for several workers; one scores it", shard.path)
            self._drop(shard)
            self._progress.advance(0, -size)
            self._waiting.append(Job(shard, size))
        else:
            self._settle(shard, (footer, False))

    def _settle(self, shard: Shard, outcome: Outcome) -> None:
        """What became of a shard is known."""
        self.outcomes[shard] = outcome
        self._drop(shard)
        if isinstance(outcome, str):  # other parts of it may be waiting
            self._waiting = deque(job for job in self._waiting if job.shard != shard)
            self._on_unreadable(shard, outcome)
        self._progress.finish_shard()

    def _drop(self, shard: Shard) -> None:
        _remove([part.path for part in self._staged.pop(shard, {}).values()])


@contextlib.contextmanager
def _without_interrupts() -> Iterator[None]:
    """A process that is started in the block does not hear Ctrl-C, and an interrupt waits for the block's end.

    The mask is one thread's: another that does not block the signal takes it, and Python interrupts the main one.
    """
    heard: list[int] = []
    own = signal.getsignal(signal.SIGINT)
    waits = threading.current_thread() is threading.main_thread() and callable(own)
    if waits:
        signal.signal(signal.SIGINT, lambda number, _: heard.append(number))
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        if waits:
            signal.signal(signal.SIGINT, own)
        if heard:
            signal.raise_signal(signal.SIGINT)


def _join(processes: Sequence[Any]) -> None:
    """Wait for processes to end, for a while."""
    until = time.monotonic() + _PATIENCE_SECONDS
    for process in processes:
        process.join(max(0.0, until - time.monotonic()))


def _end_of(process: Any) -> str:
    process.join(_PATIENCE_SECONDS)
    code = process.exitcode
    if code is None:
        process.kill()
        process.join()
        return "it closed its pipe"
    if code >= 0:
        return f"exit code {code}"
    try:
        return f"killed by {signal.Signals(-code).name}"
    except ValueError:
        return f"killed by signal {-code}"


def _remove(paths: Sequence[str]) -> None:
    for path in paths:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)
