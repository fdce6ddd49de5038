"""A tar archive read from its beginning to its end, a member at a time; nothing is extracted and no link followed.

The standard library reads the headers; what they say of sizes is believed no further than a limit.
"""

from __future__ import annotations

import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

from assay.corpus.errors import ShardError

_BLOCK = tarfile.BLOCKSIZE
_ZEROS = bytes(_BLOCK)
_PIECE = 1 << 20
# Far more than a name takes, and what archivers note beside it.
_MOST_HEADER_BYTES = 64 << 10
_NAMES = (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK)
_NOTES = (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE, tarfile.XGLTYPE)
_NOTE = re.compile(rb"([1-9]\d{0,8}) ([^=\n]+)=")
_FILES = (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE)
_WITHOUT_DATA = {
    **dict.fromkeys((tarfile.LNKTYPE, tarfile.SYMTYPE), "a link"),
    **dict.fromkeys((tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE), "a device"),
    tarfile.DIRTYPE: "",
}


@dataclass(frozen=True)
class Member:
    """A member of an archive: its headers as they stand there, and what they say."""

    headers: bytes
    name: str
    size: int
    fault: str | None
    """Why it is not to be had; None for a regular file whose name stays inside."""
    is_folder: bool = False


class Archive:
    """An archive in a file that need not seek. The data of the current member can be read or copied, once."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._size = self._left = 0

    def members(self) -> Iterator[Member]:
        """Every member but folders. A ShardError for damage, EOFError for an archive that stops short."""
        while True:
            self._skip()
            member = self._next()
            if member is None:
                return
            self._size, self._left = member.size, _padded(member.size)
            if not member.is_folder:
                yield member

    def data(self) -> bytes:
        """The current member's bytes; ask for its size first."""
        return b"".join(self._pieces())[: self._size]

    def copy(self, member: Member, file: BinaryIO) -> int:
        """Write the current member as it stands in the archive; returns the number of bytes."""
        file.write(member.headers)
        for piece in self._pieces():
            file.write(piece)
        return len(member.headers) + _padded(member.size)

    def _pieces(self) -> Iterator[bytes]:
        while self._left:
            piece = self._exactly(min(self._left, _PIECE))
            self._left -= len(piece)
            yield piece

    def _skip(self) -> None:
        if self._file.seekable():  # past the end, the next header will be missing
            self._file.seek(self._left, 1)
            self._left = 0
        for _ in self._pieces():
            pass

    def _exactly(self, size: int) -> bytes:
        data = self._file.read(size)
        if len(data) < size:
            raise EOFError("the archive has no end mark: the file is truncated")
        return data

    def _next(self) -> Member | None:
        headers = b""
        noted: dict[bytes, bytes] = {}
        while True:
            block = self._exactly(_BLOCK)
            if block == _ZEROS and not headers:
                self._check_end()
                return None
            try:
                info = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
            except (tarfile.HeaderError, ValueError) as error:
                raise ShardError(f"is damaged, or no tar archive: {error}, where a member is expected") from error
            headers += block
            if info.type not in _NAMES + _NOTES:
                return _member(headers, info, noted)
            if not 0 <= info.size <= _MOST_HEADER_BYTES - len(headers):
                raise ShardError(f"has more than {_MOST_HEADER_BYTES >> 10} KiB of headers before a member")
            data = self._exactly(_padded(info.size))
            headers += data
            noted |= _noted(info, data[: info.size])

    def _check_end(self) -> None:
        while piece := self._file.read(_PIECE):
            if piece.count(0) < len(piece):
                raise ShardError("goes on after its end mark; were several archives joined? Give them as files")


def end_mark(size: int) -> bytes:
    """What follows the members of an archive that take ``size`` bytes."""
    return bytes(2 * _BLOCK + -(size + 2 * _BLOCK) % tarfile.RECORDSIZE)


def _padded(size: int) -> int:
    return -(-size // _BLOCK) * _BLOCK


def _noted(info: tarfile.TarInfo, data: bytes) -> dict[bytes, bytes]:
    """What extended headers say of the member that follows."""
    if info.type in _NAMES:
        return {b"path": data.rstrip(b"\0")} if info.type == tarfile.GNUTYPE_LONGNAME else {}
    notes, place = {}, 0
    while place < len(data):
        match = _NOTE.match(data, place)
        end = place + int(match[1]) if match else 0
        if not match or not match.end() < end <= len(data) or data[end - 1 : end] != b"\n":
            raise ShardError("is damaged: a member's extended header cannot be read")
        notes[match[2]] = data[match.end() : end - 1]
        place = end
    if any(key.startswith(b"GNU.sparse") for key in notes):
        raise ShardError("holds a sparse member, which is not supported; pack it again without --sparse")
    if info.type == tarfile.XGLTYPE and {b"path", b"size"} & notes.keys():
        raise ShardError("has a name or size for all members in a global header, as no archiver makes")
    return notes


def _member(headers: bytes, info: tarfile.TarInfo, noted: dict[bytes, bytes]) -> Member:
    if info.type == tarfile.GNUTYPE_SPARSE:
        raise ShardError("holds a sparse member, which is not supported; pack it again without --sparse")
    name = noted[b"path"].decode("utf-8", "surrogateescape") if b"path" in noted else info.name
    size = int(noted[b"size"]) if b"size" in noted else info.size
    if size < 0:
        raise ShardError(f"is damaged: a member has {size} bytes")
    fault = None
    if info.type not in _FILES:
        fault = f"{name[-80:]} is {_WITHOUT_DATA.get(info.type, 'of an unknown kind')}, expected a regular file"
    elif name.startswith("/") or ".." in name.split("/") or "\0" in name:
        fault = f"{name[-80:]} leads out of the archive"
    return Member(headers, name, 0 if info.type in _WITHOUT_DATA else size, fault, info.isdir())
