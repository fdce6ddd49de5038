"""Finding a corpus's shards: files by suffix, and Hugging Face data sets saved to disk."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from fsspec.utils import glob_translate

from assay.corpus.compression import MAX_LINE_BYTES, Compression
from assay.corpus.errors import CorpusError
from assay.corpus.formats import SUFFIXES, Format, folder_of, format_of, images
from assay.corpus.listing import LeftOut, Listing, list_files, list_matches, name_fault, shown
from assay.corpus.media import IMAGES
from assay.corpus.saved_data_sets import SIDECARS, STATE, listed_files
from assay.corpus.storage import Fingerprint, Store, is_of_file, may_pass

log = logging.getLogger("assay")

# What a selection writes beside its shards: its output is a corpus like any other.
MANIFEST = "manifest.json"

# Files that describe a corpus or belong to its rows. Any other file that is not a shard may be data that is missed.
_COMPANION_NAMES = ("readme", "license", "licence", "notice", "citation", "changelog", "copying", "authors")
_COMPANION_SUFFIXES = (
    *(".md", ".rst", ".html", ".pdf", ".bib", ".cff", ".yaml", ".yml", ".toml", ".ini", ".cfg", ".py", ".ipynb", ".sh"),
    *(".log", ".lock", ".crc", ".md5", ".sha1", ".sha256", ".sha512", ".sig", ".asc"),
    *(*IMAGES, ".svg", ".wav", ".flac", ".mp3", ".mp4"),
)
_CHECKSUMS = re.compile(r"(md5|sha\d+)sums?(\.txt)?|checksums?(\.txt)?")


@dataclass(frozen=True, slots=True)
class Shard:
    """One file of a corpus, or of a format of folders one folder. Its ``path`` is relative to the corpus's root."""

    store: Store
    path: str
    format: Format
    compression: Compression | None = None
    listed: Fingerprint | None = field(default=None, compare=False, repr=False)
    """What the listing that found it said of it, where that says what `fingerprint` would (object stores)."""
    classes: tuple[str, ...] = field(default=(), compare=False, repr=False)
    """Of a folder of images: the classes that it and those beside it have."""

    @property
    def stem(self) -> str:
        """The path, of a file without its suffixes: what is written about it carries the same."""
        if self.is_folder:
            return self.path
        # It has its suffixes, or it were no shard. A plan asks for this some million times.
        stem = self.path.rpartition(".")[0]
        return stem.rpartition(".")[0] if self.compression else stem

    @property
    def folder(self) -> str:
        """The folder that it lies in, or that it is, relative to the corpus's root."""
        return self.path if self.is_folder else os.path.dirname(self.path)

    @property
    def is_folder(self) -> bool:
        return self.format.files is not None

    def files(self) -> list[str]:
        """The files that it is made of, as they are now, relative to the corpus's root. An OSError for a folder without
        any."""
        return list(self._listed_files())

    def _listed_files(self) -> dict[str, Fingerprint | None]:
        """One listing tells of all files, where it can, what a request for each would."""
        if self.format.files is None:
            return {self.path: None}
        return {f"{self.path}/{path}": found for path, found in self.format.files(self.store, self.path).items()}

    def as_found(self) -> Fingerprint:
        """The fingerprint that it was found with, or, where the listing does not tell it, as it is now."""
        return self.listed or self.fingerprint()

    def fingerprint(self) -> Fingerprint:
        """The file's fingerprint as it is now, or one of all files' names and fingerprints."""
        if not self.is_folder:
            return self.store.fingerprint(self.path)
        self.store.fs.invalidate_cache()
        digest, size = hashlib.sha256(), 0
        for path, listed in self._listed_files().items():
            facts = "not there"  # a link that leads nowhere; reading it will say what is the matter
            try:
                found = listed or self.store.fingerprint(path)
                size, facts = size + found.size, str(sorted(found.to_json().items()))
            except OSError as error:
                if not is_of_file(error):
                    raise
            digest.update(f"{path}\0{facts}\n".encode("utf-8", "surrogateescape"))
        return Fingerprint(size, etag=f"sha256:{digest.hexdigest()}")


@dataclass(frozen=True)
class Corpus:
    """A root folder, its shards in order, the files that make saved data sets of them, and what was left out."""

    store: Store
    shards: tuple[Shard, ...]
    sidecars: tuple[str, ...] = ()
    left_out: tuple[LeftOut, ...] = ()
    """Files and folders that may hold data and are not read; a run over this corpus is not complete."""


