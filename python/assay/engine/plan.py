"""What a run has to do: the shards of a corpus, and which of them are done."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field
from functools import partial

from assay._json import dumps
from assay._version import __version__
from assay.corpus.errors import CorpusError
from assay.corpus.footer import SHORTLIST, Identity, Manifest, Table, TableColumn, Tally, columns_in, open_table
from assay.corpus.layout import MANIFEST, RESOLVED_RECIPE, files_path, quarantine_path, table_path
from assay.corpus.named_files import changed_file
from assay.corpus.score_files import table_schema
from assay.corpus.scores_folder import manifest_text, read_manifest, refuse_scores
from assay.corpus.shards import Corpus, Shard, find_shards, refuse_overlap
from assay.corpus.storage import Store
from assay.engine.columns import with_columns
from assay.engine.pool import corpus_fingerprint
from assay.engine.shortlist import Shortlist, ranking_column
from assay.methods import Column
from assay.recipe.errors import ChangedError, EngineError
from assay.recipe.methods import ShortlistSpec
from assay.recipe.models import fingerprints
from assay.recipe.recipe import Recipe


@dataclass(frozen=True)
class Plan:
    """What a run has to do."""

    recipe: Recipe
    identity: Identity
    corpus: Corpus
    corpora: Mapping[str, Corpus]
    """As ``find_corpora`` gives them."""
    output: Store
    done: Tally
    todo: tuple[Shard, ...]
    stale: tuple[Shard, ...]
    """The part of ``todo`` that was scored before: from another input, by another recipe, or with rows that are to be
    tried again."""
    retried: Mapping[Shard, int] = field(default_factory=dict)
    """The part of ``stale`` whose tables are sound, with as many rows in quarantine."""
    part: tuple[int, int] = (1, 1)
    """(i, n): of the corpus's shards it is about every n-th from the i-th on; others are about the rest."""
    shortlist: Shortlist | None = None
    """Of a recipe that has one, once it is made: the rows that its methods score."""
    choice: ShortlistSpec | None = None
    """Of a retrieval, what a shortlist is to be made by."""


def find_corpora(recipe: Recipe) -> dict[str, Corpus]:
    """By path: the corpus, the targets' and the one that methods are fitted to, each listed once; of a recipe with a
    shortlist for both of its passes. CorpusError if the output would fall on one of them, or among other scores."""
    corpora = {path: find_shards(path) for path in (recipe.corpus.path, *recipe.fitted_to().values())}
    shards = corpora[recipe.corpus.path].shards
    written = [path for shard in shards for path in (table_path(shard), quarantine_path(shard), files_path(shard))]
    for url in (recipe.output, *([recipe.retrieval().output] if recipe.shortlist else [])):
        output = Store.at(url)
        for path, corpus in corpora.items():
            refuse_overlap(output, path, corpus, written)
        output.refuse_detours(written)
    refuse_scores(Store.at(recipe.outermost), itself=False)
    return corpora


def make_plan(
    recipe: Recipe,
    part: tuple[int, int] = (1, 1),
    rescore: bool = False,
    corpora: Mapping[str, Corpus] | None = None,
    retry: bool = False,
    shortlist: Shortlist | None = None,
    choice: ShortlistSpec | None = None,
) -> Plan:
    """Find the shards, unless they are given as ``find_corpora`` found them, and see which of them are done.

    ``part`` (i, n) takes every n-th shard from the i-th on. Tables made by another recipe or model are a
    ChangedError that says what differs, unless ``rescore`` allows to replace them. With ``retry`` a shard with rows in
    quarantine is scored again. ``shortlist`` and ``choice`` as in ``Plan``.
    """
    corpora = corpora or find_corpora(recipe)
    recipe = with_columns(recipe, corpora)
    output, corpus = Store.at(recipe.output), corpora[recipe.corpus.path]
    identity = identity_of(recipe, corpora, shortlist)
    index, count = part
    done = Tally()
    todo, stale, changed, retried = [], [], [], {}
    shards = corpus.shards[index - 1 :: count]
    there = None if output.is_local else set(output.files())  # a request for each that is not there takes hours
    for shard, (table, differences, is_sound) in zip(
        shards, output.map(partial(_known, output, identity, there), shards), strict=True
    ):
        if table and is_sound:
            if not retry or not table.footer.rows.quarantined:
                done.add(table.footer)
                continue
            retried[shard] = table.footer.rows.quarantined
        todo.append(shard)
        if table:
            stale.append(shard)
        if differences:
            changed.append((shard, differences))
    if changed and not rescore:
        shard, differences = changed[0]
        shown = "; ".join(differences[:3]) + (f" and {len(differences) - 3} more" if differences[3:] else "")
        raise ChangedError(
            f"{len(changed)} score tables in {output.url} come from another recipe, model, target or version of assay "
            f"({table_path(shard)}: {shown}); score them again with --rescore, or choose another output"
        )
    return Plan(
        recipe, identity, corpus, corpora, output, done, tuple(todo), tuple(stale), retried, part, shortlist, choice
    )


