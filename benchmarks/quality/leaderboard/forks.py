"""Jobs in processes of their own, so that each one's time and memory are its own, and none can spoil another."""

from __future__ import annotations

import contextlib
import importlib
import multiprocessing
import pickle
import resource
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


@dataclass(frozen=True)
class Job:
    """What to run, and the package whose import is not to be measured with it."""

    run: Callable[[], Any]
    module: str | None = None


@dataclass(frozen=True)
class Done:
    """What became of a job.

    Attributes:
        value: what it returned, None if it failed.
        error: why it failed, None if it did not.
        seconds: of one core: a busy machine does not lengthen them.
        megabytes: the most memory it held beyond what it began with; None where the system does not tell.
    """

    value: Any = None
    error: str | None = None
    seconds: float = 0.0
    megabytes: float | None = None


@dataclass(frozen=True)
class _Running:
    name: str
    process: BaseProcess
    since: float


def here(jobs: Mapping[str, Job]) -> Iterator[tuple[str, Done]]:
    """One after the other in this process: memory is not told."""
    for name, job in jobs.items():
        yield name, _done(job)


def forked(
    jobs: Mapping[str, Job], at_once: int, limit: int = 1200, patience: float = 7200.0
) -> Iterator[tuple[str, Done]]:
    """Each in a process of its own with one thread, so many at a time, in the order in which they end.

    A job that takes more than ``limit`` seconds of a core, or ``patience`` by the clock, or whose process dies, is done
    with an error that says so.
    """
    context, waiting, running = multiprocessing.get_context("fork"), list(jobs.items()), dict[Connection, _Running]()
    try:
        while waiting or running:
            while waiting and len(running) < at_once:
                name, job = waiting.pop(0)
                receiver, sender = context.Pipe(duplex=False)
                process = context.Process(target=_child, args=(job, sender, limit), daemon=True)
                process.start()
                sender.close()
                running[receiver] = _Running(name, process, time.perf_counter())
            for ready in wait(list(running), timeout=1.0):
                assert isinstance(ready, Connection)
                yield running[ready].name, _received(ready, running.pop(ready))
            now = time.perf_counter()
            for receiver in [r for r, job in running.items() if now - job.since > patience]:
                late = running.pop(receiver)
                late.process.kill()
                yield late.name, Done(error=f"took more than {patience:g} s")
    finally:
        for job_running in running.values():
            job_running.process.kill()


def _received(receiver: Connection, job: _Running) -> Done:
    try:
        done = pickle.loads(receiver.recv_bytes())
        assert isinstance(done, Done)
    except EOFError:
        job.process.join()
        code = job.process.exitcode
        return Done(error="took too long" if code == -signal.SIGXCPU else f"its process died ({code})")
    job.process.join()
    return done


def _child(job: Job, sender: Connection, limit: int) -> None:
    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_CPU, (limit, limit + 5))
    before = None
    if job.module is not None:
        with contextlib.suppress(Exception):  # it is raised again, and told, when the job imports it
            importlib.import_module(job.module)
    try:
        CLEAR.write_text("5")  # the peak is that of the job, not of what the parent held before
        before = _kilobytes("VmRSS")
    except OSError:
        pass
    done = _done(job)
    if before is not None:
        done = Done(done.value, done.error, done.seconds, max(_kilobytes("VmHWM") - before, 0) / 1024)
    sender.send_bytes(pickle.dumps(done))  # plainly: torch would send tensors as files that end with this process
    sender.close()


def _done(job: Job) -> Done:
    begun = time.process_time()
    try:
        value, error = job.run(), None
    except Exception as problem:  # a method or a peer may raise what it likes: that is its row
        value, text = None, str(problem).strip()
        error = f"{type(problem).__name__}: {text.splitlines()[0] if text else ''}"[:300]
    return Done(value, error, time.process_time() - begun)


def _kilobytes(field: str) -> int:
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(field))
    return int(line.split()[1])
