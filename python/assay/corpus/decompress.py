"""Lines of plain, gzip and zstd files. A file that stops short is an error, never a short file."""

from __future__ import annotations

import contextlib
import gzip
from collections.abc import Iterator
from typing import BinaryIO, cast

from assay._lazy import require
from assay.corpus.shards import Compression

MAX_LINE_BYTES = 128 << 20
_BLOCK = 1 << 20
# zstd unfolds a block at once, up to 32,000-fold, so a hostile file must be fed in small bites.
_ZSTD_BLOCK = 8 << 10


def lines(file: BinaryIO, compression: Compression | None) -> Iterator[bytes]:
    """The file's lines without their newline; one beyond MAX_LINE_BYTES comes cut, a byte over it."""
    parts: list[bytes] = []
    held = 0
    for block in _blocks(file, compression):
        *complete, rest = block.split(b"\n")
        for line in complete:
            if parts:
                line = b"".join([*parts, line])
                parts, held = [], 0
            yield line[: MAX_LINE_BYTES + 1]
        if rest and held <= MAX_LINE_BYTES:
            parts.append(rest)
            held += len(rest)
    if parts:
        yield b"".join(parts)[: MAX_LINE_BYTES + 1]


@contextlib.contextmanager
def compressed(file: BinaryIO, compression: Compression | None) -> Iterator[BinaryIO]:
    """Compress what the block writes into ``file``: the same bytes for the same content."""
    if compression == "gz":
        with gzip.GzipFile(filename="", mode="wb", fileobj=file, mtime=0) as stream:
            yield cast(BinaryIO, stream)
    elif compression == "zst":
        with require("zstandard", "cli").ZstdCompressor().stream_writer(file, closefd=False) as stream:
            yield stream
    else:
        yield file


def _blocks(file: BinaryIO, compression: Compression | None) -> Iterator[bytes]:
    if compression == "zst":
        yield from _zstd_blocks(file)
        return
    source = file if compression is None else _gzip(file)
    while block := source.read(_BLOCK):
        yield block


def _gzip(file: BinaryIO) -> BinaryIO:
    if not file.read(1):
        raise EOFError("the file is empty, which is not a gzip stream")
    file.seek(0)
    return cast(BinaryIO, gzip.GzipFile(fileobj=file, mode="rb"))


def _zstd_blocks(file: BinaryIO) -> Iterator[bytes]:
    """Frame by frame, because zstandard's stream reader ends without a word inside a truncated frame."""
    decompressor = require("zstandard", "cli").ZstdDecompressor()
    frame = decompressor.decompressobj()
    while block := file.read(_ZSTD_BLOCK):
        while block:
            if frame.eof:
                frame = decompressor.decompressobj()
            yield frame.decompress(block)
            block = frame.unused_data if frame.eof else b""
    if not frame.eof:
        raise EOFError("the zstd stream ends inside a frame: the file is truncated")
