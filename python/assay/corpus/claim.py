"""A folder is written by one selection at a time, or by the runners of one recipe."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import time
from collections.abc import Iterator

from assay.corpus.errors import CorpusError
from assay.corpus.storage import Store

log = logging.getLogger("assay")

CLAIM = ".assay.lock"
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
_PATIENCE_SECONDS = 2.0
_ALONE, _TOGETHER = fcntl.LOCK_EX | fcntl.LOCK_NB, fcntl.LOCK_SH | fcntl.LOCK_NB


@contextlib.contextmanager
def claim(store: Store, work: str, *, shared: bool = False) -> Iterator[None]:
    """Hold a local folder while the block writes into it; a killed process holds nothing.

    Object stores have no such lock: there nothing tells two writers from each other.

    Args:
        store: the folder.
        work: what is written: with ``shared``, whoever writes the same may hold it too.

    Raises:
        CorpusError: somebody else is writing into the folder.
    """
    if not store.is_local:
        yield
        return
    made = not os.path.isdir(store.root)
    os.makedirs(store.root, exist_ok=True)
    path = store.full(CLAIM)
    try:
        descriptor = _held(path, work, shared, time.monotonic() + _PATIENCE_SECONDS)
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        log.warning("%s: this file system has no locks; see that nothing else writes into it", store.url)
        yield
        return
    if descriptor is None:
        raise CorpusError(
            f"{store.url}: another run or selection is writing into this folder; wait for it, or choose another output"
        )
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # the last one to leave takes the file along
            fcntl.flock(descriptor, _ALONE)
            os.unlink(path)
            if made:  # and nothing was written
                os.rmdir(store.root)
        os.close(descriptor)


def is_claimed(store: Store) -> bool | None:
    """Whether somebody holds the folder just now; None where nothing tells: elsewhere than here, or without locks."""
    if not store.is_local:
        return None
    path = store.full(CLAIM)
    try:  # NFS gives the lock only to who may write
        descriptor = os.open(path, os.O_RDWR if os.access(path, os.W_OK) else os.O_RDONLY)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError:
        return None
    try:
        fcntl.flock(descriptor, _ALONE)  # for no longer than this function: who wants to hold it tries for a while
    except BlockingIOError:
        return True
    except OSError:
        return None
    finally:
        os.close(descriptor)
    return False


def _held(path: str, work: str, shared: bool, until: float) -> int | None:
    """A descriptor that holds the lock; None if others hold it until then."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        if _take(descriptor, path, work, shared):
            return descriptor
        os.close(descriptor)
        if time.monotonic() > until:
            return None
        time.sleep(0.05)


def _take(descriptor: int, path: str, work: str, shared: bool) -> bool:
    try:
        try:
            fcntl.flock(descriptor, _ALONE)
        except BlockingIOError:
            if not shared:
                return False
            fcntl.flock(descriptor, _TOGETHER)
            return _is_file(descriptor, path) and os.pread(descriptor, 1 << 16, 0) == work.encode()
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, work.encode(), 0)
        if shared:  # not in one step: in between, another work may have taken it
            fcntl.flock(descriptor, _TOGETHER)
        return _is_file(descriptor, path) and os.pread(descriptor, 1 << 16, 0) == work.encode()
    except BlockingIOError:
        return False


def _is_file(descriptor: int, path: str) -> bool:
    """Whether the lock is on the file of that name; its last holder may have removed it."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False
