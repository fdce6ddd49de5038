"""A cut that moves with a schedule: simulated data are trusted farther as the model that makes them improves."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pyarrow as pa

from assay.select.rules import Keep, threshold
from assay.select.selection import Selection


def trust(
    table: pa.Table, by: str, progress: float, schedule: Sequence[tuple[float, float]], keep: Keep | None = None
) -> Selection:
    """Rows whose score is as good as the schedule's limit at ``progress``, or better (2410.12160).

    Args:
        table: with the column ``by``, a distance to real data or, better, its rank among real samples'
            (``methods.OODFilter``), of which 1 keeps all.
        progress: how far the model has come, in any unit that grows: rounds, steps, minus a held-out loss.
        schedule: (progress, limit) pairs, by ascending progress. Between two of them the limit lies on the straight
            line; before the first and behind the last it is theirs.
        keep: the better end, if not as the table says.

    Raises:
        ValueError: no pairs, one that is not finite, pairs whose progress does not ascend, or a progress of NaN.
    """
    pairs = [(float(at), float(limit)) for at, limit in schedule]
    if not pairs or not all(math.isfinite(value) for pair in pairs for value in pair):
        raise ValueError(f"schedule={list(schedule)}: expected pairs of progress and limit, all finite")
    steps, limits = zip(*pairs, strict=True)
    if any(later <= earlier for earlier, later in pairwise(steps)):
        raise ValueError(f"schedule: expected progress that ascends, got {list(steps)}")
    if math.isnan(progress):
        raise ValueError("progress=nan: expected a number")
    limit = float(np.interp(progress, steps, limits))
    told = f"{by}, trusted to {limit:.6g} at progress {progress:g}"
    return replace(threshold(table, by, limit, keep), rule=told, facts={"progress": float(progress)})
