"""Workers as processes of this machine, one for each device."""

from __future__ import annotations

import contextlib
import multiprocessing
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from typing import Any

from assay.engine import worker
from assay.recipe.errors import EngineError

# How a worker's process starts. Not by forking: threads and GPU contexts do not survive it.
START = "spawn"
_PATIENCE_SECONDS = 5.0


@dataclass(eq=False)
class WorkerProcess:
    """A process that runs ``worker.main``, at the other end of a pipe."""

    place: str
    process: Any
    connection: Connection

    @property
    def device(self) -> str:
        return self.place

    def tell(self, message: Any) -> None:
        with contextlib.suppress(OSError):
            self.connection.send(message)

    def hear(self) -> Any:
        with contextlib.suppress(EOFError, OSError):
            return self.connection.recv()
        return None

    def end_of(self) -> tuple[str, bool]:
        self.connection.close()
        how = _end_of(self.process)
        return how, self.process.exitcode is not None and self.process.exitcode < 0


class Processes:
    """Starts them, and sees that they end."""

    sees_local_files = True
    keeps: int | None = None
    advice = "what it printed stands above. A script that runs a recipe does so under `if __name__ == '__main__':`"

    def __init__(self) -> None:
        self._context: Any = multiprocessing.get_context(START)
        self._hired: list[WorkerProcess] = []

    def hire(self, place: str) -> WorkerProcess:
        mine, theirs = self._context.Pipe()
        process = self._context.Process(target=worker.main, args=(theirs,), daemon=True, name="assay-worker")
        resource_tracker.ensure_running()  # it lets interrupts through when it starts
        with _without_interrupts(), theirs:
            try:
                process.start()
            except OSError as error:
                raise EngineError(f"run.devices: no worker can be started on {place} ({error})") from error
            hired = WorkerProcess(place, process, mine)
            self._hired.append(hired)  # before an interrupt that has waited is heard
        return hired

    def wait(self, hands: Sequence[WorkerProcess], seconds: float) -> Sequence[WorkerProcess]:
        heard = wait([hand.connection for hand in hands], timeout=seconds)
        return [hand for hand in hands if hand.connection in heard]

    def let_go(self, hand: WorkerProcess) -> None:
        """All stay: here nobody else wants their places."""

    def dismiss(self) -> None:
        for hand in self._hired:
            hand.tell(None)
        _join([hand.process for hand in self._hired])

    def end(self) -> None:
        for hand in self._hired:
            hand.process.terminate()
        _join([hand.process for hand in self._hired])
        for hand in self._hired:
            hand.process.kill()
            hand.process.join()
            hand.connection.close()


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
