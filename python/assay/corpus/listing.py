"""What lies in a folder: one listing per folder, links followed once, and a name for whatever is left out."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase

from fsspec.utils import glob_translate

from assay.corpus.storage import Fingerprint, Store, etag_of, size_of

# Linux's own limit, for a name in one folder; object stores allow for more, but scores may be kept locally.
_LONGEST_NAME = 255


@dataclass(frozen=True)
class LeftOut:
    """A file or folder of a corpus that is not read, and why. Its path can be shown and encoded."""

    path: str
    reason: str


def summarise_left_out(left_out: Mapping[str, str], listed: int = 3) -> str:
    """The files that are not read, in one line."""
    shown = "; ".join(f"{path}: {reason}" for path, reason in list(left_out.items())[:listed])
    more = f"; and {len(left_out) - listed} more" if len(left_out) > listed else ""
    return f"left out: {len(left_out)} files or folders ({shown}{more})"


@dataclass(frozen=True)
class Listing:
    """The files under a folder, by path relative to it, in order; a fingerprint where the listing gave one."""

    files: dict[str, Fingerprint | None]
    left_out: tuple[LeftOut, ...] = ()


def list_files(store: Store, folder: str = "") -> Listing:
    """Every file under ``folder``.

    As Spark and Arrow have it, names below ``folder`` that begin with a dot or an underscore are not data. A link to a
    folder is followed, after all folders proper and in order of names, but no folder is listed twice: what two links
    share has the first one's name, and what a link shares with a folder of its own has the folder's. A link to a
    folder that holds the corpus is left out.
    """
    if not store.is_local:
        return _remote(store, folder)
    walk = _Walk(store)
    walk.search_all(folder)
    return Listing(dict.fromkeys(sorted(walk.files)), tuple(walk.left_out))


class _Walk:
    """A search of local folders."""

    def __init__(self, store: Store, depth: int | None = None, is_hidden: bool = False) -> None:
        self.files: list[str] = []
        self.folders: list[str] = []
        self.left_out: list[LeftOut] = []
        self._store = store
        self._depth = depth
        self._is_hidden = is_hidden
        self._links: list[str] = []
        self._listed: set[tuple[int, int]] = set()

    def search_all(self, folder: str) -> None:
        """List a folder, those below it, and those that links lead to."""
        self._search(folder)
        while self._links:
            self._follow(self._links.pop(0))

    def _search(self, folder: str) -> None:
        waiting = [folder]
        while waiting:
            folder = waiting.pop()
            prefix = f"{folder}/" if folder else ""
            try:
                entries = self._entries(folder)
            except OSError as error:
                self.left_out.append(LeftOut(shown(folder) or ".", f"cannot be listed: {error.strerror}"))
                continue
            for entry in entries:
                if not self._is_hidden and entry.name.startswith((".", "_")):
                    continue
                path = prefix + entry.name
                if not _is_folder(entry):
                    self.files.append(path)
                    continue
                self.folders.append(path)
                if self._depth is None or path.count("/") < self._depth:
                    (self._links if entry.is_symlink() else waiting).append(path)
        self._links.sort()

    def _follow(self, link: str) -> None:
        root, target = self._store.full(""), os.path.realpath(self._store.full(link))
        if f"{os.path.realpath(root)}/".startswith(f"{target.rstrip('/')}/"):
            self.left_out.append(LeftOut(shown(link), "is a link to a folder that holds the corpus"))
        else:
            self._search(link)

    def _entries(self, folder: str) -> list[os.DirEntry[str]]:
        """A folder's entries, none if it was listed before under another name."""
        full = self._store.full(folder)
        status = os.stat(full)
        if (status.st_dev, status.st_ino) in self._listed:
            return []
        self._listed.add((status.st_dev, status.st_ino))
        with os.scandir(full) as entries:
            return list(entries)


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link in a circle: reading it will say so
        return False


def _remote(store: Store, folder: str) -> Listing:
    store.fs.invalidate_cache()
    found = store.fs.find(store.full(folder), detail=True)
    files: dict[str, Fingerprint | None] = {}
    below = len(folder) + 1 if folder else 0
    for full, info in sorted(found.items()):
        path = store.relative(full)
        if not any(part.startswith((".", "_")) for part in path[below:].split("/")):
            etag = etag_of(info)
            files[path] = Fingerprint(size_of(info, full), etag=etag) if etag else None
    return Listing(files)


def list_matches(store: Store, pattern: str) -> tuple[Listing, list[str]]:
    """The files and the folders below ``store`` that a glob relative to it matches.

    Wildcards stand for no name that begins with a dot, as in a shell, and for no folder that begins with an underscore:
    those are matched where the glob spells them so.
    """
    is_meant = _without_hidden(pattern)
    if not store.is_local:
        found = {store.relative(full): info for full, info in store.fs.glob(store.full(pattern), detail=True).items()}
        folders = sorted(path for path, info in found.items() if info["type"] == "directory")
        files = sorted(path for path in found.keys() - folders if is_meant(path, False))
        return Listing(dict.fromkeys(files)), [path for path in folders if is_meant(path, True)]
    walk = _Walk(store, None if "**" in pattern else pattern.count("/"), is_hidden=True)
    walk.search_all("")
    matched = re.compile(glob_translate(pattern)).match
    files = sorted(path for path in filter(matched, walk.files) if is_meant(path, False))
    folders = sorted(path for path in filter(matched, walk.folders) if is_meant(path, True))
    left_out = tuple(entry for entry in walk.left_out if entry.path == "." or is_meant(entry.path, True))
    return Listing(dict.fromkeys(files), left_out), folders


def _without_hidden(pattern: str) -> Callable[[str, bool], bool]:
    """Whether a glob that matches a path, of a file or of a folder, spells each hidden name on the way to it."""
    spelt = [part for part in pattern.split("/") if part.startswith((".", "_"))]

    def is_meant(path: str, is_folder: bool) -> bool:
        *folders, last = f"{path}/".split("/") if is_folder else path.split("/")
        hidden = [name for name in folders if name.startswith((".", "_"))] + [last] * last.startswith(".")
        return all(any(fnmatchcase(name, part) for part in spelt) for name in hidden)

    return is_meant


def name_fault(path: str, table: str) -> str | None:
    """Why a file of this path cannot be scored under its name into ``table``; None if it can."""
    if path != shown(path):
        return "its name is not UTF-8; rename it"
    if any(len(name.encode()) > _LONGEST_NAME for name in table.split("/")):
        return f"its score table's name would be longer than {_LONGEST_NAME} bytes; rename it"
    return None


def shown(path: str) -> str:
    """The path with what is not UTF-8 in it escaped."""
    return path.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
