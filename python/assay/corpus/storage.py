"""Files behind any fsspec URL: listed, fingerprinted, read, and written whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import re
import stat
import tempfile
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any, BinaryIO, TypeVar, cast

import fsspec
from fsspec.implementations.local import LocalFileSystem
from fsspec.implementations.memory import MemoryFileSystem

from assay.corpus.errors import CorpusError
from assay.corpus.remote import RemoteFileSystem

T = TypeVar("T")
R = TypeVar("R")

_TEMPORARY = re.compile(r"\.[0-9a-f]{32}\.tmp")
# A temporary lives for as long as one file takes to write, and every write renews its age.
ABANDONED_AFTER_SECONDS = 3600.0
# A manifest of 200,000 shards has some 30 MB.
MAX_TEXT_BYTES = 256 << 20
_REQUESTS_AT_ONCE = 16
_THREADS_HERE, _FILES_AT_ONCE = 4, 64
# Of a file itself: it is not there, not to be had, or none. Others, as EIO, ESTALE and EMFILE, may pass.
_OF_FILE = (errno.EINVAL, errno.ELOOP, errno.ENAMETOOLONG, errno.ENXIO)  # the last one of a socket


def temporary_name() -> str:
    """A name for a file that is being written, hidden and nobody else's."""
    return f".{uuid.uuid4().hex}.tmp"


def is_temporary(path: str) -> bool:
    """Whether a file's name is one that `temporary_name` gives: others' temporaries are not ours to delete."""
    return _TEMPORARY.fullmatch(os.path.basename(path)) is not None


def sha256(file: BinaryIO) -> str:
    """The content's SHA-256, in hexadecimal."""
    digest = hashlib.sha256()
    while block := file.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()


@dataclass(frozen=True)
class Fingerprint:
    """What tells one content of a file from another without reading it."""

    size: int
    mtime_ns: int | None = None
    etag: str | None = None

    def to_json(self) -> dict[str, int | str]:
        """The parts that the file system knows."""
        return {key: value for key, value in vars(self).items() if value is not None}


