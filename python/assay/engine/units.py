"""The units of work that a run by several workers hands out: shards, or parts of large ones."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from assay.corpus.footer import Footer
from assay.corpus.shards import Shard
from assay.engine.plan import Plan
from assay.engine.shard import Share

# A shard smaller than this is not worth reading several times.
SPLIT_BYTES = 32 << 20

Outcome = tuple[Footer, bool] | str
"""A table's footer and whether it came of stored features, or why the shard cannot be read."""


def units_at_most(plan: Plan, sizes: Mapping[Shard, int], workers: int) -> int:
    """How many units there may be of shards of these sizes, for so many workers."""
    total = sum(sizes.values())
    return sum(shares(plan, size, total, workers) for size in sizes.values())


def sizes_of(shards: Sequence[Shard]) -> dict[Shard, int]:
    """Their bytes; 0 of one that is not there."""
    sizes = {}
    for shard in shards:
        sizes[shard] = 0
        with contextlib.suppress(OSError):
            sizes[shard] = shard.as_found().size
    return sizes


def shares(plan: Plan, size: int, total: int, workers: int) -> int:
    """Into how many parts a shard is cut: as many as there are workers if it would keep one of them busy too long.

    One whose rows are compared in groups stays whole: the last of them need rows before them. So does one of which a
    shortlist has a few.
    """
    whole = plan.recipe.task.group_rows is not None or plan.shortlist is not None
    return workers if not whole and size >= SPLIT_BYTES and 2 * workers * size > total else 1


@dataclass
class Job:
    """A unit and what became of it so far."""

    shard: Shard
    size: float
    share: Share = field(default_factory=Share)
    path: str | None = None
    """Where its part is being staged; None while it is not, and of a whole shard."""
    deaths: int = 0
    began: bool = False
    rows: int = 0
    reached: float = 0.0
