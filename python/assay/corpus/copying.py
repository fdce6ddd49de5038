"""Copying the chosen rows of a shard in the shard's own format and compression."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from assay.corpus.decompress import compressed, lines
from assay.corpus.errors import ShardError
from assay.corpus.readers import open_arrow, record_batches, shard_errors
from assay.corpus.score_files import regroup
from assay.corpus.shards import STATE, Corpus, Shard
from assay.corpus.storage import Store

_MAX_GROUP_ROWS = 1 << 16


def copy_rows(shard: Shard, keep: npt.NDArray[np.bool_], target: Store) -> None:
    """Write the rows for which ``keep`` is true to the same relative path under ``target``.

    ``keep`` holds one value per physical row; a shard of another length is a ShardError, and then nothing
    appears. Parquet keeps its schema, metadata and codecs; JSONL lines are copied byte for byte; Arrow files
    and streams stay what they are, uncompressed except `.feather` (lz4, as its own writer has it), since
    Arrow does not tell its codec.
    """
    copy = {"parquet": _copy_parquet, "arrow": _copy_arrow, "jsonl": _copy_lines}[shard.format]
    with shard.store.open(shard.path) as source, target.write(shard.path) as file:
        copy(shard, source, keep, file)


def _copy_lines(shard: Shard, source: BinaryIO, keep: npt.NDArray[np.bool_], file: BinaryIO) -> None:
    seen = 0
    with compressed(file, shard.compression) as out, shard_errors():
        for seen, line in enumerate(lines(source, shard.compression), start=1):
            if seen <= len(keep) and keep[seen - 1]:
                out.write(line + b"\n")
    _check_length(seen, keep)


def _copy_parquet(shard: Shard, source: BinaryIO, keep: npt.NDArray[np.bool_], file: BinaryIO) -> None:
    with shard_errors():
        original = pq.ParquetFile(source)
    schema, facts = original.schema_arrow, original.metadata
    group_rows = _MAX_GROUP_ROWS
    if facts.num_row_groups:
        group_rows = min(group_rows, max(1, facts.row_group(0).num_rows))
    with pq.ParquetWriter(file, schema, compression=_codecs(facts)) as writer:
        for table in regroup(_kept_batches(shard, source, keep), schema, group_rows):
            writer.write_table(table)


def _codecs(facts: pq.FileMetaData) -> str | dict[str, str]:
    if not facts.num_row_groups:
        return "snappy"  # a file without rows used none
    group = facts.row_group(0)
    columns = [group.column(i) for i in range(group.num_columns)]
    return {c.path_in_schema: "NONE" if c.compression == "UNCOMPRESSED" else c.compression for c in columns}


def _copy_arrow(shard: Shard, source: BinaryIO, keep: npt.NDArray[np.bool_], file: BinaryIO) -> None:
    with shard_errors():
        is_file = source.read(6) == b"ARROW1"
        source.seek(0)
        schema, _ = open_arrow(source)
    source.seek(0)
    codec = "lz4" if shard.path.lower().endswith(".feather") else None
    options = pa.ipc.IpcWriteOptions(compression=codec)
    create = pa.ipc.new_file if is_file else pa.ipc.new_stream
    with create(file, schema, options=options) as writer:
        for batch in _kept_batches(shard, source, keep):
            writer.write_batch(batch)


def _kept_batches(shard: Shard, source: BinaryIO, keep: npt.NDArray[np.bool_]) -> Iterator[pa.RecordBatch]:
    seen = 0
    with shard_errors():
        for batch, _ in record_batches(source, shard):
            mask = keep[seen : seen + batch.num_rows]
            seen += batch.num_rows
            if len(mask) == batch.num_rows and mask.any():
                yield batch.filter(pa.array(mask))
    _check_length(seen, keep)


def _check_length(seen: int, keep: npt.NDArray[np.bool_]) -> None:
    if seen != len(keep):
        raise ShardError(f"has {seen} rows, but {len(keep)} were scored or quarantined; score it again")


def copy_sidecars(corpus: Corpus, target: Store, rule: str) -> None:
    """Copy what makes Arrow files a saved data set, so that the curated copy loads as one.

    Its state gets a fingerprint of its own, since `datasets` caches results by it; sizes that are no longer
    true are left out.
    """
    for path in corpus.sidecars:
        content: Any = json.loads(corpus.store.read_text(path))
        if path.rsplit("/", 1)[-1] == STATE:
            origin = f"{content.get('_fingerprint')}:{rule}"
            content["_fingerprint"] = hashlib.sha256(origin.encode()).hexdigest()[:16]
        for stale in ("splits", "dataset_size", "size_in_bytes", "download_size"):
            if path.endswith("dataset_info.json"):
                content.pop(stale, None)
        target.write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")
