"""Arrow IPC files and streams, mapped rather than read: only the rows at hand, of the columns wanted, are in memory."""

from __future__ import annotations

import contextlib
import mmap
import os
import shutil
import struct
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO, cast

import pyarrow as pa

from assay.corpus.arrow_values import is_any
from assay.corpus.columnar import Piece, check, chunks_of_columns, filtered, pieces
from assay.corpus.errors import ShardError
from assay.corpus.facts import facts_of_schema
from assay.corpus.format import Chunk, ColumnFacts, Format, Mask, Source

_FILE_MAGIC = b"ARROW1"
# A dictionary of more texts is a way to store them, not a list of classes.
_MOST_CLASSES = 100_000
# Every message of a stream starts with the first, and the second ends the stream.
_STREAM_MARK = b"\xff\xff\xff\xff"
_STREAM_END = b"\xff\xff\xff\xff\x00\x00\x00\x00"


def _read(source: Source, columns: Sequence[str]) -> Iterator[Chunk]:
    with _opened(source) as opened:
        yield from chunks_of_columns(opened.schema, columns, opened.pieces)


def _facts(source: Source) -> dict[str, ColumnFacts]:
    if source.is_local:
        with _opened(source) as opened:
            found = _dictionaries(opened.buffer, opened.schema) if opened.is_file else None
            return facts_of_schema(opened.schema, source.features, found)
    # To map it would be to fetch all of it.
    is_file = source.file.read(len(_FILE_MAGIC)) == _FILE_MAGIC
    source.file.seek(0)
    schema = (pa.ipc.open_file if is_file else pa.ipc.open_stream)(source.file).schema
    return facts_of_schema(schema, source.features, _dictionaries(source.file, schema) if is_file else None)


def _dictionaries(file: Any, schema: pa.Schema) -> dict[str, tuple[str, ...]]:
    """The texts that columns of a file are made of. (A stream may replace them as it goes on, so it tells none.)"""
    wanted = [i for i, field in enumerate(schema) if _is_text_dictionary(field.type)]
    options = pa.ipc.IpcReadOptions(included_fields=wanted, use_threads=False)
    reader = pa.ipc.open_file(file, options=options) if wanted else None
    if reader is None or not reader.num_record_batches:
        return {}
    batch = reader.get_batch(0)
    check(batch)
    found = {name: column.dictionary for name, column in zip(batch.schema.names, batch.columns, strict=True)}
    try:
        return {name: tuple(own.to_pylist()) for name, own in found.items() if _are_classes(own)}
    except UnicodeDecodeError:  # a fault of the rows that have such a text
        return {}


def _copy(source: Source, keep: Mask, file: BinaryIO) -> None:
    with _opened(source) as opened:
        # Arrow does not tell a file's codec; `.feather` gets that of its own writer.
        codec = "lz4" if source.name.lower().endswith(".feather") else None
        options = pa.ipc.IpcWriteOptions(compression=codec)
        create = pa.ipc.new_file if opened.is_file else pa.ipc.new_stream
        with create(file, opened.schema, options=options) as writer:
            for batch in filtered(opened.pieces(None), keep):
                writer.write_batch(batch)


