"""What a format is: its suffixes, and how its files are read, in chunks that memory follows, and copied."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO, TypeVar

import numpy as np
import numpy.typing as npt

from assay.corpus.compression import Compression
from assay.corpus.errors import ShardError
from assay.corpus.storage import Fingerprint, Store

T = TypeVar("T")
Mask = npt.NDArray[np.bool_]

CHUNK_ROWS = 1024
# Tokenizers need some thirty times a text's size while they work, so a chunk of texts must stay small.
CHUNK_BYTES = 2 << 20


@dataclass(frozen=True)
class Folder:
    """A folder that is a shard: its files, relative to ``store``, which is the folder itself."""

    store: Store
    files: tuple[str, ...]
    classes: tuple[str, ...] = ()
    """Of images: the classes that it and the folders beside it have."""


@dataclass(frozen=True)
class Source:
    """A shard's file, opened for reading at its beginning."""

    file: BinaryIO
    name: str
    """The file's name, suffixes included."""
    size: int
    compression: Compression | None = None
    is_local: bool = False
    """Whether ``file`` is a plain file of this machine, with a descriptor."""
    features: Mapping[str, Any] | None = None
    """The Hugging Face features that a saved data set's own description tells, as JSON has them."""
    folder: Folder | None = None
    """Of a format whose shards are folders: the folder. ``file`` is empty then, and ``size`` the number of files."""
    optional: frozenset[str] = frozenset()
    """Columns that are null where a row, of a format whose rows have keys of their own, has no such key."""
    names: frozenset[str] = frozenset()
    """Columns whose values are names, such as ids: of a format without types they are as they are written."""

    @property
    def share_read(self) -> float:
        """Of the file's bytes."""
        return min(self.file.tell() / max(1, self.size), 1.0)


@dataclass(frozen=True)
class ColumnFacts:
    """What a shard says of a column without being read whole.

    ``type`` is what its values are: Arrow's name of the type, in which a dictionary is its values, every kind of text
    `string`, of bytes `binary` and of list `list<…>`; `image`, `audio` and the like for encoded media (bytes, or a
    struct of bytes and path as Hugging Face has it); `mixed` where rows differ. ``classes`` are the names of a Hugging
    Face ClassLabel, whose values are their places, or the values of an Arrow dictionary where the file has them at
    hand, or the classes of a folder of images; of a list, those of its items. None where the file does not tell.
    ``in_order`` says of texts whether the classes' order is theirs, and not merely that in which a file came upon them.
    """

    type: str
    classes: tuple[str, ...] | None = None
    in_order: bool = False


@dataclass(frozen=True)
class Chunk:
    """Consecutive rows of a shard.

    ``first`` is the physical index of the first row; every column holds one Python value per row (a numeric
    list as a numpy array). ``faults`` names the rows that could not be read at all, by offset; their values
    are None. ``progress`` is the share of the shard that has been read.
    """

    first: int
    columns: Mapping[str, Sequence[Any]]
    faults: Mapping[int, str]
    length: int
    progress: float


@dataclass(frozen=True)
class Format:
    """A kind of file, as `assay.corpus.formats` lists it.

    ``read`` gives the rows in physical order with the values of the named columns. ``copy`` writes the rows
    for which the mask, one Boolean per physical row, is true. ``facts`` tells the columns, a struct's own ones by
    dotted names after it, from a schema or the first rows. All raise ShardError, or whatever their library raises for
    a damaged file. ``compressible`` says whether a suffix like `.gz` may follow the format's own, ``has_keys`` whether
    each row has keys of its own, and so may lack a column that others have. ``files`` makes it a format of folders: it
    gives the files that a shard is made of, relative to its folder, each with its fingerprint where the listing tells
    it, and ``copy`` gets the folder to write into. The names of the files that it writes are those of ``files``, or
    others that ``own_files`` matches.
    """

    name: str
    suffixes: tuple[str, ...]
    read: Callable[[Source, Sequence[str]], Iterator[Chunk]]
    copy: Callable[[Source, Mask, Any], None]
    facts: Callable[[Source], dict[str, ColumnFacts]]
    compressible: bool = False
    has_keys: bool = False
    files: Callable[[Store, str], Mapping[str, Fingerprint | None]] | None = None
    own_files: re.Pattern[str] | None = None


def parts(rows: Iterable[T], size: Callable[[T], int]) -> Iterator[tuple[int, list[T]]]:
    """Rows in chunks, each with the index of its first row; ``size`` tells the bytes that a row takes."""
    first, held, part = 0, 0, []
    for row in rows:
        part.append(row)
        held += size(row)
        if len(part) == CHUNK_ROWS or held >= CHUNK_BYTES:
            yield first, part
            first, held, part = first + len(part), 0, []
    if part:
        yield first, part


def check_columns(columns: Sequence[str], present: Sequence[str]) -> None:
    """Raise a ShardError unless each of ``columns`` is there once."""
    for name in columns:
        if present.count(name) > 1:
            raise ShardError(f"has {present.count(name)} columns named {name!r}; expected one")
        if name not in present:
            near = difflib.get_close_matches(name, present, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ShardError(f"has no column {name!r}, only {', '.join(map(repr, present[:20]))}{hint}")


def check_length(seen: int, keep: Mask) -> None:
    """Raise a ShardError unless a copied shard had as many rows as the mask."""
    if seen != len(keep):
        raise ShardError(f"has {seen} rows, but {len(keep)} were scored or quarantined; score it again")
