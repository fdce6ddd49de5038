"""A process that does rows as it is told: their names come on its standard input, one JSON string a line.

Each row's end is in the journal before the next begins. The supervisor hears of it through a pipe of its own.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.gpu import faults
from tests.gpu.outcomes import Journal

REPLY = "GPU_REPLY"  # the pipe's number
FOLDER = "GPU_RESULTS"
DEAD_CONTEXT = 3  # exit status of a worker whose GPU answers nothing any more


@dataclass(frozen=True)
class End:
    """How a row ended."""

    state: str
    detail: str = ""
    facts: Mapping[str, Any] = field(default_factory=dict)


OK = End("ok")


def folder() -> Path:
    return Path(os.environ[FOLDER])


def serve(phase: str, rows: Mapping[str, Callable[[], End]]) -> None:
    """Rows by name, until the supervisor has no more. What a row raises is its end, and no other row's."""
    journal = Journal(folder())
    for name in told(list(rows)):
        start = time.monotonic()
        try:
            faults.plant(phase, name)
            end = rows[name]()
        except Exception as error:
            end = End("failed", one_line(error))
        journal.add(phase, name, end.state, end.detail, round(time.monotonic() - start, 2), end.facts)
        if dead(end.detail):
            os._exit(DEAD_CONTEXT)  # without handlers, which would wait for the GPU


def told(names: Sequence[str]) -> Iterator[str]:
    """Says what it can do, then what it is told to; the row before is over when the next is asked for."""
    reply = int(os.environ.pop(REPLY))
    os.set_inheritable(reply, False)  # else what a row starts would keep the pipe open
    die_with_parent()
    _say(reply, {"rows": names})
    for line in sys.stdin:
        yield json.loads(line)
        _say(reply, {"done": True})


def _say(reply: int, message: Mapping[str, Any]) -> None:
    os.write(reply, json.dumps(message).encode() + b"\n")


def die_with_parent() -> None:
    """Where the system can (Linux): a killed run leaves nothing on the GPU."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def dead(detail: str) -> bool:
    """After such an error every call to the GPU fails: the process cannot go on."""
    return "CUDA error" in detail or "device-side assert" in detail or "cudaError" in detail


def one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:400]}"
