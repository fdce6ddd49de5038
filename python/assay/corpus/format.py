"""What a format is: its suffixes, and how its files are read, in chunks that memory follows, and copied."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from assay.corpus.compression import Compression
from assay.corpus.errors import ShardError

Mask = npt.NDArray[np.bool_]

CHUNK_ROWS = 1024
# Tokenizers need some thirty times a text's size while they work, so a chunk of texts must stay small.
CHUNK_BYTES = 2 << 20


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
    for which the mask, one Boolean per physical row, is true. Both raise ShardError, or whatever their
    library raises for a damaged file. ``compressible`` says whether a suffix like `.gz` may follow the format's own.
    """

    name: str
    suffixes: tuple[str, ...]
    read: Callable[[Source, Sequence[str]], Iterator[Chunk]]
    copy: Callable[[Source, Mask, BinaryIO], None]
    compressible: bool = False


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
