"""A scores folder with the numbers that a test wants, which no engine had to compute."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from assay.corpus.footer import Footer, Identity, InputFacts, RowCounts
from assay.corpus.layout import quarantine_path, table_path
from assay.corpus.named_files import FileFacts
from assay.corpus.quarantine import list_digest
from assay.corpus.shards import Shard, find_shards
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
    identity, store = Identity(recipe={"seed": 0}, models={}), Store.at(str(root / name))
    for stem, scores in shards.items():
        rows = len(next(iter(scores.values())))
        path = root / "data" / f"{stem}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            pq.write_table(pa.table({"id": [f"{stem}-{i}" for i in range(rows)]}), path)
    for shard in find_shards(str(root / "data")).shards:
        scores = shards[shard.stem]
        rows = len(next(iter(scores.values())))
        bad = [(i, "bad") for i in (without or {}).get(shard.stem, [])]
        ids = [f"{shard.stem}-{i}" for i in range(rows)]
        write_table(store, shard, identity, ids, scores, [columns[score] for score in scores], bad)
    write_manifest(store, identity, root / "data", columns)
    return str(root / name)


def write_table(
    store: Store,
    shard: Shard,
    identity: Identity,
    ids: Sequence[str],
    scores: Mapping[str, Any],
    columns: Sequence[Column],
    quarantined: Sequence[tuple[int, str]] = (),
    files: FileFacts | None = None,
    **options: Any,
) -> None:
    """A shard's table of all its rows but those in quarantine, which are listed with their reasons."""
    total, found = len(ids), shard.fingerprint()
    listed = [{"shard": shard.path, "row": row, "id": None, "reason": reason} for row, reason in quarantined]
    if listed:
        store.write_text(quarantine_path(shard), "".join(json.dumps(row) + "\n" for row in listed))
    left = np.setdiff1d(np.arange(total), [row for row, _ in quarantined])
    facts = InputFacts(path=shard.path, rows=total, size=found.size, mtime_ns=found.mtime_ns, files=files)
    counts = RowCounts(scored=len(left), quarantined=total - len(left))
    footer = Footer.make(identity, facts, counts, list_digest(store, shard), {}, {})
    values = {name: np.asarray(numbers)[left] for name, numbers in scores.items()}
    table = make_table(left, [ids[i] for i in left], values, columns, footer.to_json())
    with store.write(table_path(shard)) as file:
        pq.write_table(table, file, compression="zstd", use_dictionary=False, **options)


def write_manifest(store: Store, identity: Identity, corpus: Path, columns: Iterable[str]) -> None:
    manifest = identity.model_dump() | {"corpus": str(corpus), "columns": [{"name": name} for name in columns]}
    store.write_text("manifest.json", json.dumps(manifest))