@dataclass(frozen=True)
class Store:
    """A folder on some file system. Its methods take paths relative to it, with forward slashes."""

    fs: LocalFileSystem | RemoteFileSystem
    root: str

    @classmethod
    def at(cls, url: str) -> Store:
        """The folder that a local path or an fsspec URL names; it need not exist."""
        fs, root = fsspec.core.url_to_fs(url)
        return cls(fs if isinstance(fs, LocalFileSystem) else RemoteFileSystem(fs), root.rstrip("/") or "/")

    @property
    def url(self) -> str:
        """The folder's address, good for `Store.at`."""
        return self.root if self.is_local else str(self.fs.unstrip_protocol(self.root))

    @property
    def is_local(self) -> bool:
        return isinstance(self.fs, LocalFileSystem)

    @property
    def is_in_memory(self) -> bool:
        """Whether it lives and dies with this process."""
        return isinstance(self.fs, RemoteFileSystem) and isinstance(self.fs.wrapped, MemoryFileSystem)

    def full(self, path: str) -> str:
        """The path as the file system itself names it."""
        return f"{self.root.rstrip('/')}/{path}" if path else self.root

    def relative(self, full: str) -> str:
        """The inverse of `full`."""
        return full[len(self.root.rstrip("/")) + 1 :]

    def real(self, path: str = "") -> str:
        """Where the path leads, through every symbolic link; only local files have any."""
        return os.path.realpath(self.full(path)) if self.is_local else self.full(path)

    def holds(self, other: Store, path: str = "") -> bool:
        """Whether the other folder, or the file ``path`` in it, is this folder or lies inside it, by whatever names and
        links the two are given."""
        if self._kind() is not other._kind():
            return False
        folder, inner = self.real(), other.real(path)
        if f"{inner}/".startswith(f"{folder.rstrip('/')}/"):
            return True
        # The same folder mounted twice has two real paths.
        return self.is_local and any(_is_folder(folder, parent) for parent in _with_parents(inner))

    def _kind(self) -> type[fsspec.AbstractFileSystem]:
        return type(self.fs.wrapped if isinstance(self.fs, RemoteFileSystem) else self.fs)

    def files(self) -> list[str]:
        """Every file under this folder, hidden ones included, in order; none if there is no such folder."""
        if self.is_local:
            return sorted(self.relative(full) for full in self.fs.find(self.root))
        self.fs.invalidate_cache()
        try:
            return sorted(self.relative(full) for full in self.fs.find(self.root))
        finally:
            self.fs.invalidate_cache()  # else what others write from now on would not be there

    def exists(self, path: str) -> bool:
        if self.is_local:
            return bool(self.fs.exists(self.full(path)))
        try:  # some file systems' own `exists` says no whatever went wrong
            self.fs.info(self.full(path))
        except (FileNotFoundError, NotADirectoryError):
            return False
        return True

    def fingerprint(self, path: str) -> Fingerprint:
        """Size and etag, or size and modification time, as they are now."""
        if not self.is_local:
            self.fs.invalidate_cache()
        return self._look(self.full(path))

    def fingerprints(self, paths: Iterable[str]) -> dict[str, Fingerprint | None]:
        """Those of several files; None of one that is not there, or that nobody may look at. Elsewhere than here by one
        listing for each of their folders."""
        paths = list(paths)
        self._list_folders(paths)
        return {path: self._look_if_there(self.full(path)) for path in paths}

    def times(self, paths: Iterable[str]) -> dict[str, float | None]:
        """When files were written, in seconds by the file system's clock; None of one that is not there, or where it
        does not say. Elsewhere than here by one listing for each of their folders."""
        paths = list(paths)
        self._list_folders(paths)
        return {path: self._time(self.full(path)) for path in paths}

    def _time(self, full: str) -> float | None:
        try:
            return os.stat(full).st_mtime if self.is_local else float(self.fs.modified(full).timestamp())
        except (OSError, NotImplementedError):
            return None

    def _list_folders(self, paths: Iterable[str]) -> None:
        """Where that costs a request, so that `_look` and `modified` find the files in the listings' cache."""
        if self.is_local:
            return
        self.fs.invalidate_cache()
        for folder in sorted({os.path.dirname(path) for path in paths}):
            with contextlib.suppress(OSError):
                self.fs.ls(self.full(folder), detail=True)

    def fingerprint_of(self, path: str, file: BinaryIO) -> Fingerprint:
        """That of a file that has just been opened, before anything is read."""
        if self.is_local:
            status = os.fstat(file.fileno())
            return Fingerprint(status.st_size, mtime_ns=status.st_mtime_ns)
        return self._look(self.full(path))

    def _look_if_there(self, full: str) -> Fingerprint | None:
        try:
            return self._look(full)
        except (OSError, ValueError) as error:
            if may_pass(error):
                raise
            return None

    def _look(self, full: str) -> Fingerprint:
        if self.is_local:
            status = os.stat(full)
            return Fingerprint(status.st_size, mtime_ns=status.st_mtime_ns)
        info: dict[str, Any] = self.fs.info(full)
        size = size_of(info, full)
        if etag := etag_of(info):
            return Fingerprint(size, etag=etag)
        with contextlib.suppress(NotImplementedError):
            modified = self.fs.modified(full)
            return Fingerprint(size, mtime_ns=int(modified.timestamp() * 1e6) * 1000)
        return Fingerprint(size)

    def open(self, path: str) -> BinaryIO:
        """Open for reading. An OSError for anything but a regular file: a pipe would wait, a device never end."""
        if self.is_local:
            return _open_regular(self.full(path))
        return cast(BinaryIO, self.fs.open(self.full(path), "rb"))

    def read_tail(self, path: str, size: int) -> bytes:
        """A file's last ``size`` bytes, or all that it has; elsewhere than here by one request."""
        if not self.is_local:
            return cast(bytes, self.fs.cat_file(self.full(path), start=-size))
        with _open_regular(self.full(path)) as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - size))
            return file.read(size)

    def map(self, function: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
        """The function of each item, in order. It asks for files of this folder: several are asked for at once, and a
        little ahead, for elsewhere than here, and where a folder here is mounted over a net, answers take their time.

        What is handed to a thread is large enough here that handing over costs little beside it."""
        threads, share = (_THREADS_HERE, _FILES_AT_ONCE) if self.is_local else (_REQUESTS_AT_ONCE, 1)
        coming = iter(items)
        shares = iter(lambda: list(islice(coming, share)), [])
        first = next(shares, [])
        if len(first) < share:  # not worth a thread
            yield from map(function, first)
            return
        pool = ThreadPoolExecutor(threads)
        try:
            waiting: deque[Future[tuple[list[R], Exception | None]]] = deque()
            for part in chain([first], shares, [[]] * 4 * threads):  # the last ones push out what still waits
                waiting.append(pool.submit(_until_error, function, part))
                if len(waiting) > 4 * threads:
                    answers, error = waiting.popleft().result()
                    yield from answers
                    if error is not None:
                        raise error
        finally:
            pool.shutdown(cancel_futures=True)

    def sha256(self, path: str) -> str:
        """The SHA-256 of a file's content, in hexadecimal."""
        with self.open(path) as file:
            return sha256(file)

    def read_text(self, path: str) -> str:
        """A small file's text. A ValueError for a large one, or one that is not UTF-8."""
        with self.open(path) as file:
            content = file.read(MAX_TEXT_BYTES + 1)
        if len(content) > MAX_TEXT_BYTES:
            raise ValueError(f"{self.full(path)}: larger than {MAX_TEXT_BYTES >> 20} MiB, which no such file is")
        return content.decode("utf-8")

    def refuse_detours(self, paths: Iterable[str]) -> None:
        """CorpusError if a link leads out of this folder on the way to one of ``paths``: what is written there would
        land in somebody else's. A link in the last place is harmless, for it is replaced and not followed."""
        for folder in sorted({path.rpartition("/")[0] for path in paths}):
            if not self.holds(self, folder):
                raise CorpusError(
                    f"{self.full(folder)}: leads to {self.real(folder)}, out of {self.url}; remove the link, "
                    "or choose another output"
                )

    def remove(self, path: str) -> None:
        """Delete a file; one that is not there is fine."""
        self.refuse_detours([path])
        with contextlib.suppress(FileNotFoundError):
            self.fs.rm_file(self.full(path))

    @contextlib.contextmanager
    def write(self, path: str) -> Iterator[BinaryIO]:
        """Open for writing; the file appears under its name when the block ends, and not at all if it raises.

        Local files are written beside their final name, synced and renamed. Elsewhere the content waits in a
        local temporary file and goes up in one piece, which object stores make visible at once.
        """
        self.refuse_detours([path])
        full = self.full(path)
        if self.is_local:
            with _renamed_when_complete(full) as file:
                yield file
            return
        with tempfile.NamedTemporaryFile() as spool:
            yield cast(BinaryIO, spool)
            spool.flush()
            self.fs.makedirs(os.path.dirname(full), exist_ok=True)
            self.fs.put_file(spool.name, full)

    def write_text(self, path: str, text: str) -> None:
        """Write a small file, atomically like every other."""
        with self.write(path) as file:
            file.write(text.encode("utf-8"))

    def sweep(self, older_than: float = ABANDONED_AFTER_SECONDS) -> list[str]:
        """Delete temporaries that killed runs left behind. Age decides, so a live run's are safe."""
        swept = []
        for path in self.temporaries(older_than):
            with contextlib.suppress(FileNotFoundError):  # another runner swept it first
                os.unlink(self.full(path))
                swept.append(path)
        return swept

    def temporaries(self, older_than: float) -> list[str]:
        """Temporaries of this age in seconds, in order."""
        if not self.is_local:
            return []  # a spool elsewhere has no name for a kill to leave behind
        found = []
        # os.walk lists each folder once and follows no links: what lies behind one is not this folder's.
        for folder, _, names in os.walk(self.root):
            for name in filter(is_temporary, names):
                full = os.path.join(folder, name)
                with contextlib.suppress(FileNotFoundError):  # it has got its final name
                    if time.time() - os.lstat(full).st_mtime > older_than:
                        found.append(self.relative(full))
        return sorted(found)


def _until_error(function: Callable[[T], R], items: Iterable[T]) -> tuple[list[R], Exception | None]:
    """The function of each item, up to the first that raises an exception; and that exception."""
    answers: list[R] = []
    try:
        for item in items:
            answers.append(function(item))  # noqa: PERF401
    except Exception as error:
        return answers, error
    return answers, None


def may_pass(error: BaseException) -> bool:
    """Whether an error is the machine's, the disk's or the net's, and gone when asked again: not a fault of what was
    read, which libraries raise as an OSError without a number."""
    if isinstance(error, (TimeoutError, ConnectionError)):
        return True
    return isinstance(error, OSError) and error.errno is not None and not is_of_file(error)


def is_of_file(error: OSError) -> bool:
    """Whether an error says something of the file, and will again; not of the machine, the disk or the net."""
    kinds = (FileNotFoundError, NotADirectoryError, IsADirectoryError, PermissionError)  # fsspec's have no number
    return isinstance(error, kinds) or error.errno in _OF_FILE


def etag_of(info: Mapping[str, Any]) -> str | None:
    """The etag in what a file system says of a file, under the names that they have for it."""
    etag = info.get("ETag") or info.get("etag") or info.get("content_md5")
    return str(etag) if etag else None


def size_of(info: Mapping[str, Any], full: str) -> int:
    """A file's length by what a file system says of it. An OSError of one that does not tell."""
    if info.get("size") is None:
        raise OSError(
            errno.EINVAL,
            "the server does not say how long the file is (an answer without Content-Length); copy it to this machine, "
            "or to an object store",
            full,
        )
    return int(info["size"])


def _open_regular(full: str) -> BinaryIO:
    # Without O_NONBLOCK, opening a pipe waits for its writer.
    descriptor = os.open(full, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    mode = os.fstat(descriptor).st_mode
    if stat.S_ISREG(mode):
        return os.fdopen(descriptor, "rb")
    os.close(descriptor)
    raise OSError(errno.EINVAL, "not a regular file", full)


def _is_folder(one: str, other: str) -> bool:
    try:
        return os.path.samefile(one, other)
    except OSError:  # one of them does not exist
        return False


def _with_parents(path: str) -> Iterator[str]:
    yield path
    while (parent := os.path.dirname(path)) != path:
        path = parent
        yield path


@contextlib.contextmanager
def _renamed_when_complete(full: str) -> Iterator[BinaryIO]:
    folder = os.path.dirname(full)
    os.makedirs(folder, exist_ok=True)
    # Not made of the file's own name, which may be as long as a name can be.
    temporary = os.path.join(folder, temporary_name())
    try:
        with open(temporary, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, full)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise
    with contextlib.suppress(OSError):  # best effort: some file systems cannot sync a folder
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
