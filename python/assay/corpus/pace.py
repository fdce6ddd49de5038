"""How fast a run gets on, told from the files that it writes: no runner reports to anybody.

The manifest is written when a runner begins to score, the claim when the first of several begins, a table when its
shard is done. All three times are the file system's own. If its clock goes backwards in between, nothing is known.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence
from dataclasses import dataclass

from assay.corpus.claim import CLAIM, is_claimed
from assay.corpus.layout import MANIFEST, table_path
from assay.corpus.scores_folder import Scores, ShardStatus, State


@dataclass(frozen=True)
class Pace:
    """What the files tell of a run. None: they do not tell."""

    running: bool | None
    """Whether a run is writing into the folder; None elsewhere than on a local file system with locks."""
    rows_per_second: float | None = None
    """Of all runners together, quarantined rows included, since the last of them began."""
    seconds_left: float | None = None
    """Until every shard that can be read has its table, at this pace by the shards' bytes."""
    idle_seconds: float | None = None
    """Since the last table was written."""


def measure_pace(scores: Scores) -> Pace:
    """Look at the times of a folder's tables."""
    running = is_claimed(scores.store)
    if running is False:
        return Pace(running)
    done = scores.of(State.DONE)
    paths = [table_path(status.shard) for status in done]
    written = scores.store.times([*paths, MANIFEST, CLAIM])
    times = [written[path] for path in paths]
    newest = max((at for at in times if at is not None), default=None)
    if newest is None:
        return Pace(running)
    idle = time.time() - newest
    began = _begin(written[MANIFEST], written[CLAIM], newest)
    if began is None:
        return Pace(running, idle_seconds=idle if idle >= 0 else None)
    fresh = [status for status, at in zip(done, times, strict=True) if at is not None and began < at]
    seconds = newest - began
    rows = sum(status.table.rows for status in fresh if status.table)
    size = sum(status.table.input.size for status in fresh if status.table)
    left = _bytes_left(scores.shards)
    return Pace(
        running,
        rows / seconds,
        None if left is None or not size else left / (size / seconds),
        idle if idle >= 0 else None,
    )


def _begin(manifest: float | None, claim: float | None, newest: float) -> float | None:
    """The last beginning of a runner after which a table was written."""
    return next((at for at in (manifest, claim) if at is not None and at < newest), None)


def _bytes_left(shards: Sequence[ShardStatus]) -> int | None:
    """Of the shards that are to be scored; None if one of them cannot be looked at."""
    left = 0
    with contextlib.suppress(OSError):
        for status in shards:
            if status.state in (State.MISSING, State.CHANGED):
                left += status.shard.as_found().size
        return left
    return None
