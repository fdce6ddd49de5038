"""Workers with which something is the matter, by names that a new process can import."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from functools import partial
from pathlib import Path

from assay.engine import fitting, pool, shard, worker
from assay.engine.reranking import score_unit
from assay.engine.shard import score_windows
from assay.recipe import models

SMALL_WINDOW, SMALL_PART = 90, 7


def small_windows(connection) -> None:
    """Cuts shards into blocks that a test can afford to have several of."""
    shard.WINDOW_ROWS = SMALL_WINDOW
    worker.main(connection)


def dies_on_deadly(connection) -> None:
    """Is killed in the middle of every shard called `deadly`."""
    _patched(connection, "deadly", forever=True)


def dies_once_on_each(connection) -> None:
    """Is killed when it first scores something of a shard, whoever tries again is not."""
    _patched(connection, "", forever=False)


def _patched(connection, name: str, forever: bool) -> None:
    setup = connection.recv()
    folder = Path(setup.recipe["output"]).parent / "died"

    def deadly(score, workshop, what, *arguments, **options):
        mark = folder / what.path.replace("/", "_")
        if name in what.path and (forever or not mark.exists()):
            folder.mkdir(exist_ok=True)
            with mark.open("a") as file:
                file.write("died\n")
            os.kill(os.getpid(), signal.SIGKILL)
        return score(workshop, what, *arguments, **options)

    worker.score_unit = partial(deadly, score_unit)
    worker.score_part = partial(deadly, worker.score_part)
    worker.serve(connection, setup)


def slow(connection) -> None:
    """Takes its time over every window, and leaves its number."""
    setup = connection.recv()
    folder = Path(setup.recipe["output"]).parent / "pids"
    folder.mkdir(exist_ok=True)
    (folder / str(os.getpid())).write_text("")

    def after_a_while(*arguments, **options):
        time.sleep(0.3)
        return score_windows(*arguments, **options)

    shard.score_windows = after_a_while
    worker.serve(connection, setup)


def killed_while_it_starts(connection) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def finds_another_model(connection) -> None:
    """Loads a model that was overwritten meanwhile."""
    setup = connection.recv()
    models = {name: Path(spec["path"]) for name, spec in setup.recipe["models"].items()}
    other = models["b"].with_name(f"{os.getpid()}")
    other.write_bytes(models["ref"].read_bytes())
    other.replace(models["b"])
    worker.serve(connection, setup)


def reads_no_model_for_its_hash(connection) -> None:
    """Takes the hashes of whoever started it, or fails."""
    models.sha256 = None
    worker.main(connection)


def dies_before_it_listens(connection) -> None:
    time.sleep(0.5)
    os._exit(3)


def tells_of_parts(connection) -> None:
    """Fits in small parts, and says of each that it is made."""
    _small_parts(connection, deadly=False)


def dies_once_in_a_fit(connection) -> None:
    """As ``tells_of_parts``; the first to make a third part is killed as it does."""
    _small_parts(connection, deadly=True)


def _small_parts(connection, deadly: bool) -> None:
    setup = connection.recv()
    root = Path(setup.recipe["output"]).parent
    made, number = fitting.Together._made, 0

    def told(together, path, *how):
        nonlocal number
        number += 1
        with (root / "made").open("a") as file:
            file.write(f"{path}\n")
        if deadly and number == 3:
            with contextlib.suppress(FileExistsError):
                (root / "died").mkdir()
                os.kill(os.getpid(), signal.SIGKILL)
        return made(together, path, *how)

    fitting.Together._made, pool.PART_SAMPLES = told, SMALL_PART
    worker.serve(connection, setup)
