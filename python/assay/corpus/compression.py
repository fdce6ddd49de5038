"""Lines of plain and compressed files, a bounded piece at a time. A file that stops short is an error, never a short
file."""

from __future__ import annotations

import bz2
import contextlib
import gzip
import io
import lzma
import os
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO, Literal, cast

from assay._lazy import require
from assay.corpus.errors import ShardError

Compression = Literal["gz", "zst", "bz2", "xz"]
COMPRESSIONS: dict[str, Compression] = {".gz": "gz", ".zst": "zst", ".zstd": "zst", ".bz2": "bz2", ".xz": "xz"}

MAX_LINE_BYTES = 128 << 20
# What no corpus's text comes near; gzip cannot unfold so far at all.
MAX_RATIO = 10_000
_RATIO_FROM_BYTES = 1 << 30
_BLOCK = 1 << 20

_XZ_MEMORY = 1 << 30

ZSTD_WINDOW_VARIABLE = "ASSAY_ZSTD_WINDOW_MIB"
_ZSTD_LARGEST_WINDOW_MIB = 2048
_ZSTD_FRAME_MAGIC = b"\x28\xb5\x2f\xfd"
_ZSTD_LONGEST_FRAME_HEADER = 18


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


def unpacked(file: BinaryIO, compression: Compression | None) -> BinaryIO:
    """The file as it is, or its decompressed bytes as a file that can only be read on."""
    return file if compression is None else cast(BinaryIO, io.BufferedReader(_Unpacked(file, compression), _BLOCK))


class _Unpacked(io.RawIOBase):
    def __init__(self, file: BinaryIO, compression: Compression) -> None:
        self._blocks = _blocks(file, compression)
        self._rest = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._rest:
            block = next(self._blocks, None)
            if block is None:
                return 0
            self._rest = memoryview(block)
        size = min(len(buffer), len(self._rest))
        buffer[:size] = self._rest[:size]
        self._rest = self._rest[size:]
        return size


@contextlib.contextmanager
def compressed(file: BinaryIO, compression: Compression | None) -> Iterator[BinaryIO]:
    """Compress what the block writes into ``file``: the same bytes for the same content."""
    if compression is None:
        yield file
        return
    with _writers()[compression](file) as stream:
        yield cast(BinaryIO, stream)


def _writers() -> dict[Compression, Callable[[BinaryIO], Any]]:
    return {
        "gz": lambda file: gzip.GzipFile(filename="", mode="wb", fileobj=file, mtime=0),
        "zst": lambda file: require("zstandard", "cli").ZstdCompressor().stream_writer(file, closefd=False),
        "bz2": lambda file: bz2.BZ2File(file, "wb"),
        "xz": lambda file: lzma.LZMAFile(file, "wb"),
    }


def _blocks(file: BinaryIO, compression: Compression | None) -> Iterator[bytes]:
    if compression is None:
        while block := file.read(_BLOCK):
            yield block
        return
    if not file.read(1):
        raise EOFError(f"the file is empty, which is not a {compression} stream")
    file.seek(0)
    unfolded = 0
    for block in _unpacked(file, compression):
        unfolded += len(block)
        if unfolded > _RATIO_FROM_BYTES and unfolded > MAX_RATIO * file.tell():
            raise ShardError(f"unfolds to more than {MAX_RATIO:,} times its size; no text does")
        yield block


def _unpacked(file: BinaryIO, compression: Compression) -> Iterator[bytes]:
    if compression == "gz":
        with gzip.GzipFile(fileobj=file, mode="rb") as stream:
            while block := stream.read(_BLOCK):
                yield block
    elif compression == "bz2":
        yield from _streams(file, bz2.BZ2Decompressor)
    elif compression == "xz":
        yield from _streams(file, lambda: lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=_XZ_MEMORY))
    else:
        yield from _zstd_blocks(file)


def _streams(file: BinaryIO, start: Callable[[], Any]) -> Iterator[bytes]:
    """One bzip2 or xz stream after the other. (The library's own files take damage after the first for their end.)"""
    stream, data = start(), file.read(_BLOCK)
    while data:
        while not stream.eof and (data or not stream.needs_input):
            yield stream.decompress(data, _BLOCK)
            data = b""
        if stream.eof:
            data = stream.unused_data.lstrip(b"\0")  # xz pads with zeros
            while not data and (block := file.read(_BLOCK)):
                data = block.lstrip(b"\0")
            stream = start() if data else stream
        else:
            data = file.read(_BLOCK)
    if not stream.eof:
        raise EOFError("the compressed stream has no end: the file is truncated")


def _zstd_blocks(file: BinaryIO) -> Iterator[bytes]:
    """Block by block of each frame: zstandard unfolds all it is fed at once, up to 32,000-fold, and a block gives
    128 kB at most. (Its stream reader is bounded too, but ends without a word inside a truncated frame.)"""
    zstandard = require("zstandard", "cli")
    limit = _zstd_window_limit()
    decompressor = zstandard.ZstdDecompressor(max_window_size=limit)
    while magic := file.read(4):
        if _is_skippable(magic):
            file.seek(int.from_bytes(_exactly(file, 4), "little"), os.SEEK_CUR)
            continue
        if magic != _ZSTD_FRAME_MAGIC:
            raise ShardError("is not a zstd stream, or goes on after its last frame")
        start = file.tell() - len(magic)
        file.seek(start)
        head = file.read(_ZSTD_LONGEST_FRAME_HEADER)
        facts = zstandard.get_frame_parameters(head)
        if facts.window_size > limit:
            raise ShardError(
                f"has a zstd window of {facts.window_size >> 20} MiB, beyond the limit of {limit >> 20} MiB; "
                f"raise it by {ZSTD_WINDOW_VARIABLE} (2048 at most) if there is memory for it"
            )
        file.seek(start)
        frame = decompressor.decompressobj()
        yield frame.decompress(_exactly(file, zstandard.frame_header_size(head)))
        is_last = False
        while not is_last:
            header = _exactly(file, 3)
            number = int.from_bytes(header, "little")
            is_last, kind, size = bool(number & 1), number >> 1 & 3, number >> 3
            # Kind 1 repeats one byte ``size`` times; the others are as long as they say.
            yield frame.decompress(header + _exactly(file, 1 if kind == 1 else size))
        if facts.has_checksum:
            yield frame.decompress(_exactly(file, 4))
        if not frame.eof:
            raise EOFError(_ZSTD_CUT)


_ZSTD_CUT = "the zstd stream ends inside a frame: the file is truncated"


def _exactly(file: BinaryIO, size: int) -> bytes:
    content = file.read(size)
    if len(content) < size:
        raise EOFError(_ZSTD_CUT)
    return content


def _is_skippable(magic: bytes) -> bool:
    return len(magic) == 4 and magic[1:] == b"\x2a\x4d\x18" and magic[0] & 0xF0 == 0x50


def _zstd_window_limit() -> int:
    text = os.environ.get(ZSTD_WINDOW_VARIABLE, str(_ZSTD_LARGEST_WINDOW_MIB))
    if not text.isdecimal() or not 1 <= int(text) <= _ZSTD_LARGEST_WINDOW_MIB:
        raise ShardError(f"{ZSTD_WINDOW_VARIABLE} is {text!r}; expected MiB from 1 to {_ZSTD_LARGEST_WINDOW_MIB}")
    return int(text) << 20
