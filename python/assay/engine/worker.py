"""A worker: a process of its own that opens a workshop on its device and scores the units that it is given.

It lives as long as the process that started it: when that has gone, however it went, the pipe ends and so does this.
"""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import signal
import sys
import threading
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import torch

from assay.corpus.errors import ShardError
from assay.corpus.footer import Tally
from assay.corpus.shards import Corpus
from assay.corpus.storage import Store
from assay.engine.devices import limit_threads
from assay.engine.messages import Advanced, Began, Failed, Finished, Logged, Ready, Setup, Unit
from assay.engine.parts import gathered, score_part
from assay.engine.plan import Plan, refuse_changes
from assay.engine.reranking import score_unit
from assay.engine.timing import Times
from assay.engine.workshop import Workshop, open_workshop, settled
from assay.recipe.models import take_hashed
from assay.recipe.recipe import Recipe


def main(connection: Connection) -> None:
    """Hear what there is to work with, and work."""
    try:
        setup = connection.recv()
    except (EOFError, ConnectionError):  # nobody is left to work for
        return
    serve(connection, setup)


def serve(connection: Connection, setup: Setup) -> None:
    """Open the workshop, then score units until there are none; ``Failed`` is a worker's last word."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to every process; who started this one will end it
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    os.environ["TQDM_DISABLE"] = "1"
    speaker = _Speaker(connection)
    units: queue.SimpleQueue[Unit | None] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(connection, units), daemon=True).start()
    log_to(speaker.say, setup.log_level)
    try:
        limit_threads(setup.threads)
        workshop, output = open_for(setup)
        load = Times(load=time.perf_counter() - setup.began)
        speaker.say(Ready(workshop.columns, gathered(workshop), load))
        with settled():
            while (unit := units.get()) is not None:
                speaker.say(Began())
                speaker.say(work(workshop, output, unit, speaker.say))
    except Exception as error:
        if os.environ.get("ASSAY_DEBUG") == "1":
            logging.getLogger("assay").exception("worker on %s", setup.device)
        speaker.say(Failed(described(error)))


def open_for(setup: Setup) -> tuple[Workshop, Store]:
    """The workshop that a plan's shards are scored with, and where their tables go."""
    take_hashed(setup.hashed)
    recipe = Recipe.model_validate(setup.recipe, context={"base": "/", "trust": setup.trust})
    recipe = recipe.model_copy(update={"task": setup.task}).with_places(setup.places)
    output = Store.at(recipe.output)
    none = Corpus(Store.at(recipe.corpus.path), ())
    plan = Plan(
        recipe, setup.identity, none, setup.corpora, output, Tally(), (), (), part=setup.part, shortlist=setup.shortlist
    )
    workshop = open_workshop(plan, device=torch.device(setup.device), turn=setup.turn)
    refuse_changes(plan)  # afterwards: what was loaded is then what the plan speaks of
    return workshop, output


def work(workshop: Workshop, output: Store, unit: Unit, say: Callable[[Any], None]) -> Finished:
    """Score a unit; how far it is is said meanwhile."""

    def advance(rows: int, share: float) -> None:
        say(Advanced(rows, share))

    before, stored = vars(workshop.times).copy(), False
    outcome: Any
    try:
        if unit.path is not None:
            outcome = score_part(workshop, unit.shard, unit.share, unit.path, advance)
        else:
            outcome, stored = score_unit(workshop, unit.shard, output, advance, unit.anew)
    except ShardError as error:
        outcome = str(error)
    return Finished(outcome, stored, Times(**{part: s - before[part] for part, s in vars(workshop.times).items()}))


def described(error: Exception) -> str:
    """In one line."""
    if isinstance(error, OSError) and error.filename and error.strerror:
        return f"{error.filename}: {error.strerror}"
    return str(error) if isinstance(error, ValueError | ImportError) else f"{type(error).__name__}: {error}"


def _listen(connection: Connection, units: queue.SimpleQueue[Unit | None]) -> None:
    """Units as they come. Nobody is left to work for when the pipe ends, and nothing to tidy up that a kill would not
    leave: files appear under their names when they are whole."""
    with contextlib.suppress(EOFError, OSError):
        while True:
            units.put(connection.recv())
    os._exit(1)


class _Speaker:
    """Sends from any thread."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._lock = threading.Lock()

    def say(self, message: Any) -> None:
        with self._lock:
            self._connection.send(message)


class _Told(logging.Handler):
    def __init__(self, say: Callable[[Any], None]) -> None:
        super().__init__()
        self._say = say

    def emit(self, record: logging.LogRecord) -> None:
        self._say(Logged(record.levelno, self.format(record)))


def log_to(say: Callable[[Any], None], level: int) -> None:
    """Lines for the log are said."""
    log = logging.getLogger("assay")
    log.handlers, log.propagate = [_Told(say)], False
    log.setLevel(level)