def find_shards(url: str) -> Corpus:
    """The shards that a file, folder, glob or saved data set holds, sorted by path.

    A folder is searched for every known suffix, but not under names that begin with `.` or `_`; links to folders
    are followed once. A file named or matched by a glob must have a known suffix. Two shards whose score tables
    would share a name are a CorpusError, as is finding none.
    """
    named = Store.at(url)
    fs, full = named.fs, named.root
    wildcard = re.search(r"[*?[]", full)
    if wildcard and not fs.exists(full):
        store = Store(fs, os.path.dirname(full[: wildcard.start()]) or "/")
        listing, folders = list_matches(store, store.relative(full))
    elif fs.isdir(full) and not folder_of(f"{os.path.basename(full)}/"):
        store, listing, folders = Store(fs, full), Listing({}), [""]
    elif fs.exists(full):
        store = Store(fs, os.path.dirname(full) or "/")
        listing, folders = Listing({store.relative(full): None}), []
    else:
        raise CorpusError(f"{url}: no such file or folder")
    search = _Search(store, is_folder=folders == [""])
    search.left_out += listing.left_out
    for path, fingerprint in listing.files.items():
        if not search.add(path, fingerprint):
            raise CorpusError(f"{store.full(path)}: not a known format; expected {SUFFIXES}")
    for folder in folders:
        search.look_into(folder)
    return search.corpus(url)


def refuse_overlap(output: Store, named: str, corpus: Corpus, written: Sequence[str] = ()) -> None:
    """CorpusError if what is written under ``output`` would fall on a corpus, or be taken for part of it next time.

    Args:
        output: where is written.
        named: the path, URL or glob under which the corpus was found.
        corpus: what was found there.
        written: what is written, relative to ``output``: a glob must not match it.
    """
    fs, root = corpus.store.fs, Store.at(named)
    own = {corpus.store.real(folder) for folder in {f for shard in corpus.shards for f in _folders(shard)}}
    folders = _real_folders(corpus.store, [shard.path for shard in corpus.shards if not shard.is_folder])
    folders |= own if any(shard.is_folder for shard in corpus.shards) else set()
    # In a folder the next run would find what lies there, and what lies behind its links.
    searched = {root.real(), *own}
    inside = fs.isdir(root.root) and any(Store(fs, folder).holds(output) for folder in searched)
    pattern = re.compile(glob_translate(root.root)) if re.search(r"[*?[]", root.root) else None
    matched = pattern is not None and any(pattern.match(output.full(path)) for path in written)
    if inside or matched or any(output.holds(Store(fs, folder)) for folder in folders):
        at = "" if output.real() == output.root else f" ({output.real()})"
        raise CorpusError(f"{output.url}{at}: the output and the corpus {named} must not lie in each other")


def refuse_overlap_with_inputs(output: Store, inputs: Iterable[str], written: Sequence[str] = ()) -> None:
    """`refuse_overlap` with the corpora under these paths, as far as they are there still."""
    for path in inputs:
        try:
            found = find_shards(path)
        except (CorpusError, OSError) as error:
            if may_pass(error):
                raise
            continue  # it is gone: nothing to write over
        refuse_overlap(output, path, found, written)


def _real_folders(store: Store, paths: Sequence[str]) -> set[str]:
    """The folders where files themselves lie; one that is a link lies elsewhere."""
    links = {path for path in paths if store.is_local and os.path.islink(store.full(path))}
    named = {os.path.dirname(path) for path in paths if path not in links}
    return {os.path.dirname(store.real(path)) for path in links} | {store.real(folder) for folder in named}


def _folders(shard: Shard) -> set[str]:
    """The folders that its files lie in, and that itself is or lies in."""
    try:
        return {shard.folder, *map(os.path.dirname, shard.files())}
    except OSError:  # it is gone: reading it will say so
        return {shard.folder}


