"""A scores folder of texts or images with the numbers that a test wants, which no engine had to compute."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from assay.corpus.footer import Footer, Identity, InputFacts, RowCounts
from assay.corpus.layout import quarantine_path, table_path
from assay.corpus.quarantine import list_digest
from assay.corpus.shards import find_shards
from assay.corpus.storage import Store
from assay.corpus.tables import make_table


class Column(NamedTuple):
    name: str
    keep: str = "high"
    description: str = "a number"
    width: int | None = 1


def make_scores(
    root: Path,
    rows: Mapping[str, Sequence[Any]],
    scores: Mapping[str, Sequence[float]],
    *,
    columns: Sequence[Column] = (),
    task: Mapping[str, Any] | None = None,
    quarantined: Sequence[tuple[int, str]] = (),
    recipe: Mapping[str, Any] | None = None,
    models: Mapping[str, str] | None = None,
    name: str = "a.parquet",
) -> Path:
    """``root/scores`` over ``root/data``, one shard of these columns. ``quarantined``: rows and why."""
    data, store = root / "data", Store.at(str(root / "scores"))
    data.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(dict(rows)), data / name)
    total = len(next(iter(rows.values())))
    held = [{"seed": 0, "task": dict(task or {"kind": "causal_lm", "text_column": "text"})}, recipe or {}]
    identity = Identity(recipe=held[0] | dict(held[1]), models=dict(models or {}))
    (shard,) = find_shards(str(data)).shards
    listed = [{"shard": shard.path, "row": row, "id": None, "reason": reason} for row, reason in quarantined]
    if listed:
        store.write_text(quarantine_path(shard), "".join(json.dumps(row) + "\n" for row in listed))
    left = np.setdiff1d(np.arange(total), [row for row, _ in quarantined])
    found = shard.fingerprint()
    facts = InputFacts(path=shard.path, rows=total, size=found.size, mtime_ns=found.mtime_ns)
    counts = RowCounts(scored=len(left), quarantined=len(listed))
    footer = Footer.make(identity, facts, counts, list_digest(store, shard), {}, {})
    columns = list(columns) or [Column(name) for name in scores]
    ids = [str(rows["id"][i]) if "id" in rows else f"{shard.path}:{i}" for i in left]
    values = {name: np.asarray(numbers, np.float32)[left] for name, numbers in scores.items()}
    table = make_table(left, ids, values, columns, footer.to_json())
    with store.write(table_path(shard)) as file:
        pq.write_table(table, file, row_group_size=1000)
    manifest = identity.model_dump() | {"corpus": str(data), "columns": [{"name": column.name} for column in columns]}
    store.write_text("manifest.json", json.dumps(manifest))
    return root / "scores"
