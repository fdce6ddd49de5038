"""What a scores folder says of its own making: rows, shards, quarantine, recipe, models, when and by which version."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from assay.corpus.footer import Tally, canonical_hash, find_table
from assay.corpus.layout import MANIFEST, table_path
from assay.corpus.quarantine import read_quarantine
from assay.corpus.scores_folder import Scores, ShardStatus, State
from assay.corpus.shards import Shard

_MOST_REASONS = 1000
_MOST_FAULTY = 8
OTHER_REASONS = "other reasons"


@dataclass(frozen=True)
class Facts:
    """Of the shards that are done.

    Attributes:
        left_out: the other shards, and why.
        reasons: why rows are in quarantine, the commonest first; numbers in them are N.
        faulty: shards with rows in quarantine, those with most first: path, rows, and how many are there.
        written: when each table was, in seconds, ascending, and the rows of its shard; empty where the file system
            does not say.
        began: when the manifest was written, as a runner begins; None where that is not known.
        warnings: what methods warn of, and in how many shards.
    """

    corpus: str
    folder: str
    shards: int
    rows: int
    quarantined: int
    left_out: Mapping[str, str]
    reasons: Sequence[tuple[str, int]]
    faulty: Sequence[tuple[str, int, int]]
    versions: Sequence[str]
    written: Sequence[tuple[float, int]]
    began: float | None
    warnings: Sequence[tuple[str, int]]
    recipe: Mapping[str, Any]
    recipe_hash: str
    models: Mapping[str, str]


def gather(scores: Scores) -> Facts:
    """Read the tables' footers and the lists of quarantined rows."""
    done = scores.of(State.DONE)
    tables = [status.table for status in done if status.table is not None]
    versions: set[str] = set()
    warnings: Counter[str] = Counter()
    for version, warned in scores.store.map(partial(_said, scores), (status.shard for status in done)):
        versions.add(version)
        warnings.update(text for text in warned if text in warnings or len(warnings) < _MOST_REASONS)
    times = scores.store.times([MANIFEST, *(table_path(status.shard) for status in done)])
    timed = ((times[table_path(status.shard)], status.table) for status in done)
    written = sorted((time, table.rows) for time, table in timed if time is not None and table is not None)
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
        faulty=_faulty(done),
        versions=sorted(version for version in versions if version),
        written=written,
        began=times[MANIFEST],
        warnings=warnings.most_common(),
        recipe=scores.identity.recipe,
        recipe_hash=canonical_hash(scores.identity.recipe),
        models=scores.identity.models,
    )


def _said(scores: Scores, shard: Shard) -> tuple[str, list[str]]:
    """The version that a table was written by, and what its methods warn of."""
    table, tally = find_table(scores.store, shard), Tally()
    if table is None:
        return "", []
    tally.add(table.footer)
    return table.footer.version, [_warning(key, text)[:600] for key, text in tally.warnings.items()]


def _warning(key: str, text: str) -> str:
    name, _, kind = key.rpartition(".")
    return f"{name} leaves out {text}" if kind == "left_out_layers" else f"{name}: {text}"


def _faulty(done: Sequence[ShardStatus]) -> list[tuple[str, int, int]]:
    found = ((its.shard.path, its.table.rows, its.table.quarantined) for its in done if its.table)
    return sorted((its for its in found if its[2]), key=lambda its: -its[2])[:_MOST_FAULTY]


def _count_reasons(scores: Scores, shard: Shard, reasons: Counter[str]) -> None:
    for entry in read_quarantine(scores.store, shard):
        # Reasons speak of their row's lengths and values; so many kinds as these must not fill the memory.
        kind = re.sub(r"\d+(?:[.,]\d+)*", "N", entry.reason[:300])
        reasons[kind if kind in reasons or len(reasons) < _MOST_REASONS else OTHER_REASONS] += 1