class _Search:
    """What has been found so far."""

    def __init__(self, store: Store, is_folder: bool) -> None:
        self._is_folder = is_folder
        self.left_out: list[LeftOut] = []
        self._store = store
        self._images: list[str] = []
        self._shards: dict[str, Shard] = {}
        self._sidecars: set[str] = set()
        self._companions = 0

    def corpus(self, url: str) -> Corpus:
        """The whole, if it is one. Only where nothing else is found do images count."""
        if not self._shards and self._is_folder:
            self._add_images(url)
        left_out = tuple(dict.fromkeys(sorted(self.left_out, key=lambda entry: entry.path)))
        if not self._shards:
            reasons = "".join(f"; {entry.path}: {entry.reason}" for entry in left_out[:3])
            raise CorpusError(
                f"{url}: no shard found; expected files ending in {SUFFIXES}, or a folder of images per class{reasons}"
            )
        shards = tuple(self._shards[path] for path in sorted(self._shards))
        _check_tables_differ(shards)
        if self._companions:
            log.info("%d files that belong to no format are left alone, such as notes and media", self._companions)
        return Corpus(self._store, shards, tuple(sorted(self._sidecars)), left_out)

    def add(self, path: str, fingerprint: Fingerprint | None = None) -> bool:
        """Take a file as a shard, or leave it out if its name is unfit; False if its suffix is of no format."""
        known = format_of(path)
        if known is None:
            return False
        shard = Shard(self._store, path, *known, fingerprint)
        fault = name_fault(path, f"{shard.stem}.parquet")
        if fault:
            self.left_out.append(LeftOut(shown(path), fault))
        else:
            self._shards[path] = shard
        return True

    def _add_images(self, url: str) -> None:
        """Take the folders whose folders hold the images that were found; an image outside of one is left out."""
        inside = [path for path in self._images if "/" in path]
        outside = [path for path in self._images if "/" not in path]
        self.left_out += [LeftOut(shown(path), "an image that lies in no folder of a class") for path in outside]
        depths = {path.count("/"): path for path in reversed(inside)}
        if len(depths) > 1:
            few = " and ".join(shown(path) for path in sorted(depths.values()))
            raise CorpusError(f"{url}: images lie at different depths ({few}); expected all as <class>/<image>")
        folders = sorted({os.path.dirname(os.path.dirname(path)) for path in inside})
        if folders == [""]:
            # The shard needs a name: it is that of the folder itself.
            name = os.path.basename(self._store.root)
            self._store, folders = Store(self._store.fs, os.path.dirname(self._store.root) or "/"), [name]
        classes = tuple(sorted({os.path.basename(os.path.dirname(path)) for path in inside}))
        for folder in folders:
            fault = name_fault(folder, f"{folder}.parquet")
            if fault:
                self.left_out.append(LeftOut(shown(folder), fault))
            else:
                self._shards[folder] = Shard(self._store, folder, images.FORMAT, classes=classes)

    def look_into(self, folder: str) -> None:
        """Take a folder's shards."""
        listing = list_files(self._store, folder)
        self.left_out += listing.left_out
        paths = {path: found for path, found in listing.files.items() if os.path.basename(path) != MANIFEST}
        self.left_out += [
            LeftOut(shown(path), "has the name of what a selection writes, and holds JSON lines; rename it")
            for path in listing.files.keys() - paths.keys()
            if _holds_rows(self._store, path)
        ]
        states = self._states(paths)
        for path, fingerprint in paths.items():
            listed = states.get(os.path.dirname(path))
            if path in self._sidecars or os.path.basename(path) == STATE:
                continue
            # A saved data set says itself which of its Arrow files count: others are what `map` cached.
            if listed is not None and path.endswith(".arrow") and path not in listed:
                continue
            within = folder_of(path)
            if not (self.add(within) if within else self.add(path, fingerprint)):
                self._leave(path)
        for listed in states.values():  # a file that is listed and missing is a shard that cannot be read
            for path in listed - paths.keys():
                self.add(path)

    def _states(self, paths: Mapping[str, object]) -> dict[str, set[str]]:
        """The folders that hold a saved data set, each with the files that its state lists; none if it is damaged."""
        states: dict[str, set[str]] = {}
        for path in paths:
            folder, name = os.path.split(path)
            if name not in SIDECARS:
                continue
            if name == STATE:
                states[folder] = set()
                try:
                    names = listed_files(self._store, path)
                except CorpusError as error:
                    self.left_out.append(LeftOut(shown(path), f"{error}; no Arrow file beside it is read"))
                    continue
                states[folder] = {f"{folder}/{name}" if folder else name for name in names}
            self._sidecars.add(path)
        return states

    def _leave(self, path: str) -> None:
        """Leave a file alone that is no shard."""
        name = os.path.basename(path).lower()
        stem, suffix = os.path.splitext(name)
        if stem in _COMPANION_NAMES or suffix in _COMPANION_SUFFIXES or _CHECKSUMS.fullmatch(name):
            self._companions += 1
            if suffix in IMAGES:
                self._images.append(path)
        else:
            self.left_out.append(LeftOut(shown(path), f"not a known format; expected {SUFFIXES}"))


def _holds_rows(store: Store, path: str) -> bool:
    """Whether a file begins with JSON lines, and not with a document, as a selection's manifest is one."""
    try:
        with store.open(path) as file:
            first, second = (json.loads(file.readline(MAX_LINE_BYTES)) for _ in range(2))
    except (OSError, ValueError, RecursionError) as error:
        if may_pass(error):
            raise
        return False
    return isinstance(first, dict) and isinstance(second, dict)


def _check_tables_differ(shards: Iterable[Shard]) -> None:
    owners: dict[str, Shard] = {}
    for shard in shards:
        table = f"{shard.stem}.parquet"
        first = owners.setdefault(table, shard)
        if first is not shard:
            raise CorpusError(f"{first.path} and {shard.path} would share the score table {table}; rename one")
    for shard in shards:
        folder = f"{shard.stem}.parquet"
        while folder := os.path.dirname(folder):
            if folder in owners:
                clash = owners[folder].path
                raise CorpusError(
                    f"{clash}: its score table {folder} would be the folder of {shard.path}'s; rename one"
                )
