"""A scores folder of texts or images with the numbers that a test wants, which no engine had to compute."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from assay.corpus.footer import Identity
from assay.corpus.shards import find_shards
from assay.corpus.storage import Store
from tests.small_scores import Column, write_manifest, write_table


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
    columns = list(columns) or [Column(name) for name in scores]
    ids = [str(rows["id"][i]) if "id" in rows else f"{shard.path}:{i}" for i in range(total)]
    values = {name: np.asarray(numbers, np.float32) for name, numbers in scores.items()}
    write_table(store, shard, identity, ids, values, columns, quarantined, row_group_size=1000)
    write_manifest(store, identity, data, [column.name for column in columns])
    return root / "scores"
