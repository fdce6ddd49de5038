"""Reading a shard as a stream of small chunks, whatever its format; what a damaged file raises is a ShardError."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import lzma
import os
import zlib
from collections.abc import Generator, Iterable, Iterator, Sequence

import pyarrow as pa

from assay.corpus.errors import ShardError
from assay.corpus.format import Chunk, ColumnFacts, Folder
from assay.corpus.formats import Source
from assay.corpus.saved_data_sets import features_beside
from assay.corpus.shards import Shard
from assay.corpus.storage import Store

# A file of a few bytes can unfold to any number of blank lines or nulls, each of which would be listed.
MOST_EMPTY_ROWS = 1 << 20

_DAMAGE = (
    *(OSError, EOFError, ValueError, LookupError, ArithmeticError, MemoryError, RecursionError, SystemError),
    *(pa.ArrowException, zlib.error, lzma.LZMAError),
)


def read(
    shard: Shard,
    columns: Sequence[str],
    optional: frozenset[str] = frozenset(),
    names: frozenset[str] = frozenset(),
) -> Generator[Chunk, None, None]:
    """The shard's rows in physical order, every one. ShardError if it cannot be read to its end.

    A row with keys of its own, as a JSON line, that lacks the one of an ``optional`` column has a null there; any
    other missing key is a fault of the row. The values of ``names`` are as a file without types has them: 1.10 is no
    number.
    """
    with shard_errors(), opened(shard) as opened_:
        source = dataclasses.replace(opened_, optional=optional, names=names)
        yield from _unless_empty(shard.format.read(source, columns), source.size)


def columns_of(shard: Shard) -> dict[str, ColumnFacts]:
    """The shard's columns and, after each struct, what is in it by dotted names; a few rows are read at most.

    A column that is there twice, which cannot be read, is not among them. Of a data set that `datasets` saved, the
    description beside it counts before what its files say. ShardError if the shard's beginning cannot be read.
    """
    with shard_errors(), opened(shard) as source:
        return shard.format.facts(dataclasses.replace(source, features=features_beside(shard.store, shard.folder)))


@contextlib.contextmanager
def opened(shard: Shard) -> Iterator[Source]:
    """The shard's file, open at its beginning, or its folder."""
    if shard.is_folder:
        store = Store(shard.store.fs, shard.store.full(shard.path))
        files = tuple(path[len(shard.path) + 1 :] for path in shard.files())
        yield Source(io.BytesIO(), os.path.basename(shard.path), len(files), folder=Folder(store, files, shard.classes))
        return
    with shard.store.open(shard.path) as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(0)
        yield Source(file, os.path.basename(shard.path), size, shard.compression, shard.store.is_local)


@contextlib.contextmanager
def shard_errors() -> Iterator[None]:
    """Turn whatever a damaged file makes its reader raise into a ShardError of one line."""
    try:
        yield
    except ShardError:
        raise
    except _DAMAGE as error:
        raise ShardError(_one_line(error)) from error
    except Exception as error:
        if type(error).__name__ != "ZstdError":  # zstandard is optional, so its error has no importable name
            raise
        raise ShardError(_one_line(error)) from error


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _unless_empty(chunks: Iterable[Chunk], size: int) -> Iterator[Chunk]:
    """The chunks, until too many rows after one another hold nothing, for a file of ``size`` bytes."""
    empty = 0
    for chunk in chunks:
        empty = empty + chunk.length if _is_empty(chunk) else 0
        if empty > max(MOST_EMPTY_ROWS, size):
            raise ShardError(f"unfolds to more than {empty:,} rows after one another without a value")
        yield chunk


def _is_empty(chunk: Chunk) -> bool:
    return all(value is None for values in chunk.columns.values() for value in values)