def identity_of(recipe: Recipe, corpora: Mapping[str, Corpus], shortlist: Shortlist | None = None) -> Identity:
    """What makes two runs the same, of a recipe with what its ``corpora`` tell."""
    fitted = _fitted_fingerprints(recipe, corpora, as_found=True)
    if shortlist is not None:
        fitted[SHORTLIST] = shortlist.fingerprint()
    return Identity(
        recipe=json.loads(dumps(recipe.identity())),  # through JSON, as it comes back from a footer
        models=fingerprints(recipe.models_used),
        corpora=fitted or None,
    )


def _fitted_fingerprints(recipe: Recipe, corpora: Mapping[str, Corpus], as_found: bool = False) -> dict[str, str]:
    images = recipe.task.files_column
    return {name: corpus_fingerprint(corpora[path], as_found, images) for name, path in recipe.fitted_to().items()}


def refuse_changes(plan: Plan) -> None:
    """EngineError if a model or a corpus that methods are fitted to is no more what it was when the plan was made."""
    now = {f"models.{name}": found for name, found in fingerprints(plan.recipe.models_used).items()}
    now |= _fitted_fingerprints(plan.recipe, plan.corpora)
    planned = {f"models.{name}": found for name, found in plan.identity.models.items()} | (plan.identity.corpora or {})
    changed = [name for name, found in now.items() if found != planned.get(name)]
    if changed:
        raise EngineError(
            f"{', '.join(changed)}: has changed since the run began, and one run must not mix both; run again, "
            "with --rescore for what is scored already"
        )


def _known(
    output: Store, identity: Identity, there: Set[str] | None, shard: Shard
) -> tuple[Table | None, list[str], bool]:
    """A shard's table, what makes it another recipe's, and whether it is this one's and the shard is what it was."""
    table = None if there is not None and table_path(shard) not in there else open_table(output, shard)
    if table is None:
        return None, [], False
    differences = table.differences(identity)
    if table.footer.version != __version__:
        differences.append(f"version of assay: {table.footer.version} → {__version__}")
    return table, differences, not differences and _unchanged(output, shard, table)


def standing_table(output: Store, shard: Shard) -> Table | None:
    """A shard's table, if it has one that speaks of it as it is now."""
    table = open_table(output, shard)
    return table if table and _unchanged(output, shard, table) else None


def is_of(table: Table, shard: Shard) -> bool:
    """Whether a table speaks of the shard as it was found, or, where it was replaced between then and its scoring, as
    it is now."""
    if table.input_is(shard, shard.as_found()):
        return True
    return shard.listed is not None and table.input_is(shard, shard.fingerprint())


def _unchanged(output: Store, shard: Shard, table: Table) -> bool:
    try:
        same = is_of(table, shard) and table.list_is_there(output, shard)
        return same and changed_file(output, shard, table.footer.input.files) is None
    except OSError:
        return False  # scoring it will say what is the matter


def refuse_strangers(output: Store) -> None:
    """CorpusError if the output's manifest or resolved recipe is somebody else's file, which would be lost."""
    try:
        Manifest.model_validate_json(output.read_text(MANIFEST))
    except FileNotFoundError:
        if output.exists(RESOLVED_RECIPE):
            raise CorpusError(
                f"{output.full(RESOLVED_RECIPE)}: is there without a {MANIFEST}; choose another output"
            ) from None
    except ValueError as error:
        raise CorpusError(
            f"{output.full(MANIFEST)}: not a manifest of `assay score`; choose another output, or move it away"
        ) from error


def write_manifest(plan: Plan, columns: Sequence[Column]) -> None:
    """Write what is the same for every runner of this recipe; counts are in the tables' footers.

    A CorpusError if files of these names are there that no run wrote, a RecipeError if a shortlist is to be made by
    none of the columns.
    """
    refuse_strangers(plan.output)
    named = [TableColumn(**vars(column)) for column in columns]
    if plan.choice is not None:
        ranking_column(plan.choice, named)
    for path, text in _descriptions(plan, named).items():
        plan.output.write_text(path, text)


def renew_manifest(plan: Plan) -> None:
    """The same of a run that has nothing to score, where corpus, models or shards are elsewhere, or fewer, than what is
    there says, or nothing is: a selection goes by that. What is so already stays as old as it is. A CorpusError for a
    manifest that no run wrote."""
    output, (index, _) = plan.output, plan.part
    if not plan.done.shards:
        return
    if output.exists(MANIFEST):
        read_manifest(output)
    columns = columns_in(table_schema(output, table_path(plan.corpus.shards[index - 1])))
    for path, text in _descriptions(plan, columns).items():
        if not output.exists(path) or output.read_text(path) != text:
            output.write_text(path, text)


def _descriptions(plan: Plan, columns: Sequence[TableColumn]) -> dict[str, str]:
    """By path, what is the same for every runner."""
    recipe, inputs = plan.recipe, list(plan.recipe.fitted_to().values())
    manifest = manifest_text(plan.identity, recipe.corpus.path, inputs, columns, plan.corpus.shards)
    return {MANIFEST: manifest, RESOLVED_RECIPE: recipe.to_yaml()}
