"""Workers with which something is the matter, by names that a new process can import."""

from __future__ import annotations

import os
import signal
import time
from functools import partial
from pathlib import Path

from assay.engine import shard, worker
from assay.engine.shard import score_anew_or_stored, score_windows

SMALL_WINDOW = 90


def small_windows(connection, setup) -> None:
    """Cuts shards into blocks that a test can afford to have several of."""
    shard.WINDOW_ROWS = SMALL_WINDOW
    worker.main(connection, setup)


def dies_on_deadly(connection, setup) -> None:
    """Is killed in the middle of every shard called `deadly`."""
    _patched(connection, setup, "deadly", forever=True)


def dies_once_on_each(connection, setup) -> None:
    """Is killed when it first scores something of a shard, whoever tries again is not."""
    _patched(connection, setup, "", forever=False)


def _patched(connection, setup, name: str, forever: bool) -> None:
    folder = Path(setup.recipe["output"]).parent / "died"

    def deadly(score, workshop, what, *arguments, **options):
        mark = folder / what.path.replace("/", "_")
        if name in what.path and (forever or not mark.exists()):
            folder.mkdir(exist_ok=True)
            with mark.open("a") as file:
                file.write("died\n")
            os.kill(os.getpid(), signal.SIGKILL)
        return score(workshop, what, *arguments, **options)

    worker.score_anew_or_stored = partial(deadly, score_anew_or_stored)
    worker.score_part = partial(deadly, worker.score_part)
    worker.main(connection, setup)


def slow(connection, setup) -> None:
    """Takes its time over every window, and leaves its number."""
    folder = Path(setup.recipe["output"]).parent / "pids"
    folder.mkdir(exist_ok=True)
    (folder / str(os.getpid())).write_text("")

    def after_a_while(*arguments, **options):
        time.sleep(0.3)
        return score_windows(*arguments, **options)

    shard.score_windows = after_a_while
    worker.main(connection, setup)


def killed_while_it_starts(connection, setup) -> None:
    os.kill(os.getpid(), signal.SIGKILL)
