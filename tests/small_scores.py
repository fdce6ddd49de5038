"""A scores folder with the numbers that a test wants, which no engine had to compute."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

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
    shards: Mapping[str, Mapping[str, np.ndarray]],
    columns: Mapping[str, Column] | None = None,
    name: str = "scores",
    without: Mapping[str, Sequence[int]] | None = None,
) -> str:
    """``root/<name>`` over ``root/data``, whose shards are Parquet files with ids: by shard, each score's values.

    ``without``: by shard, rows that were quarantined.
    """
    columns = dict(columns or {})
    for scores in shards.values():
        columns |= {name: Column(name) for name in scores if name not in columns}
    identity = Identity(recipe={"seed": 0}, models={})
    for stem, scores in shards.items():
        rows = len(next(iter(scores.values())))
        path = root / "data" / f"{stem}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            pq.write_table(pa.table({"id": [f"{stem}-{i}" for i in range(rows)]}), path)
    for shard in find_shards(str(root / "data")).shards:
        scores, print_ = shards[shard.stem], shard.fingerprint()
        rows = len(next(iter(scores.values())))
        facts = InputFacts(path=shard.path, rows=rows, size=print_.size, mtime_ns=print_.mtime_ns)
        left = np.setdiff1d(np.arange(rows), (without or {}).get(shard.stem, []))
        counts = RowCounts(scored=len(left), quarantined=rows - len(left))
        if len(left) < rows:
            listed = [{"shard": shard.path, "row": i, "id": None, "reason": "bad"} for i in without[shard.stem]]
            (root / name / quarantine_path(shard)).parent.mkdir(parents=True, exist_ok=True)
            (root / name / quarantine_path(shard)).write_text("".join(json.dumps(row) + "\n" for row in listed))
        footer = Footer.make(identity, facts, counts, list_digest(Store.at(str(root / name)), shard), {}, {})
        values = {score: np.asarray(numbers)[left] for score, numbers in scores.items()}
        ids = [f"{shard.stem}-{i}" for i in left]
        table = make_table(left, ids, values, [columns[score] for score in scores], footer.to_json())
        (root / name / table_path(shard)).parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(table, root / name / table_path(shard), compression="zstd", use_dictionary=False)
    manifest = identity.model_dump() | {
        "corpus": str(root / "data"),
        "columns": [{"name": score} for score in columns],
    }
    (root / name / "manifest.json").write_text(json.dumps(manifest))
    return str(root / name)
