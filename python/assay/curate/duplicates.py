"""Which rows of a corpus are copies, or nearly, of rows before them: from the signatures in a scores folder.

Signatures are a score like any other, made shard by shard by `assay score` (``methods.MinHash``). What they say
together is found here: it depends on all shards and their order, so no shard can be looked at alone.
"""

from __future__ import annotations

import json
import logging
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from assay.corpus.claim import claim
from assay.corpus.errors import CorpusError
from assay.corpus.footer import Footer, Identity, TableColumn, canonical_hash, find_table
from assay.corpus.layout import MANIFEST, quarantine_path, table_path
from assay.corpus.named_files import copy_files
from assay.corpus.quarantine import list_digest
from assay.corpus.score_files import ScoreWriter
from assay.corpus.scores_folder import Scores, State, manifest_text, open_scores, refuse_corpora, refuse_scores
from assay.corpus.shards import Shard
from assay.corpus.storage import Store
from assay.corpus.tables import count_nan
from assay.curate.rows import Tables, read_batches
from assay.curate.whole import scored_shards

log = logging.getLogger("assay")

COLUMNS = (
    TableColumn(
        name="copies", keep="low", description="how many rows before it have the same text, but for blanks and case"
    ),
    TableColumn(
        name="similarity",
        keep="low",
        description="estimated Jaccard similarity with the most similar row before it that shares a band; 0: none does",
    ),
)
_METHOD = "minhash"
_CHUNK = 1 << 14  # rows whose signatures are compared at a time


@dataclass(frozen=True)
class Duplicates:
    """What was found.

    Attributes:
        rows: that have a text.
        copies: of them, how many have a copy before them.
        alike: how many others are like a row before them, by an estimated similarity of .8 or more.
    """

    rows: int
    copies: int
    alike: int


@dataclass(frozen=True)
class _Signatures:
    """Of all rows: (N,) 64 bits of the text, (N, count) bytes, and which rows have which."""

    texts: npt.NDArray[np.uint64]
    bytes: npt.NDArray[np.uint8]
    has_text: npt.NDArray[np.bool_]
    has_bytes: npt.NDArray[np.bool_]


def find_duplicates(
    scores_url: str, output_url: str, *, name: str = "minhash", corpus_path: str | None = None
) -> Duplicates:
    """Write a scores folder of the same corpus that says of every row how many rows before it are copies of it.

    Before it: in an earlier shard, by path, or further up. Its scores are ``copies`` and ``similarity``; a selection
    takes them beside others: ``assay select SCORES --with dup=DIR --where "dup.copies = 0 and dup.similarity < 0.8"``.

    ``similarity`` looks at no more than one earlier row for each band, the first that has the same: it is 1 for a copy.
    About 150 bytes of memory a row are needed, with the default signatures.

    Args:
        scores_url: a scores folder with the columns of ``methods.MinHash``.
        output_url: where to write.
        name: of the method in that folder.
        corpus_path: where the corpus is now, if it has moved.

    Raises:
        CorpusError: there are no signatures, they do not cover the corpus as it is now, or the output is or lies in
            something else's folder.
    """
    scores = open_scores(scores_url, corpus_path)
    tables, rows = scored_shards(scores), _rows_of_a_band(scores, name)
    output = Store.at(output_url)
    _refuse_inputs(output, scores)
    identity = _identity(scores, tables, name)
    _refuse_others(output, identity)
    signatures = _read(scores, tables, name, rows)
    copies, similarity = _copies(signatures), _similarity(signatures, rows)
    similarity[copies > 0] = 1
    with claim(output, canonical_hash(identity.recipe)):
        shards = [status.shard for status in scores.shards]
        output.write_text(MANIFEST, manifest_text(identity, scores.corpus_path, scores.inputs, COLUMNS, shards))
        start = 0
        for shard, table in tables:
            own = slice(start, start := start + table.scored)
            _write(scores.store, output, shard, identity, {"copies": copies[own], "similarity": similarity[own]})
        for status in scores.of(State.UNREADABLE):
            _copy_list(scores.store, output, status.shard)
    again = copies > 0
    return Duplicates(int(signatures.has_text.sum()), int(again.sum()), int((~again & (similarity >= 0.8)).sum()))


