"""What a selection made of some rows, read from the folder that it wrote."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel, ConfigDict

from assay.corpus.errors import CorpusError
from assay.corpus.layout import MANIFEST, selection_path, table_path
from assay.corpus.scores_folder import Scores
from assay.corpus.storage import Store
from assay.curate.chosen import score_column

# Of rows that the rule was never asked about.
_BEFORE_THE_RULE = ("dropped: not: ", "dropped: has no value: ")


class _Shard(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")
    path: str
    table_sha256: str


class _Group(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")
    column: str


class _Manifest(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")
    rule: str
    by: str
    threshold: float | None = None
    facts: dict[str, float] = {}
    group: _Group | None = None
    shards: list[_Shard]


@dataclass(frozen=True)
class Fate:
    """What a selection made of a row.

    Attributes:
        by, score: what it was judged by, and the row's; None of a row in quarantine.
        threshold: where the score was cut, of its group if the rule looks at groups, if the rule cuts and the row was
            put to it.
        facts: the numbers that the rule or the condition took from all rows.
        column, group: of a rule that looks at groups, the column and the row's value, None for null.
        copies: of a mix, how often the row is in the output.
    """

    rule: str
    kept: bool
    reason: str
    by: str
    score: float | None
    threshold: float | None
    weight: float | None
    facts: dict[str, float]
    column: str | None = None
    group: str | None = None
    copies: int | None = None

    @property
    def distance(self) -> float | None:
        """How far above the threshold the score is; below it, negative."""
        if self.threshold is None or self.score is None or math.isnan(self.score):
            return None
        return self.score - self.threshold


def find_fates(scores: Scores, selection_url: str, rows: Sequence[tuple[str, int]]) -> dict[tuple[str, int], Fate]:
    """By shard and row, what a selection made of them; rows of shards that are not in it are left out.

    CorpusError if this is no selection, or not one of these scores as they are now.
    """
    store = Store.at(selection_url)
    manifest = _read_manifest(store)
    listed = {shard.path: shard.table_sha256 for shard in manifest.shards}
    shards = {status.shard.path: status.shard for status in scores.shards}
    found: dict[tuple[str, int], Fate] = {}
    for path in {path for path, _ in rows if path in listed}:
        if scores.store.sha256(table_path(shards[path])) != listed[path]:
            raise CorpusError(
                f"--selection {store.url}: made of other scores of {path} than {scores.store.url} has; select again"
            )
        wanted = [row for its, row in rows if its == path]
        for entry in _entries(store, selection_path(shards[path]), wanted):
            found[path, entry["row"]] = _fate(manifest, entry)
    return found


def _read_manifest(store: Store) -> _Manifest:
    try:
        return _Manifest.model_validate_json(store.read_text(MANIFEST))
    except FileNotFoundError as error:
        raise CorpusError(f"--selection {store.url}: no {MANIFEST}; expected a folder of `assay select`") from error
    except ValueError as error:
        raise CorpusError(f"--selection {store.full(MANIFEST)}: not a manifest of `assay select`") from error


def _entries(store: Store, path: str, rows: Sequence[int]) -> list[dict[str, Any]]:
    try:
        with store.open(path) as file:  # of its row groups only those that may hold them are read
            found = pq.read_table(file, filters=[("row", "in", list(rows))])
        if not {"row", "kept", "reason"} <= set(found.schema.names):
            raise ValueError("it does not say what was kept")
        return list(found.to_pylist())
    except (OSError, ValueError, pa.ArrowException) as error:
        raise CorpusError(f"--selection {store.full(path)}: cannot be read ({error})") from error


def _fate(manifest: _Manifest, entry: dict[str, Any]) -> Fate:
    reason, score = str(entry["reason"]), entry.get(score_column(manifest.by))
    judged = not reason.startswith(_BEFORE_THE_RULE) and not reason.endswith(" is NaN")
    threshold = (entry.get("threshold") if manifest.group else manifest.threshold) if judged else None
    weight, kept = entry.get("weight"), bool(entry["kept"])
    column = None if manifest.group is None or score is None else manifest.group.column
    its = (column, entry.get("group"), entry.get("copies"))
    return Fate(manifest.rule, kept, reason, manifest.by, score, threshold, weight, manifest.facts, *its)
