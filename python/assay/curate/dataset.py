"""The score tables of a folder as one `pyarrow.dataset.Dataset`, whose rows say which shard they are of."""

from __future__ import annotations

import logging

import pyarrow as pa
import pyarrow.dataset as pads
import pyarrow.fs as pafs

from assay.corpus.errors import CorpusError
from assay.corpus.layout import table_path
from assay.corpus.score_files import table_schema
from assay.corpus.scores_folder import Scores, State, open_scores
from assay.corpus.storage import Store
from assay.curate.whole import scored_shards

log = logging.getLogger("assay")

SHARD = "shard"
_ADVICE = "pass partial=True to read the others"


def open_dataset(scores_url: str, corpus_path: str | None = None, partial: bool = False) -> pads.Dataset:
    """`shard`, `row`, `id` and every score of the shards that are done; see `assay.read`."""
    scores = open_scores(scores_url, corpus_path)
    if not partial:
        _refuse_partial(scores)
    done = [status.shard for status in scores.of(State.DONE)]
    if not done:
        raise CorpusError(f"{scores.store.url}: no shard of {scores.corpus_path} is scored as it is now")
    for status in scores.shards:
        if status.state is not State.DONE:
            log.warning("%s is left out: %s", status.shard.path, status.detail or status.state.value)
    files, form = _file_system(scores.store), pads.ParquetFileFormat()
    fragments = [
        # Arrow gives a column that a file lacks the value that this says it has.
        form.make_fragment(scores.store.full(table_path(shard)), files, pads.field(SHARD) == shard.path)
        for shard in done
    ]
    return pads.FileSystemDataset(fragments, _schema(scores, table_path(done[0])), form, files)


def _refuse_partial(scores: Scores) -> None:
    try:
        scored_shards(scores)
    except CorpusError as error:
        raise CorpusError(f"{error}; or {_ADVICE}") from error
    if unreadable := scores.of(State.UNREADABLE):
        raise CorpusError(
            f"{scores.store.url}: {len(unreadable)} of {len(scores.shards)} shards could not be read "
            f"({unreadable[0].shard.path}: {unreadable[0].detail}), so none of their rows has scores; {_ADVICE}"
        )


def _schema(scores: Scores, path: str) -> pa.Schema:
    """The tables' columns behind `shard`. Each says which end of it to keep; what a table says of its own run stays
    there."""
    own = table_schema(scores.store, path)
    if SHARD in own.names:
        raise CorpusError(f"{scores.store.url}: has a score {SHARD!r}, which is what the shards' column is called")
    return pa.schema([pa.field(SHARD, pa.string(), nullable=False), *own])


def _file_system(store: Store) -> pafs.FileSystem:
    return pafs.LocalFileSystem() if store.is_local else pafs.PyFileSystem(pafs.FSSpecHandler(store.fs))
