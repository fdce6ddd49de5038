"""Where parts of a shard wait until they are joined: hidden files that all workers of a run and its crew see."""

from __future__ import annotations

import contextlib
import os
import tempfile
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from typing import BinaryIO

from assay.corpus.layout import PARTS
from assay.corpus.storage import Store, temporary_name

# Elsewhere than here nothing gives a part that waits a new age.
_ABANDONED_AFTER_SECONDS = 24 * 3600.0


@contextlib.contextmanager
def staging(output: Store, sees_local_files: bool) -> Iterator[Callable[[], str]]:
    """Names for parts: in a local output hidden temporaries, which a later run sweeps if this one is killed; else files
    of this machine, if all workers are here, or objects beside the tables."""
    if output.is_local:
        yield lambda: os.path.join(output.root, temporary_name())
    elif sees_local_files:
        with tempfile.TemporaryDirectory() as folder:
            yield lambda: os.path.join(folder, uuid.uuid4().hex)
    else:
        yield lambda: f"{output.url}/{PARTS}/{uuid.uuid4().hex}"


@contextlib.contextmanager
def new(path: str) -> Iterator[BinaryIO]:
    """A part to be written; as an object it appears when it is whole."""
    store, name = _at(path)
    with open(path, "xb") if store.is_local else store.write(name) as file:
        yield file


def opened(path: str) -> BinaryIO:
    """A part that is there."""
    store, name = _at(path)
    return store.open(name)


def is_there(path: str) -> bool:
    store, name = _at(path)
    return store.exists(name)


def remove(paths: Iterable[str]) -> None:
    """Those of them that are there."""
    for store, name in map(_at, paths):
        with contextlib.suppress(FileNotFoundError):
            store.fs.rm_file(store.full(name))


def renew(paths: Iterable[str]) -> None:
    """Give files of this machine a new age: an hour's is what others take for an abandoned one."""
    for path in paths:
        with contextlib.suppress(OSError):  # if it is gone, joining the parts will say so
            if _at(path)[0].is_local:
                os.utime(path)


def sweep(output: Store) -> list[str]:
    """Delete the objects that killed runs left a day ago; temporaries of a local output are ``Store.sweep``'s."""
    if output.is_local:
        return []
    parts = Store.at(f"{output.url}/{PARTS}")
    times = parts.times(parts.files())
    old = [path for path, at in times.items() if at is not None and time.time() - at > _ABANDONED_AFTER_SECONDS]
    remove(f"{parts.url}/{path}" for path in old)
    return [f"{PARTS}/{path}" for path in old]


def _at(path: str) -> tuple[Store, str]:
    folder, _, name = path.rpartition("/")
    return Store.at(folder), name