def _rows_of_a_band(scores: Scores, name: str) -> int:
    """How many bytes of a signature are a band's. CorpusError if there are no signatures of that name."""
    methods = scores.identity.recipe.get("methods")
    own_methods = [own for own in (methods if isinstance(methods, list) else []) if isinstance(own, dict)]
    named = [own for own in own_methods if own.get("method") == _METHOD]
    method = next((own for own in named if own.get("name") == name), None)
    if method is None or {f"{name}_text", f"{name}_signature"} - set(scores.columns):
        others = ", ".join(str(own.get("name")) for own in named)
        hint = f"it has those of {others}" if others else "score the corpus with {method: minhash} first"
        raise CorpusError(f"{scores.store.url}: has no signatures called {name!r}; {hint}")
    if method.get("rows") not in range(1, 9):
        raise CorpusError(f"{scores.store.full(MANIFEST)}: bands of {method.get('rows')} rows; score the corpus again")
    return int(method["rows"])


def _identity(scores: Scores, tables: Tables, name: str) -> Identity:
    """Of which texts, in which order: a change of any shard may be one of every score."""
    seen = [[shard.path, table.input.to_json()] for shard, table in tables]
    recipe = {
        "task": scores.identity.recipe.get("task"),
        "duplicates": name,
        "signatures": scores.identity.recipe,
        "seed": scores.identity.recipe.get("seed", 0),
    }
    return Identity(recipe=recipe, models={}, corpora={"corpus": canonical_hash(seen)})


def _refuse_inputs(output: Store, scores: Scores) -> None:
    """CorpusError if what is written would fall on the scores, or on a corpus that they are about or depend on."""
    refuse_scores(output, scores.store, itself=False)
    if output.holds(scores.store):
        raise CorpusError(f"{output.url}: the output and {scores.store.url} must not lie in each other")
    written = [path(status.shard) for status in scores.shards for path in (table_path, quarantine_path)]
    refuse_corpora(output, scores, written)
    output.refuse_detours(written)


def _refuse_others(output: Store, identity: Identity) -> None:
    """CorpusError if what is there was not written by this function."""
    try:
        found = json.loads(output.read_text(MANIFEST))
    except FileNotFoundError:
        if output.files():
            raise CorpusError(f"{output.url}: has files, and no {MANIFEST}; choose another output") from None
        return
    except ValueError:
        found = None
    recipe = found.get("recipe") if isinstance(found, dict) else None
    if not isinstance(recipe, dict) or recipe.keys() != identity.recipe.keys():
        raise CorpusError(f"{output.full(MANIFEST)}: is none of duplicates; choose another output")


def _read(scores: Scores, tables: Tables, name: str, rows: int) -> _Signatures:
    total = sum(table.scored for _, table in tables)
    texts, has_text = np.zeros(total, np.uint64), np.zeros(total, bool)
    has_bytes = np.zeros(total, bool)
    signature: npt.NDArray[np.uint8] | None = None
    place = 0
    for shard, table in tables:
        end = place + table.scored
        for text, own in _batches(scores.store, shard, name):
            if signature is None:
                signature = np.zeros((total, own.shape[1]), np.uint8)
            part = slice(place, place := place + len(text))
            if place > end or own.shape[1] != signature.shape[1] or own.shape[1] % rows:
                break
            texts[part], has_text[part] = _joined(text)
            has_bytes[part] = np.isfinite(own).all(1)
            signature[part] = np.where(has_bytes[part, None], own, 0).astype(np.uint8)
        if place != end:
            raise CorpusError(f"{scores.store.full(table_path(shard))}: has changed while it was read")
    assert signature is not None or not total
    return _Signatures(texts, np.zeros((0, rows), np.uint8) if signature is None else signature, has_text, has_bytes)


