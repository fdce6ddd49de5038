"""Commands whose exit status is the outcome: a build, a sanitizer over one op."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.gpu.outcomes import Journal
from tests.gpu.settings import LOGS, ROOT

TICK = 0.1
LINES = 12


@dataclass(frozen=True)
class Command:
    phase: str
    row: str
    words: Sequence[str]
    environment: Mapping[str, str]
    # (exit status, what it printed) -> what is wrong, in a line; "" if nothing
    judge: Callable[[int, str], str] = lambda status, text: f"exit status {status}; {tail(text)}" if status else ""

    @property
    def log(self) -> Path:
        return LOGS / f"{self.phase}-{self.row}.log".replace(" ", "-").replace("/", "-")


def run_all(commands: Sequence[Command], journal: Journal, deadline: float, processes: int) -> None:
    """In order, ``processes`` at a time, until time.monotonic() is ``deadline``."""
    waiting, running = list(commands), dict[subprocess.Popen[bytes], tuple[Command, float]]()
    journal_phase = {command.phase for command in commands}
    for phase in journal_phase:
        journal.mark(phase, [c.row for c in commands if c.phase == phase], "planned")
    try:
        while (waiting or running) and time.monotonic() < deadline:
            while waiting and len(running) < processes:
                command = waiting.pop(0)
                journal.add(command.phase, command.row, "begun")
                running[_start(command)] = command, time.monotonic()
            for process in [p for p in running if p.poll() is not None]:
                command, since = running.pop(process)
                end(process)  # what it started goes with it
                wrong = command.judge(process.returncode, command.log.read_text(errors="replace"))
                state = "failed" if wrong else "ok"
                journal.add(command.phase, command.row, state, wrong, round(time.monotonic() - since, 1))
            time.sleep(min(TICK, max(0.0, deadline - time.monotonic())))
    finally:
        for process, (command, since) in running.items():
            end(process)
            detail = f"the phase's time ended while it ran; {tail(command.log.read_text(errors='replace'), 2)}"
            journal.add(command.phase, command.row, "not reached", detail, round(time.monotonic() - since, 1))
        for command in waiting:
            journal.add(command.phase, command.row, "not reached", "the phase's time ended")


def _start(command: Command) -> subprocess.Popen[bytes]:
    command.log.parent.mkdir(parents=True, exist_ok=True)
    with command.log.open("wb") as file:
        return subprocess.Popen(
            command.words,
            cwd=ROOT,
            env={**command.environment},
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=file,
            start_new_session=True,
        )


def end(process: subprocess.Popen[bytes]) -> None:
    """With all that it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def tail(text: str, lines: int = LINES) -> str:
    kept = [line.strip() for line in text.splitlines() if line.strip()][-lines:]
    return " | ".join(kept)[-600:] or "it printed nothing"
