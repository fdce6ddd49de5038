"""File systems that are not this machine's, whose every failure is an OSError.

Their clients raise what their libraries raise (botocore's, aiohttp's and requests' errors are none), while all that
reads and writes here tells an OSError, which may pass or is said in one line, from a fault of the program.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
from collections.abc import Callable, Iterator
from functools import wraps
from typing import Any, cast

from fsspec import AbstractFileSystem

_BUFFER_BYTES = 128 << 10
_NUMBERS = {
    FileNotFoundError: errno.ENOENT,
    PermissionError: errno.EACCES,
    NotADirectoryError: errno.ENOTDIR,
    IsADirectoryError: errno.EISDIR,
    FileExistsError: errno.EEXIST,
    TimeoutError: errno.ETIMEDOUT,
}


@contextlib.contextmanager
def os_errors(path: str | None = None) -> Iterator[None]:
    """What is a client's own kind of exception becomes an OSError (EIO) that says what it was, of the file ``path``.

    Python's own stay what they are: a TypeError is a fault of the program, a ValueError is meant. An OSError that
    names no file names this one.
    """
    try:
        yield
    except OSError as error:
        _name(error, path)
        raise
    except Exception as error:
        if isinstance(error, ValueError) or type(error).__module__ == "builtins":
            raise
        said = " ".join(f"{type(error).__name__}: {error}".split())
        raise OSError(errno.EIO, said, path) from error


def _name(error: OSError, path: str | None) -> None:
    """Clients' errors have a text alone, which Python leaves out of one that has a file: it becomes the reason."""
    if path is None or error.filename:
        return
    if error.errno is None:
        number = next((number for kind, number in _NUMBERS.items() if isinstance(error, kind)), None)
        if number is None:
            return
        said = str(error)
        error.errno, error.strerror = number, os.strerror(number) if said in ("", path) else said
    error.filename = path


class RemoteFileSystem:
    """A file system's own methods and attributes, under `os_errors`."""

    def __init__(self, fs: AbstractFileSystem) -> None:
        self.wrapped = fs

    def __reduce__(self) -> tuple[Any, ...]:
        return RemoteFileSystem, (self.wrapped,)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, RemoteFileSystem) and bool(self.wrapped == other.wrapped)

    def __hash__(self) -> int:
        return hash(self.wrapped)

    def __getattr__(self, name: str) -> Any:
        found = getattr(self.wrapped, name)
        return _guarded(found) if callable(found) else found

    def open(self, path: str, mode: str = "rb", **options: Any) -> Any:
        with os_errors(path):
            file = self.wrapped.open(path, mode, **options)
        return io.BufferedReader(_RemoteFile(file, path), _BUFFER_BYTES) if mode == "rb" else file

    def find(self, path: str, **options: Any) -> Any:
        """The files below a path: by name, or what is known of them by name."""
        return _without_marks(_guarded(self.wrapped.find)(path, **options))

    def glob(self, path: str, **options: Any) -> Any:
        """The same of what a pattern matches."""
        return _without_marks(_guarded(self.wrapped.glob)(path, **options))

    def put_file(self, local: str, path: str) -> None:
        with os_errors(path):
            self.wrapped.put_file(local, path)


def _without_marks(found: Any) -> Any:
    """Without what consoles leave in place of folders: objects of no bytes, whose names end with a slash."""
    if isinstance(found, dict):
        return {path: facts for path, facts in found.items() if not path.endswith("/")}
    return [path for path in found if not path.endswith("/")]


def _guarded(method: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(method)
    def call(*arguments: Any, **options: Any) -> Any:
        first = arguments[0] if arguments else None
        with os_errors(first if isinstance(first, str) else None):
            return method(*arguments, **options)

    return call


class _RemoteFile(io.RawIOBase):
    """A file that was opened for reading, under `os_errors`; what buffers it reads lines, which not all of them do."""

    def __init__(self, file: Any, path: str) -> None:
        self._file, self._path = file, path

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return cast(bool, self._file.seekable())

    def tell(self) -> int:
        return cast(int, self._file.tell())

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        with os_errors(self._path):
            return cast(int, self._file.seek(offset, whence))

    def readinto(self, buffer: Any, /) -> int:
        into = memoryview(buffer).cast("B")
        with os_errors(self._path):
            found = self._file.read(len(into))
        into[: len(found)] = found
        return len(found)

    def readall(self) -> bytes:
        with os_errors(self._path):
            return cast(bytes, self._file.read())

    def close(self) -> None:
        if not self.closed:
            super().close()
            with os_errors(self._path):
                self._file.close()
