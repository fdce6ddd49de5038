"""What a scores folder holds, read from its manifest and its tables' footers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import Enum
from functools import partial
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from assay._json import dumps
from assay._version import __version__
from assay.corpus.errors import CorpusError
from assay.corpus.footer import Identity, Manifest, TableColumn, canonical_hash, open_table
from assay.corpus.layout import MANIFEST, RETRIEVAL, quarantine_path, table_path
from assay.corpus.named_files import changed_file
from assay.corpus.quarantine import read_quarantine
from assay.corpus.shards import Corpus, Shard, find_shards, refuse_overlap, refuse_overlap_with_inputs
from assay.corpus.storage import Fingerprint, Store, may_pass


class State(Enum):
    """Where a shard stands."""

    DONE = "done"
    CHANGED = "changed"
    """It was scored, but its file has changed since, or the recipe or a model has."""
    UNREADABLE = "unreadable"
    MISSING = "missing"
    UNKNOWN = "unknown"
    """Storage failed in a way that may pass: who asks again may be told."""


class Scored(NamedTuple):
    """What a shard's score table says of it: as it was then, its rows, and what became of them. For each of hundreds of
    thousands of shards it is held in memory."""

    input: Fingerprint
    rows: int
    scored: int
    quarantined: int


@dataclass(frozen=True, slots=True)
class ShardStatus:
    """A shard of the corpus and what its score table says, if it has one."""

    shard: Shard
    state: State
    table: Scored | None = None
    detail: str = ""


@dataclass(frozen=True)
class Scores:
    """A scores folder, with the corpus that it is about as it is now."""

    store: Store
    corpus_path: str
    corpus: Corpus
    identity: Manifest
    columns: tuple[str, ...]
    inputs: tuple[str, ...]
    """The paths of the corpora that the scores depend on beside it, as they were then."""
    shards: tuple[ShardStatus, ...]

    def of(self, state: State) -> list[ShardStatus]:
        """The shards in this state."""
        return [status for status in self.shards if status.state is state]


def open_scores(url: str, corpus_path: str | None = None) -> Scores:
    """Read a scores folder. ``corpus_path`` says where the corpus is now, if it moved since it was scored.

    Where storage fails in a way that may pass, the shard that was looked at is `State.UNKNOWN`, and the others are
    looked at all the same. A CorpusError for no scores folder, no corpus, or a table that is none.
    """
    store = Store.at(url)
    manifest = read_manifest(store)
    corpus = find_corpus(corpus_path, manifest.corpus)
    corpus_path = corpus_path or manifest.corpus
    shards = tuple(store.map(partial(_status, store, manifest), corpus.shards))
    columns = tuple(column.name for column in manifest.columns)
    return Scores(store, corpus_path, corpus, manifest, columns, tuple(manifest.inputs), shards)


def read_manifest(store: Store) -> Manifest:
    """The manifest of a scores folder. A CorpusError if it is none."""
    try:
        return Manifest.model_validate_json(store.read_text(MANIFEST))
    except FileNotFoundError as error:
        first = f"; what its shortlist is made from is in {store.full(RETRIEVAL)}"
        hint = first if store.exists(f"{RETRIEVAL}/{MANIFEST}") else ""
        raise CorpusError(f"{store.url}: no {MANIFEST}; expected a folder of `assay score`{hint}") from error
    except ValueError as error:
        raise CorpusError(f"{store.full(MANIFEST)}: not a manifest of `assay score`") from error


def manifest_text(
    identity: Identity,
    corpus_path: str,
    inputs: Sequence[str],
    columns: Sequence[TableColumn],
    shards: Sequence[Shard],
) -> str:
    """What a scores folder says about all of its tables: the inverse of `read_manifest`.

    Args:
        identity: what its scores follow from.
        corpus_path: the corpus that they are about, with these ``shards``.
        inputs: the paths of all other corpora that they depend on.
        columns: the scores of every table.
    """
    manifest = {
        "format": 1,
        "version": __version__,
        "corpus": corpus_path,
        "inputs": sorted(inputs),
        "recipe": identity.recipe,
        "recipe_hash": canonical_hash(identity.recipe),
        "models": identity.models,
        **({"corpora": identity.corpora} if identity.corpora else {}),
        "seed": identity.recipe["seed"],
        "columns": [column.model_dump() for column in columns],
        "shards": [{"path": shard.path, "table": table_path(shard)} for shard in shards],
    }
    return dumps(manifest, indent=2, ensure_ascii=False) + "\n"


def find_corpus(now: str | None, then: str) -> Corpus:
    """The corpus where it is ``now``, or where the manifest says that it was."""
    try:
        return find_shards(now or then)
    except CorpusError as error:
        if now is not None:
            raise
        raise CorpusError(f"{error}; if the corpus has moved, say where it is with --corpus") from error


def refuse_corpora(output: Store, scores: Scores, written: Sequence[str], others: Iterable[str] = ()) -> None:
    """CorpusError if what is written would fall on a corpus, or be taken for part of it next time: on that which scores
    are about, where it is or where it was, on one that they depend on, or on ``others``.

    Args:
        written: what is written, relative to ``output``.
        others: paths of other corpora.
    """
    refuse_overlap(output, scores.corpus_path, scores.corpus, written)
    paths = {scores.identity.corpus, *scores.inputs, *others} - {scores.corpus_path}
    refuse_overlap_with_inputs(output, sorted(paths), written)


def refuse_scores(output: Store, *used: Store, itself: bool = True) -> None:
    """CorpusError if what is written would lie among scores: of a folder that is ``used`` (it may be yet to be made),
    or of any other that ``output`` is or, by whatever links, lies in.

    Args:
        itself: False for what makes scores folders: the output may be one, and lies in none.
    """
    above = Path(output.real()).parents if output.is_local else PurePosixPath(output.root).parents
    folders = [output] if itself else []
    folders += [Store(output.fs, str(folder)) for folder in above if folder.name]  # the root is nobody's scores
    found = next((store for store in used if store.holds(output)), None) or next(filter(_is_scores, folders), None)
    if found is not None:
        raise CorpusError(f"{output.url}: lies among the scores {found.url}; choose another output")


def _is_scores(store: Store) -> bool:
    try:
        read_manifest(store)
    except (OSError, ValueError) as error:
        if may_pass(error):
            raise
        return False
    return True


def _status(store: Store, identity: Identity, shard: Shard) -> ShardStatus:
    try:
        return _look(store, identity, shard)
    except OSError as error:
        if not may_pass(error):
            raise
        return ShardStatus(shard, State.UNKNOWN, detail=f"storage failed ({' '.join(str(error).split())})")


def _look(store: Store, identity: Identity, shard: Shard) -> ShardStatus:
    table = open_table(store, shard)
    if table is None:
        entry = next(read_quarantine(store, shard), None)
        if entry is not None and entry.row is None:
            return ShardStatus(shard, State.UNREADABLE, detail=entry.reason)
        return ShardStatus(shard, State.MISSING)
    then, counts = table.footer.input, table.footer.rows
    scored = Scored(then.fingerprint, then.rows, counts.scored, counts.quarantined)
    differences = table.differences(identity)
    if differences:
        return ShardStatus(shard, State.CHANGED, scored, differences[0])
    try:
        same = table.input_is(shard, shard.as_found())
    except OSError as error:
        if may_pass(error):
            raise
        return ShardStatus(shard, State.CHANGED, scored, f"the file cannot be looked at: {error.strerror}")
    if not same:
        detail = "the file has changed since it was scored" if then.path == shard.path else f"was scored as {then.path}"
        return ShardStatus(shard, State.CHANGED, scored, detail)
    if not table.list_is_there(store, shard):
        detail = f"{quarantine_path(shard)} is not the list that was written with its table"
        return ShardStatus(shard, State.CHANGED, scored, detail)
    if changed := changed_file(store, shard, table.footer.input.files):
        return ShardStatus(shard, State.CHANGED, scored, changed)
    return ShardStatus(shard, State.DONE, scored)
