"""`assay score` in processes of their own, forked from one that has imported everything."""

from __future__ import annotations

import multiprocessing
import os
import resource
import signal
import time
from collections.abc import Mapping, Sequence
from typing import Any

import fsspec
import psutil

from assay.cli import main

_LONGEST = 600  # seconds


class Run:
    """A command that has been started, in a session of its own.

    Args:
        arguments: what follows ``assay``.
        largest_file: no file may grow beyond so many bytes.
        s3: what fsspec needs to find an object store.
    """

    def __init__(
        self, arguments: Sequence[str], largest_file: int | None = None, s3: Mapping[str, Any] | None = None
    ) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([__name__, "assay.engine.local", "s3fs"])
        self._process = context.Process(target=_run, args=(arguments, largest_file, s3))
        self._process.start()

    @property
    def pid(self) -> int:
        return int(self._process.pid or 0)

    @property
    def goes_on(self) -> bool:
        return self._process.is_alive()

    def wait(self) -> int:
        """Its exit status. A run that does not end is killed, and an error."""
        self._process.join(_LONGEST)
        if self.goes_on:
            self.kill()
            raise RuntimeError(f"benchmarks.faults: a run did not end within {_LONGEST} s")
        return int(self._process.exitcode or 0)

    def kill(self) -> bool:
        """SIGKILL of it and of whatever it has started; False if it is over, or has not begun."""
        try:
            os.killpg(self.pid, signal.SIGKILL)
        except ProcessLookupError:
            return False
        return True

    def stop(self) -> None:
        """Until ``resume``."""
        os.kill(self.pid, signal.SIGSTOP)
        while psutil.Process(self.pid).status() not in (psutil.STATUS_STOPPED, psutil.STATUS_ZOMBIE):
            time.sleep(0.0001)

    def resume(self) -> None:
        os.kill(self.pid, signal.SIGCONT)


def _run(arguments: Sequence[str], largest_file: int | None, s3: Mapping[str, Any] | None) -> None:
    os.setsid()
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    if largest_file is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, resource.RLIM_INFINITY))
    if s3 is not None:
        fsspec.config.conf["s3"] = s3
    raise SystemExit(main(list(arguments)))
