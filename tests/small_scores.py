"""A scores folder with the numbers that a test wants, which no engine had to compute."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from assay.corpus.footer import Footer, Identity, InputFacts, RowCounts
from assay.corpus.layout import table_path
from assay.corpus.shards import find_shards
from assay.corpus.tables import make_table


class Column(NamedTuple):
    name: str
    keep: str = "high"
    description: str = "a number"
    width: int | None = 1


def make_scores(
    root: Path, shards: Mapping[str, Mapping[str, np.ndarray]], columns: Mapping[str, Column] | None = None
) -> str:
    """``root/scores`` over ``root/data``, whose shards are Parquet files with ids: by shard, each score's values."""
    columns = dict(columns or {})
    for scores in shards.values():
        columns |= {name: Column(name) for name in scores if name not in columns}
    identity = Identity(recipe={"seed": 0}, models={})
    for name, scores in shards.items():
        rows = len(next(iter(scores.values())))
        path = root / "data" / f"{name}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.table({"id": [f"{name}-{i}" for i in range(rows)]}), path)
    for shard in find_shards(str(root / "data")).shards:
        scores, print_ = shards[shard.stem], shard.fingerprint()
        rows = len(next(iter(scores.values())))
        facts = InputFacts(path=shard.path, rows=rows, size=print_.size, mtime_ns=print_.mtime_ns)
        footer = Footer.make(identity, facts, RowCounts(scored=rows, quarantined=0), {}, {})
        ids = [f"{shard.stem}-{i}" for i in range(rows)]
        table = make_table(np.arange(rows), ids, scores, [columns[name] for name in scores], footer.to_json())
        (root / "scores" / table_path(shard)).parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(table, root / "scores" / table_path(shard), compression="zstd", use_dictionary=False)
    manifest = identity.model_dump() | {
        "corpus": str(root / "data"),
        "columns": [{"name": name} for name in columns],
    }
    (root / "scores/manifest.json").write_text(json.dumps(manifest))
    return str(root / "scores")
