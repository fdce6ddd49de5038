"""Copying the chosen rows of a shard in the shard's own format and compression."""

from __future__ import annotations

import shutil

from assay.corpus import saved_data_sets
from assay.corpus.format import Mask, check_length
from assay.corpus.readers import opened, shard_errors
from assay.corpus.shards import Corpus, Shard
from assay.corpus.storage import Store


def copy_rows(shard: Shard, keep: Mask, target: Store) -> None:
    """Write the rows for which ``keep`` is true to the same relative path under ``target``.

    ``keep`` holds one value per physical row; a shard of another length is a ShardError, and then nothing
    appears. Parquet keeps its schema, metadata and codecs; JSONL lines are copied byte for byte; Arrow files
    and streams stay what they are, uncompressed except `.feather` (lz4, as its own writer has it), since
    Arrow does not tell its codec. Of a folder of files, the chosen ones are copied one by one.
    """
    if shard.format.copy is None:
        return _copy_files(shard, keep, target)
    with opened(shard) as source, target.write(shard.path) as file, shard_errors():
        shard.format.copy(source, keep, file)


def _copy_files(shard: Shard, keep: Mask, target: Store) -> None:
    """Copy the files of a folder that are kept; others, which an earlier selection may have left, go."""
    with shard_errors():
        files = shard.files()
        check_length(len(files), keep)
        there = set(target.files())
        for path, is_kept in zip(files, keep.tolist(), strict=True):
            if is_kept:
                with shard.store.open(path) as source, target.write(path) as file:
                    shutil.copyfileobj(source, file, 1 << 20)
            elif path in there:
                target.remove(path)


def copy_sidecars(corpus: Corpus, target: Store, rule: str) -> None:
    """Copy what makes Arrow files a saved data set, so that the curated copy loads as one."""
    saved_data_sets.copy_sidecars(corpus.sidecars, corpus.store, target, rule)
