"""A scores folder as a whole: every table against its shard, and what lies about besides."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from assay.corpus.claim import CLAIM, is_claimed
from assay.corpus.errors import CorpusError
from assay.corpus.footer import Manifest
from assay.corpus.layout import FITS, MANIFEST, PARTS, RETRIEVAL, files_path, quarantine_path, table_path
from assay.corpus.scores_folder import find_corpus, read_manifest
from assay.corpus.shards import Corpus
from assay.corpus.storage import ABANDONED_AFTER_SECONDS, Store, may_pass
from assay.corpus.table_checks import check_shard
from assay.corpus.tables import score_schema

log = logging.getLogger("assay")

_LOG_SECONDS = 10.0


@dataclass(frozen=True)
class Problem:
    """Something that is wrong with a file of a scores folder or of its corpus."""

    path: str
    what: str

    def __str__(self) -> str:
        return f"{self.path}: {self.what}"


@dataclass
class Validated:
    """What was looked at: ``scored`` and ``quarantined`` rows, and ``unreadable`` shards, which a list names whole.

    Of the ``problems``, ``unchecked`` are of tables that were not seen to their end, of which the rows of their footers
    count: storage failed, and may answer later.
    """

    shards: int
    running: bool | None
    """Whether a run is writing into the folder; None where nothing tells."""
    scored: int = 0
    quarantined: int = 0
    unreadable: int = 0
    unchecked: int = 0
    problems: int = 0


def validate_scores(
    url: str,
    corpus_path: str | None = None,
    on_problem: Callable[[Problem], None] = lambda problem: None,
) -> Validated:
    """Compare every score table of a folder with its shard: what it is now, its rows, ids, order, columns and numbers.

    Args:
        url: the folder.
        corpus_path: where the corpus is now, if it has moved.
        on_problem: is called with each as it is found. Where storage fails in a way that may pass, that is a problem of
            the table or folder that was looked at, and the next ones are looked at all the same.

    Raises:
        CorpusError: it is no scores folder, or its corpus is not there.
    """
    store = Store.at(url)
    manifest = read_manifest(store)
    _check_columns(store, manifest)
    corpus = find_corpus(corpus_path, manifest.corpus)
    result = Validated(len(corpus.shards), is_claimed(store))

    def report(path: str, what: str) -> None:
        result.problems += 1
        on_problem(Problem(path, what))

    for left_out in corpus.left_out:
        report(left_out.path, f"is not read, and has no scores: {left_out.reason}")
    said = time.monotonic()
    for place, shard in enumerate(corpus.shards):
        if time.monotonic() - said > _LOG_SECONDS:
            said = time.monotonic()
            log.info("%d/%d shards, %s rows", place, result.shards, f"{result.scored + result.quarantined:,}")
        checked = check_shard(store, shard, manifest)
        for what in checked.problems:
            report(table_path(shard), what)
        if checked.unchecked:
            report(table_path(shard), f"could not be checked ({checked.unchecked}); validate again")
        result.scored += checked.scored
        result.quarantined += checked.quarantined
        result.unreadable += checked.unreadable
        result.unchecked += bool(checked.unchecked)
    try:
        for problem in _besides(store, corpus, result.running):
            report(problem.path, problem.what)
    except OSError as error:
        if not may_pass(error):
            raise
        report(
            store.url, f"what lies about besides could not be listed ({' '.join(str(error).split())}); validate again"
        )
    return result


def _check_columns(store: Store, manifest: Manifest) -> None:
    try:
        score_schema(manifest.columns, {})
    except ValueError as error:
        raise CorpusError(f"{store.full(MANIFEST)}: {error}") from error


def _besides(store: Store, corpus: Corpus, running: bool | None) -> Iterator[Problem]:
    """What lies about that is of no shard, or of no run that goes on."""
    files = store.files()
    yield from _leftovers(store, files, running)
    yield from _strays(files, corpus)


# Who asks where no lock tells, or between runs over parts of the shards, sees these of runs that nobody has killed.
_OF_FITS = (
    "parts of fits, of a run that goes on, was killed or was over a part of the shards; a later run takes them up, and "
    "removes them when every shard is done"
)
_OF_SHARDS = "parts of shards, of a run that goes on or was killed; a later run removes them when they are a day old"
_WAITING = {FITS: _OF_FITS, PARTS: _OF_SHARDS, f"{RETRIEVAL}/{FITS}": _OF_FITS, f"{RETRIEVAL}/{PARTS}": _OF_SHARDS}


def _leftovers(store: Store, files: Sequence[str], running: bool | None) -> Iterator[Problem]:
    """What runs have left. While one is running, only what is too old to be its own."""
    for path in store.temporaries(-math.inf if running is False else ABANDONED_AFTER_SECONDS):
        yield Problem(path, "was left by a run that was killed; a later run removes it when it is an hour old")
    if running is False and store.exists(CLAIM):
        yield Problem(CLAIM, "was left by a run that was killed; a later run takes it over")
    if running:
        return
    for folder, what in _WAITING.items():
        if count := sum(path.startswith(f"{folder}/") for path in files):
            yield Problem(folder, f"holds {count:,} {what}")


def _strays(files: Sequence[str], corpus: Corpus) -> Iterator[Problem]:
    """Files of shards that there are not."""
    tables, lists, named, stems = (
        {path(shard) for shard in corpus.shards}
        for path in (table_path, quarantine_path, files_path, lambda shard: shard.stem)
    )
    for path in files:
        top, _, rest = path.partition("/")
        if top == RETRIEVAL:
            continue
        if path.endswith(".parquet") and path not in tables:
            yield Problem(path, "is a score table without a shard")
        elif top == "quarantine" and path.endswith(".jsonl") and path not in lists:
            yield Problem(path, "is a list of quarantined rows without a shard")
        elif top == "files" and path.endswith(".jsonl") and path not in named:
            yield Problem(path, "is a list of named files without a shard")
        elif top == "features" and path.endswith(".arrow") and _stem(rest) not in stems:
            yield Problem(path, "are features without a shard")


def _stem(path: str) -> str:
    """Of features by their path below `features/`, which begins with method and checkpoint."""
    return path.partition("/")[2].partition("/")[2].removesuffix(".arrow")
