"""What a corpus's columns are, looked at before a model loads: a wrong name is one line, not a list of shards."""

from __future__ import annotations

import difflib
import itertools
from collections.abc import Iterator, Mapping

from assay.corpus.errors import ShardError
from assay.corpus.facts import MIXED
from assay.corpus.readers import columns_of
from assay.corpus.shards import Corpus, Shard
from assay.corpus.storage import may_pass
from assay.recipe.errors import EngineError
from assay.recipe.recipe import Recipe
from assay.recipe.tasks import Columns, Encoder, ReadsColumns, ReadsFiles, ReadsOptional

# A column may be missing in some shards, which are listed as unreadable then; in so many it is a misspelt name.
_MOST_SHARDS = 16
# What a column of texts may look like: of JSON lines the first may be null, or something else.
TEXTS = ("string", "null", MIXED)


def with_columns(recipe: Recipe, corpora: Mapping[str, Corpus]) -> Recipe:
    """The recipe with what the corpus's columns tell its task.

    EngineError if a column of the task, or the ids', is in none of the first readable shards of a corpus, or a column
    of texts holds something else there.
    """
    wanted = {f"task.{key}": column for key, column in recipe.task.column_keys().items()} | recipe.own_columns
    for name, path in recipe.fitted_to().items():
        _refuse_others(recipe, _find_columns(corpora[path], wanted, f" of {name}"), f" of {name}")
    if recipe.corpus.id_column is not None:
        wanted["corpus.id_column"] = recipe.corpus.id_column
    found = _find_columns(corpora[recipe.corpus.path], wanted)
    _refuse_others(recipe, found)
    if found is None:
        return recipe
    return recipe.model_copy(update={"task": recipe.task.seen(found)})


def _refuse_others(recipe: Recipe, found: Columns | None, of: str = "") -> None:
    """EngineError for a column that methods read and that holds no texts."""
    if found is None:
        return
    for key, column in recipe.own_columns.items():
        if found[column].type not in TEXTS:
            raise EngineError(f"{key}: column {column!r}{of} holds {found[column].type}; expected texts")


def for_shard(encoder: Encoder, shard: Shard) -> Encoder:
    """The encoder for a shard's own columns, and for files beside it."""
    own = encoder.for_columns(columns_of(shard)) if isinstance(encoder, ReadsColumns) else encoder
    return own.beside(shard) if isinstance(own, ReadsFiles) else own


def optional_columns(encoder: Encoder) -> frozenset[str]:
    """The columns that a row may lack."""
    return encoder.optional if isinstance(encoder, ReadsOptional) else frozenset()


def _find_columns(corpus: Corpus, wanted: Mapping[str, str], of: str = "") -> Columns | None:
    """Those of the first shard that has the wanted ones; None if no shard can be read."""
    first: tuple[Shard, Columns] | None = None
    for shard, columns in itertools.islice(_readable(corpus), _MOST_SHARDS):
        if columns.keys() >= set(wanted.values()):
            return columns
        first = first or (shard, columns)
    if first is None:
        return None
    shard, columns = first
    key, name = next((key, name) for key, name in wanted.items() if name not in columns)
    near = difflib.get_close_matches(name, columns, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    names = ", ".join(map(repr, list(columns)[:20]))
    raise EngineError(f"{key}: {shard.path}{of} has no column {name!r}, only {names}{hint}")


def _readable(corpus: Corpus) -> Iterator[tuple[Shard, Columns]]:
    """The shards that have columns; what is the matter with the others, reading them will say."""
    for shard in corpus.shards:
        try:
            columns = columns_of(shard)
        except (ShardError, OSError) as error:
            if may_pass(error.__cause__ or error):  # the next shard's columns may mean something else
                raise EngineError(f"{shard.path}: storage failed ({error}); run again") from error
            continue
        if columns:
            yield shard, columns
