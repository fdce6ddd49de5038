"""Finding a corpus's shards: files by suffix, and Hugging Face data sets saved to disk."""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from assay.corpus.errors import CorpusError
from assay.corpus.storage import Fingerprint, Store

log = logging.getLogger("assay")

Format = Literal["parquet", "arrow", "jsonl"]
Compression = Literal["gz", "zst"]

_FORMATS: dict[str, Format] = {
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".feather": "arrow",
    ".jsonl": "jsonl",
    ".json": "jsonl",
}
_COMPRESSIONS: dict[str, Compression] = {".gz": "gz", ".zst": "zst"}
SUFFIXES = ".parquet, .arrow, .feather, .jsonl, .json (the last two also with .gz or .zst)"

# What `save_to_disk` writes beside the Arrow files. The first marks a data set's folder.
STATE = "state.json"
SIDECARS = (STATE, "dataset_info.json", "dataset_dict.json")
# What a selection writes beside its shards: its output is a corpus like any other.
MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Shard:
    """One file of a corpus. Its ``path`` is relative to the corpus's root."""

    store: Store
    path: str
    format: Format
    compression: Compression | None = None

    @property
    def stem(self) -> str:
        """The path without its suffixes: what is written about it carries the same."""
        stem = self.path
        if self.compression:
            stem = os.path.splitext(stem)[0]
        return os.path.splitext(stem)[0]

    @property
    def folder(self) -> str:
        """The folder that it lies in, relative to the corpus's root."""
        return os.path.dirname(self.path)

    def fingerprint(self) -> Fingerprint:
        return self.store.fingerprint(self.path)


@dataclass(frozen=True)
class Corpus:
    """A root folder, its shards in order, and the files that make saved data sets of them."""

    store: Store
    shards: tuple[Shard, ...]
    sidecars: tuple[str, ...] = ()


def find_shards(url: str) -> Corpus:
    """The shards that a file, folder, glob or saved data set holds, sorted by path.

    A folder is searched for every known suffix, but not under names that begin with `.` or `_`; a file named
    or matched by a glob must have one. Two shards whose score tables would share a name are a CorpusError,
    as is finding none.
    """
    named = Store.at(url)
    fs, full = named.fs, named.root
    wildcard = re.search(r"[*?[]", full)
    if wildcard and not fs.exists(full):
        root = os.path.dirname(full[: wildcard.start()])
        matches = sorted(fs.glob(full))
    elif fs.isdir(full):
        root, matches = full, [full]
    else:
        root, matches = os.path.dirname(full), [full] if fs.exists(full) else []
    store = Store(fs, root or "/")
    shards: dict[str, Shard] = {}
    sidecars: list[str] = []
    for match in matches:
        if fs.isdir(match):
            found, beside = _in_folder(store, sorted(store.relative(path) for path in fs.find(match)))
            shards.update((shard.path, shard) for shard in found)
            sidecars += beside
        else:
            shard = _shard(store, store.relative(match))
            if shard is None:
                raise CorpusError(f"{match}: not a known format; expected {SUFFIXES}")
            shards[shard.path] = shard
    if not shards:
        raise CorpusError(f"{url}: no shard found; expected files ending in {SUFFIXES}")
    ordered = tuple(shards[path] for path in sorted(shards))
    _check_tables_differ(ordered)
    return Corpus(store, ordered, tuple(sorted(set(sidecars))))


def refuse_overlap(output: Store, named: str, corpus: Corpus) -> None:
    """CorpusError if what is written under ``output`` would fall on a corpus, or be taken for part of it next time.

    Args:
        output: where is written.
        named: the path, URL or glob under which the corpus was found.
        corpus: what was found there.
    """
    fs, root = corpus.store.fs, Store.at(named)
    folders = {os.path.dirname(corpus.store.real(shard.path)) for shard in corpus.shards}
    # In a folder the next run would find what lies there, and what lies behind its links.
    searched = {root.real(), *(corpus.store.real(f) for f in {s.folder for s in corpus.shards})}
    inside = fs.isdir(root.root) and any(Store(fs, folder).holds(output) for folder in searched)
    if inside or any(output.holds(Store(fs, folder)) for folder in folders):
        at = "" if output.real() == output.root else f" ({output.real()})"
        raise CorpusError(f"{output.url}{at}: the output and the corpus {named} must not lie in each other")


def _shard(store: Store, path: str) -> Shard | None:
    stem, suffix = os.path.splitext(path)
    compression = _COMPRESSIONS.get(suffix.lower())
    if compression:
        suffix = os.path.splitext(stem)[1]
    kind = _FORMATS.get(suffix.lower())
    if kind is None or (compression and kind != "jsonl"):
        return None
    return Shard(store, path, kind, compression)


def _in_folder(store: Store, paths: Iterable[str]) -> tuple[list[Shard], list[str]]:
    # As Spark and Arrow have it, names that begin with a dot or an underscore are not data.
    visible = [path for path in paths if not any(part.startswith((".", "_")) for part in path.split("/"))]
    visible = [path for path in visible if os.path.basename(path) != MANIFEST]
    sidecars = [path for path in visible if os.path.basename(path) in SIDECARS]
    saved = {os.path.dirname(path) for path in sidecars if os.path.basename(path) == STATE}
    shards, ignored = [], 0
    for folder in sorted(saved):
        shards += _saved_data_set(store, folder)
    for path in visible:
        if path in sidecars or os.path.dirname(path) in saved:
            continue  # a saved data set says itself which of its files count
        shard = _shard(store, path)
        if shard is None:
            ignored += 1
        else:
            shards.append(shard)
    if ignored:
        log.info("%d files with other suffixes than %s are left alone", ignored, SUFFIXES)
    return shards, sidecars


def _saved_data_set(store: Store, folder: str) -> list[Shard]:
    """The Arrow files that a saved data set's state lists, in its own order of names."""
    state_path = f"{folder}/{STATE}" if folder else STATE
    try:
        names = [entry["filename"] for entry in json.loads(store.read_text(state_path))["_data_files"]]
    except (ValueError, KeyError, TypeError) as error:
        raise CorpusError(f"{store.full(state_path)}: not the state of a saved data set ({error!r})") from error
    for name in names:
        if not isinstance(name, str) or name != os.path.basename(name) or name in ("", ".", ".."):
            raise CorpusError(f"{store.full(state_path)}: lists {name!r}; expected plain file names")
    return [Shard(store, f"{folder}/{name}" if folder else name, "arrow") for name in names]


def _check_tables_differ(shards: Iterable[Shard]) -> None:
    owners: dict[str, Shard] = {}
    for shard in shards:
        first = owners.setdefault(shard.stem, shard)
        if first is not shard:
            table = f"{shard.stem}.parquet"
            raise CorpusError(f"{first.path} and {shard.path} would share the score table {table}; rename one")
