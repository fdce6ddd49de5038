"""Actors with which something is the matter, by names that a node of a cluster can import."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

from assay.corpus.storage import Store
from assay.engine import shard
from assay.engine.local import RunSummary
from assay.engine.ray_actors import Actor
from assay.recipe.errors import EngineError
from tests.engine.odd_workers import SMALL_WINDOW


def until_it_starts(score: Callable[[], RunSummary], times: int = 30) -> RunSummary:
    """Again where every worker was killed before it had started, which ends a run: on a slow machine that takes longer
    than the killer waits."""
    try:
        return score()
    except EngineError as error:
        if times == 0 or "ended before it could start" not in str(error):
            raise
    return until_it_starts(score, times - 1)


class SmallWindows(Actor):
    """Cuts shards into blocks that a test can afford to have several of."""

    def open(self, setup):
        shard.WINDOW_ROWS = SMALL_WINDOW
        return super().open(setup)


class Mortal(SmallWindows):
    """Is killed in the middle of every shard called `deadly`, and once by the first shard called `once`."""

    def work(self, unit):
        mark = Path(self._output.root).parent / "died"
        first = "once" in unit.shard.path and not mark.exists()
        if first:
            mark.touch()
        if first or "deadly" in unit.shard.path:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().work(unit)


class Known(SmallWindows):
    """Leaves its number, and takes its time."""

    def open(self, setup):
        folder = Path(setup.recipe["output"]).parent / "pids"
        folder.mkdir(exist_ok=True)
        (folder / str(os.getpid())).touch()
        return super().open(setup)

    def work(self, unit):
        time.sleep(0.05)
        return super().work(unit)


class Failing(Actor):
    """Cannot work, and lives on."""

    def work(self, unit):
        mark = Path(self._output.root).parent / "failed"
        if mark.exists():
            return super().work(unit)
        mark.touch()
        raise KeyError("no such thing")


class Slow(Actor):
    """Takes its time."""

    def work(self, unit):
        time.sleep(0.5)
        return super().work(unit)


class Elsewhere(Actor):
    """Writes to a folder of its own node."""

    def open(self, setup):
        said = super().open(setup)
        self._output = Store.at(f"{setup.recipe['output']}-of-another-node")
        return said
