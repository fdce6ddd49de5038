"""What happened, one line of JSON each, on disk the moment it is known; several processes append to one file.

A row (a test, a case, an op × dtype × shape) begins and ends. One that began and has no end was running when the whole
run was stopped.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from assay._json import dumps

FILE = "outcomes.jsonl"
STATES = (
    "planned",  # is to come
    "begun",
    "ok",
    "failed",  # wrong, or raised
    "skipped",
    "died",  # its process did: a signal, an exit
    "hung",  # killed after its time
    "not reached",  # the phase's time ended first, or nothing was left to run it
    "unfinished",  # begun, and no end: only a reader says so
)
BAD = ("failed", "died", "hung")


@dataclass(frozen=True)
class Outcome:
    phase: str
    row: str
    state: str
    detail: str = ""  # one line for a table, or a traceback's end
    seconds: float | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)  # the measurement, the machine
    time: float = 0.0  # since the epoch

    @property
    def bad(self) -> bool:
        return self.state in BAD


class Journal:
    """Appends outcomes to ``folder/outcomes.jsonl``; what is added is on disk when ``add`` returns."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / FILE
        self._file = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)

    def add(
        self,
        phase: str,
        row: str,
        state: str,
        detail: str = "",
        seconds: float | None = None,
        facts: Mapping[str, Any] | None = None,
    ) -> None:
        if state not in STATES:
            raise ValueError(f"state {state!r}: expected one of {', '.join(STATES)}")
        self.write([Outcome(phase, row, state, detail, seconds, facts or {}, round(time.time(), 3))])

    def mark(self, phase: str, rows: Iterable[str], state: str, detail: str = "") -> None:
        """Many rows alike."""
        now = round(time.time(), 3)
        self.write([Outcome(phase, row, state, detail, time=now) for row in rows])

    def write(self, outcomes: Iterable[Outcome]) -> None:
        """In one append, which other processes' do not come between."""
        lines = [dumps(asdict(o), ensure_ascii=False, default=str).encode() + b"\n" for o in outcomes]
        if lines:
            os.write(self._file, b"".join(lines))
            os.fsync(self._file)


def read(folder: Path) -> list[Outcome]:
    """Every line in order. One that was cut off, by a full disk or a machine that stopped, is left out."""
    path = folder / FILE
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; expected the folder of a run of make gpu (GPU_RESULTS)")
    return [outcome for line in path.read_bytes().splitlines() if (outcome := _parse(line))]


def _parse(line: bytes) -> Outcome | None:
    try:
        return Outcome(**json.loads(line))
    except (ValueError, TypeError):
        return None


def last(outcomes: Iterable[Outcome]) -> dict[tuple[str, str], Outcome]:
    """How each (phase, row) ended, in the order in which rows first came up."""
    ended: dict[tuple[str, str], Outcome] = {}
    for outcome in outcomes:
        ended[outcome.phase, outcome.row] = outcome
    states = {"planned": "not reached", "begun": "unfinished"}
    return {
        key: Outcome(**{**asdict(o), "state": states[o.state], "detail": o.detail or "the run was stopped"})
        if o.state in states
        else o
        for key, o in ended.items()
    }
