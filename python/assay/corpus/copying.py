"""Copying the chosen rows of a shard in the shard's own format and compression."""

from __future__ import annotations

import shutil
from collections.abc import Collection

from assay.corpus import saved_data_sets
from assay.corpus.format import Mask
from assay.corpus.named_files import files_named
from assay.corpus.readers import opened, shard_errors
from assay.corpus.shards import Corpus, Shard
from assay.corpus.storage import Store


def copy_rows(shard: Shard, keep: Mask, target: Store) -> None:
    """Write the rows for which ``keep`` is true to the same relative path under ``target``.

    ``keep`` holds one value per physical row; a shard of another length is a ShardError, and then nothing
    appears. Parquet keeps its schema, metadata and codecs; JSONL lines are copied byte for byte; Arrow files
    and streams stay what they are, uncompressed except `.feather` (lz4, as its own writer has it), since
    Arrow does not tell its codec. Of a folder of images, the chosen files are copied.
    """
    if shard.is_folder:
        target.refuse_detours([f"{shard.path}/"])
        with shard_errors(), opened(shard) as source:
            shard.format.copy(source, keep, Store(target.fs, target.full(shard.path)))
        return
    with opened(shard) as source, target.write(shard.path) as file, shard_errors():
        shard.format.copy(source, keep, file)


def copy_named_files(shard: Shard, column: str, files: Collection[str], keep: Mask, target: Store) -> None:
    """Write those of ``files`` that the rows for which ``keep`` is true name in a column of images to the same relative
    paths under ``target``, beside the rows' own."""
    with shard_errors():
        for path in sorted(set(files_named(shard, column, keep)).intersection(files)):
            with shard.store.open(path) as source, target.write(path) as file:
                shutil.copyfileobj(source, file, 1 << 20)


def copy_sidecars(corpus: Corpus, target: Store, rule: str) -> None:
    """Copy what makes Arrow files a saved data set, so that the curated copy loads as one."""
    saved_data_sets.copy_sidecars(corpus.sidecars, corpus.store, target, rule)
