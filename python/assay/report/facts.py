"""What a scores folder says of its own making: rows, shards, quarantine, recipe, models, when and by which version."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from assay.corpus.footer import canonical_hash, find_table
from assay.corpus.layout import table_path
from assay.corpus.quarantine import read_quarantine
from assay.corpus.scores_folder import Scores, State
from assay.corpus.shards import Shard

_MOST_REASONS = 1000
OTHER_REASONS = "other reasons"


@dataclass(frozen=True)
class Facts:
    """Of the shards that are done.

    Attributes:
        left_out: the other shards, and why.
        reasons: why rows are in quarantine, the commonest first; numbers in them are N.
        written: when the first and the last table was, in seconds; empty where the file system does not say.
    """

    corpus: str
    folder: str
    shards: int
    rows: int
    quarantined: int
    left_out: Mapping[str, str]
    reasons: Sequence[tuple[str, int]]
    versions: Sequence[str]
    written: Sequence[float]
    recipe: Mapping[str, Any]
    recipe_hash: str
    models: Mapping[str, str]


def gather(scores: Scores) -> Facts:
    """Read the tables' footers and the lists of quarantined rows."""
    done = scores.of(State.DONE)
    tables = [status.table for status in done if status.table is not None]
    versions = set(scores.store.map(partial(_version, scores), (status.shard for status in done)))
    times = scores.store.times(table_path(status.shard) for status in done)
    known = [time for time in times.values() if time is not None]
    reasons: Counter[str] = Counter()
    for status in done:
        if status.table is not None and status.table.quarantined:
            _count_reasons(scores, status.shard, reasons)
    return Facts(
        corpus=scores.corpus_path,
        folder=scores.store.url,
        shards=len(scores.shards),
        rows=sum(table.rows for table in tables),
        quarantined=sum(table.quarantined for table in tables),
        left_out={s.shard.path: s.detail or s.state.value for s in scores.shards if s.state is not State.DONE},
        reasons=reasons.most_common(),
        versions=sorted(version for version in versions if version),
        written=[min(known), max(known)] if known else [],
        recipe=scores.identity.recipe,
        recipe_hash=canonical_hash(scores.identity.recipe),
        models=scores.identity.models,
    )


def _version(scores: Scores, shard: Shard) -> str:
    table = find_table(scores.store, shard)
    return "" if table is None else table.footer.version


def _count_reasons(scores: Scores, shard: Shard, reasons: Counter[str]) -> None:
    for entry in read_quarantine(scores.store, shard):
        # Reasons speak of their row's lengths and values; so many kinds as these must not fill the memory.
        kind = re.sub(r"\d+(?:[.,]\d+)*", "N", entry.reason[:300])
        reasons[kind if kind in reasons or len(reasons) < _MOST_REASONS else OTHER_REASONS] += 1