def _batches(
    store: Store, shard: Shard, name: str
) -> Iterator[tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]]:
    for batch in read_batches(store, table_path(shard), [f"{name}_text", f"{name}_signature"]):
        text, signature = (column.flatten().to_numpy().reshape(batch.num_rows, -1) for column in batch.columns)
        if batch.num_rows:
            yield text, signature


def _joined(parts: npt.NDArray[np.float32]) -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.bool_]]:
    """(n, 3) of 24, 24 and 16 bits -> the 64, and where there are any."""
    there: npt.NDArray[np.bool_] = np.isfinite(parts[:, 0])
    whole: npt.NDArray[np.uint64] = np.where(there[:, None], parts, 0).astype(np.uint64)
    joined: npt.NDArray[np.uint64] = whole[:, 0] << np.uint64(40) | whole[:, 1] << np.uint64(16) | whole[:, 2]
    return joined, there


def _copies(signatures: _Signatures) -> npt.NDArray[np.float32]:
    """(N,): how many rows before each have its text; NaN of what has none."""
    copies = np.full(len(signatures.texts), np.nan, np.float32)
    rows = np.flatnonzero(signatures.has_text)
    order, starts = _groups(signatures.texts[rows])
    copies[rows[order]] = np.arange(len(order)) - starts
    return copies


def _similarity(signatures: _Signatures, rows: int) -> npt.NDArray[np.float32]:
    """(N,): of the first rows that share a band with each, the best estimate."""
    best = np.where(signatures.has_text, 0, np.nan).astype(np.float32)
    own = np.flatnonzero(signatures.has_bytes)
    for first in range(0, signatures.bytes.shape[1], rows):
        keys = np.zeros((len(own), 8), np.uint8)
        keys[:, :rows] = signatures.bytes[own, first : first + rows]
        order, starts = _groups(keys.view(np.uint64)[:, 0])
        later = starts < np.arange(len(order))
        these, those = own[order[later]], own[order[starts[later]]]
        for start in range(0, len(these), _CHUNK):
            part = slice(start, start + _CHUNK)
            agree = (signatures.bytes[these[part]] == signatures.bytes[those[part]]).mean(1)
            estimate = np.maximum(0, (agree - 2.0**-8) / (1 - 2.0**-8))  # so many bytes agree by chance
            best[these[part]] = np.maximum(best[these[part]], estimate.astype(np.float32))
    return best


def _groups(keys: npt.NDArray[np.uint64]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Positions with those of one key together, each in order; and for each of these where its key's begin."""
    order = np.argsort(keys, kind="stable")
    ordered = keys[order]
    new = np.concatenate([[True], ordered[1:] != ordered[:-1]])[: len(order)]
    starts = np.maximum.accumulate(np.where(new, np.arange(len(order)), 0)) if len(order) else order
    return order, starts


def _write(
    store: Store, output: Store, shard: Shard, identity: Identity, values: Mapping[str, npt.NDArray[np.float32]]
) -> None:
    """A shard's table, with the rows, ids and quarantine of the one that the signatures are in."""
    source = find_table(store, shard)
    assert source is not None
    _copy_list(store, output, shard)
    copy_files(store, output, shard, source.footer.input.files)
    with tempfile.TemporaryFile() as spool:
        table = ScoreWriter(COLUMNS, spool)
        for batch in read_batches(store, table_path(shard), ["row", "id"]):
            own = slice(table.rows, table.rows + batch.num_rows)
            part = {column: its[own] for column, its in values.items()}
            table.add(batch.column("row").to_numpy(), batch.column("id").to_pylist(), part)
        nan = {column: count_nan(its) for column, its in values.items()}
        facts, listed = source.footer, list_digest(output, shard)
        footer = Footer.make(identity, facts.input, facts.rows, listed, nan, {})
        table.save(output, table_path(shard), footer.to_json())


def _copy_list(store: Store, output: Store, shard: Shard) -> None:
    path = quarantine_path(shard)
    if store.exists(path):
        with store.open(path) as source, output.write(path) as target:
            shutil.copyfileobj(source, target)
    else:
        output.remove(path)
