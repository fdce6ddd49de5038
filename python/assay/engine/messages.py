"""What a run's workers and the process that started them say to each other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from assay.corpus.footer import Footer, Identity
from assay.corpus.shards import Corpus, Shard
from assay.engine.parts import Part
from assay.engine.shard import Share
from assay.engine.shortlist import Shortlist
from assay.engine.timing import Times
from assay.methods import Column
from assay.recipe.models import Hashed
from assay.recipe.tasks import TaskSpec


@dataclass(frozen=True)
class Setup:
    """What a worker opens its workshop with."""

    recipe: Mapping[str, Any]
    """Resolved, as plain data: the classes of its parts are made when they are first named."""
    places: Sequence[int]
    """Of its methods, in the recipe that was read."""
    task: TaskSpec
    """As the plan has it: with what the corpus's columns tell."""
    trust: Sequence[str]
    """The modules whose Python it may run."""
    identity: Identity
    shortlist: Shortlist | None
    corpora: Mapping[str, Corpus]
    """Those that methods are fitted to, by path."""
    hashed: Mapping[str, Hashed]
    """The models' files as the plan was made."""
    device: str
    threads: int
    log_level: int
    turn: tuple[int, int]
    """Its number among the run's workers, and how many they are."""
    part: tuple[int, int]
    """The plan's."""
    began: float
    """When its process was started, by ``time.perf_counter``, which all processes of a machine share."""


@dataclass(frozen=True)
class Unit:
    """A shard to score, or with a ``path`` the share of it to be staged there."""

    shard: Shard
    share: Share = field(default_factory=Share)
    path: str | None = None
    anew: bool = False
    """Whether features that an earlier run stored are not to be used."""


@dataclass(frozen=True)
class Ready:
    """The workshop is open."""

    columns: Sequence[Column]
    gathers: int | None
    times: Times


@dataclass(frozen=True)
class Began:
    """A unit has come in, and is being worked at."""


@dataclass(frozen=True)
class Advanced:
    """So many rows more, and the share of the unit that is done by now."""

    rows: int
    share: float


@dataclass(frozen=True)
class Finished:
    """A unit is done: its table, its staged part, or why its shard cannot be read."""

    outcome: Footer | Part | str
    stored: bool
    times: Times


@dataclass(frozen=True)
class Failed:
    """The run cannot go on."""

    reason: str


@dataclass(frozen=True)
class Logged:
    """A line for the log."""

    level: int
    text: str
