"""Lance data sets: a folder that Lance's own library reads, where it is installed; deleted rows are no rows.

A manifest may name files in other places, which the library would fetch: only data sets that lie whole in a folder of
this machine are read.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from typing import Any

import pyarrow as pa

from assay.corpus import format as limits
from assay.corpus.arrow_values import extension_name
from assay.corpus.columnar import Piece, chunks_of_columns, counted, filtered
from assay.corpus.dotted import fields_below
from assay.corpus.errors import ShardError
from assay.corpus.facts import facts_of_schema
from assay.corpus.format import Chunk, ColumnFacts, Format, Mask, Source, check_length
from assay.corpus.storage import Fingerprint, Store

_READ_AHEAD_BYTES = 32 << 20
# Of such columns the library gives descriptions, or bytes from wherever a description says.
_BLOB = b"lance-encoding:blob"
# What the library writes has a new name each time.
_OWN_FILES = re.compile(r"data/[^/]+\.lance|_versions/[^/]+\.manifest|_transactions/[^/]+\.txn")


def _files(store: Store, folder: str) -> dict[str, Fingerprint | None]:
    """Every file of the data set, relative to it. An OSError if there are none."""
    files = Store(store.fs, store.full(folder)).files()
    if not files:
        raise FileNotFoundError(f"{store.full(folder)}: no file in it")
    return dict.fromkeys(files)


def _read(source: Source, columns: Sequence[str]) -> Iterator[Chunk]:
    with _opened(source) as data:
        yield from chunks_of_columns(data.schema, columns, lambda whole: _pieces(data, whole))


def _facts(source: Source) -> dict[str, ColumnFacts]:
    with _opened(source) as data:
        return facts_of_schema(data.schema)


def _copy(source: Source, keep: Mask, target: Store) -> None:
    if not target.is_local:
        raise ShardError("is a Lance data set, which can be copied to a local folder only")
    with _opened(source) as data:
        check_length(data.count_rows(), keep)
        if os.path.exists(target.root):  # an earlier selection's; Lance would keep its rows as an old version
            shutil.rmtree(target.root)
        chosen = pa.RecordBatchReader.from_batches(data.schema, filtered(_pieces(data, data.schema.names), keep))
        version = data.data_storage_version
        _library().write_dataset(chosen, target.root, data_storage_version=version)


def _pieces(data: Any, columns: Sequence[str]) -> Iterator[Piece]:
    bounds = {"batch_readahead": 1, "fragment_readahead": 1, "io_buffer_size": _READ_AHEAD_BYTES}
    scanner = data.scanner(columns=list(columns), batch_size=limits.CHUNK_ROWS, scan_in_order=True, **bounds)
    return counted(scanner.to_batches(), data.count_rows(), "manifest")


@contextlib.contextmanager
def _opened(source: Source) -> Iterator[Any]:
    """The data set, if it is whole in its folder; what the library raises, a panic included, is a ShardError."""
    assert source.folder is not None
    if not source.folder.store.is_local:
        raise ShardError("is a Lance data set, which is read from a local folder only; copy it to one")
    library = _library()
    try:
        data = library.dataset(source.folder.store.root)
        _check(data)
        yield data
    except BaseException as error:
        if not isinstance(error, RuntimeError) and type(error).__name__ != "PanicException":
            raise
        raise ShardError(f"Lance cannot read it: {' '.join(str(error).split())[:200]}") from error


def _library() -> Any:
    try:
        return importlib.import_module("lance")
    except ModuleNotFoundError as error:
        raise ShardError("is a Lance data set; to read it, `pip install 'assay[lance]'`") from error


def _check(data: Any) -> None:
    files = [file.path for fragment in data.get_fragments() for file in fragment.metadata.files]
    elsewhere = [path for path in files if path != os.path.basename(path)]
    if data.base_paths() or elsewhere:
        raise ShardError("names files outside of its folder, which are not opened; copy it into one place with Lance")
    for field in (below for column in data.schema for _, below in fields_below((), column)):
        if _BLOB in (field.metadata or {}) or extension_name(field).startswith("lance.blob"):
            raise ShardError(f"has the blob column {field.name!r}, which is not supported; save its bytes as binary")


FORMAT = Format("lance", (".lance",), _read, _copy, _facts, files=_files, own_files=_OWN_FILES)