@dataclass(frozen=True)
class _Opened:
    """An Arrow file or stream in mapped memory."""

    file: BinaryIO
    memory: mmap.mmap
    buffer: pa.Buffer
    is_file: bool
    schema: pa.Schema

    def pieces(self, columns: Sequence[str] | None) -> Iterator[Piece]:
        """The rows of some columns (None: of all), each piece with the share read so far."""
        fields = None
        # Plain buffers are used where they lie. Of a file, pyarrow would copy those of chosen fields.
        if columns is not None and (not self.is_file or _is_compressed(self.buffer)):
            fields = sorted(map(self.schema.get_field_index, columns))
        options = pa.ipc.IpcReadOptions(included_fields=fields, use_threads=False)
        stream = pa.BufferReader(self.buffer)
        share = 0.0

        def batches() -> Iterator[pa.RecordBatch]:
            nonlocal share
            if self.is_file:
                reader = pa.ipc.open_file(stream, options=options)
                for i in range(reader.num_record_batches):
                    share = (i + 1) / reader.num_record_batches
                    yield reader.get_batch(i)
            else:
                for batch in pa.ipc.open_stream(stream, options=options):
                    share = min(1.0, stream.tell() / (self.buffer.size - len(_STREAM_END)))
                    yield batch

        for piece in pieces(batch if columns is None else batch.select(columns) for batch in batches()):
            self._check_size()
            yield piece, share
            # The pages that were read go back; whoever needs one again finds it in the system's cache.
            self.memory.madvise(mmap.MADV_DONTNEED)

    def _check_size(self) -> None:
        """To touch a mapped page that a shorter file no longer has would end the process."""
        if os.fstat(self.file.fileno()).st_size < len(self.memory):
            raise ShardError("became shorter while it was read")


@contextlib.contextmanager
def _opened(source: Source) -> Iterator[_Opened]:
    with contextlib.ExitStack() as spools:
        file = source.file
        if not source.is_local:  # it cannot be mapped where it is
            file = cast(BinaryIO, spools.enter_context(tempfile.TemporaryFile()))
            shutil.copyfileobj(source.file, file, 1 << 20)
            file.flush()
        if not os.fstat(file.fileno()).st_size:
            raise ShardError("is empty, which is not an Arrow file")
        memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        is_file = _check_kind(memory)
        buffer = pa.py_buffer(memory)
        schema = (pa.ipc.open_file if is_file else pa.ipc.open_stream)(buffer).schema
        yield _Opened(file, memory, buffer, is_file, schema)


def _check_kind(memory: mmap.mmap) -> bool:
    """Whether it is a file (True) or a stream; a stream cut off between two batches is an error."""
    if memory[: len(_FILE_MAGIC)] == _FILE_MAGIC:
        return True
    if memory[:4] == b"FEA1":
        raise ShardError("Feather version 1 is not supported; write it again as version 2")
    # To pyarrow a stream that simply stops is complete. Every writer marks the end, so its absence is a loss.
    # (Streams from before 2019 have no marks; they are taken at their word.)
    if memory[:4] == _STREAM_MARK and memory[-len(_STREAM_END) :] != _STREAM_END:
        raise ShardError("the Arrow stream has no end marker: the file is truncated")
    return False


def _is_text_dictionary(kind: pa.DataType) -> bool:
    return pa.types.is_dictionary(kind) and is_any(kind.value_type, "string", "large_string")


def _are_classes(values: pa.Array) -> bool:
    """Whether they can be anything but a way to store a column of texts."""
    return len(values) <= _MOST_CLASSES and not values.null_count and len(values.unique()) == len(values)


def _is_compressed(buffer: pa.Buffer) -> bool:
    """Whether the first record batch of an Arrow file says so: the field `compression` of Arrow's Message.fbs, which
    pyarrow does not show. Taken for true where that cannot be found."""
    try:
        for message in pa.ipc.MessageReader.open_stream(buffer.slice(8)):
            if message.type == "record batch":
                table = message.metadata.to_pybytes()
                header = _place(table, _number(table, 0, "<I"), 2)
                return header is None or _place(table, header + _number(table, header, "<I"), 3) is not None
    except (pa.ArrowException, OSError, struct.error):
        return True
    return False  # no batch at all


def _place(table: bytes, start: int, field: int) -> int | None:
    """Where a field of a flatbuffers table lies; None if it is not set."""
    layout = start - _number(table, start, "<i")
    entry = 4 + 2 * field
    offset = _number(table, layout + entry, "<H") if entry < _number(table, layout, "<H") else 0
    return start + offset if offset else None


def _number(table: bytes, place: int, kind: str) -> int:
    value: int = struct.unpack_from(kind, table, place)[0]
    return value


FORMAT = Format("arrow", (".arrow", ".feather"), _read, _copy, _facts)
