"""Running a recipe over a corpus in this process: what is done stays done, and only the rest is scored."""

from __future__ import annotations

import json
import logging
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import assay
from assay.corpus.errors import ShardError
from assay.corpus.quarantine import QuarantineWriter
from assay.corpus.shards import MANIFEST, Corpus, Shard, find_shards
from assay.corpus.storage import Store
from assay.engine.errors import ChangedError, EngineError
from assay.engine.fitting import corpus_fingerprint
from assay.engine.footer import Footer, Identity, open_table
from assay.engine.progress import Progress
from assay.engine.recipe import Recipe, canonical_hash
from assay.engine.scoring import Workshop, open_workshop, score_shard, score_stored
from assay.methods import Column

log = logging.getLogger("assay")

RESOLVED_RECIPE = "recipe.resolved.yaml"


@dataclass(frozen=True)
class Plan:
    """What a run has to do."""

    recipe: Recipe
    identity: Identity
    corpus: Corpus
    output: Store
    done: dict[Shard, Footer]
    todo: tuple[Shard, ...]
    stale: tuple[Shard, ...]
    """The part of ``todo`` that was scored before, from another input or by another recipe."""


@dataclass
class Report:
    """What a run did. Rows count the shards that were done before, too."""

    done_before: int = 0
    scored: int = 0
    rescored: int = 0
    reused: int = 0
    """The part of ``scored`` that needed no model: its features were stored."""
    unreadable: dict[str, str] = field(default_factory=dict)
    rows: int = 0
    rows_scored: int = 0
    rows_quarantined: int = 0
    nan: Counter[str] = field(default_factory=Counter)
    warnings: dict[str, str] = field(default_factory=dict)

    @property
    def clean(self) -> bool:
        """Whether every row of every shard has its scores."""
        return not self.unreadable and not self.rows_quarantined

    def add(self, footer: Footer) -> None:
        """Count one table."""
        self.rows += footer.input.rows
        self.rows_scored += footer.rows.scored
        self.rows_quarantined += footer.rows.quarantined
        self.nan.update(footer.nan)
        self.warnings |= {key: text for key, text in footer.methods.items() if key.endswith("warning")}

    def summary(self) -> list[str]:
        """The counts in words, one line each."""
        reused = f", {self.reused} from stored features" if self.reused else ""
        lines = [
            f"shards: {self.scored} scored ({self.rescored} of them again{reused}), {self.done_before} done before, "
            f"{len(self.unreadable)} unreadable",
            f"rows in {self.rows:,} = scored {self.rows_scored:,} + quarantined {self.rows_quarantined:,}",
        ]
        nan = ", ".join(f"{name} {count:,}" for name, count in sorted(self.nan.items()) if count)
        return lines + ([f"NaN scores: {nan}"] if nan else [])


def make_plan(recipe: Recipe, part: tuple[int, int] = (1, 1), rescore: bool = False) -> Plan:
    """Find the shards and see which of them are done.

    ``part`` (i, n) takes every n-th shard from the i-th on. Tables made by another recipe or model are a
    ChangedError that says what differs, unless ``rescore`` allows to replace them.
    """
    output = Store.at(recipe.output)
    corpus = find_shards(recipe.corpus.path)
    refuse_inside(output, corpus, recipe.corpus.path)
    fingerprints = {name: spec.fingerprint() for name, spec in recipe.models_used.items()}
    corpora = {f"targets.{name}": spec.path for name, spec in recipe.targets_used.items()}
    if recipe.uses_pool:
        corpora["fit"] = recipe.fit.path or recipe.corpus.path
    # Through JSON, because that is how the recipe comes back from a footer.
    identity = Identity(
        recipe=json.loads(json.dumps(recipe.identity())),
        models=fingerprints,
        corpora={name: corpus_fingerprint(find_shards(path)) for name, path in corpora.items()} or None,
    )
    index, count = part
    done: dict[Shard, Footer] = {}
    todo, stale, changed = [], [], []
    for shard in corpus.shards[index - 1 :: count]:
        table = open_table(output, shard)
        differences = table.differences(identity) if table else []
        if table and not differences and _unchanged(shard, table.footer):
            done[shard] = table.footer
            continue
        todo.append(shard)
        if table:
            stale.append(shard)
        if differences:
            changed.append((shard, differences))
    if changed and not rescore:
        shard, differences = changed[0]
        shown = "; ".join(differences[:3]) + (f" and {len(differences) - 3} more" if differences[3:] else "")
        raise ChangedError(
            f"{len(changed)} score tables in {output.url} come from another recipe, model or target ({shard.table}: "
            f"{shown}); score them again with --rescore, or choose another output"
        )
    return Plan(recipe, identity, corpus, output, done, tuple(todo), tuple(stale))


def refuse_inside(output: Store, corpus: Corpus, corpus_path: str) -> None:
    """EngineError if what is written to ``output`` would be taken for the corpus, now or next time."""
    named = Store.at(corpus_path)
    searched_again = named.fs.isdir(named.root) and named.holds(output)
    if searched_again or any(output.holds(shard.store, shard.path) for shard in corpus.shards):
        raise EngineError(f"{output.url}: the output and the corpus {corpus_path} must not lie in each other")


def _unchanged(shard: Shard, footer: Footer) -> bool:
    try:
        return shard.fingerprint() == footer.input.fingerprint
    except OSError:
        return False  # scoring it will say what is the matter


def run(
    recipe: Recipe,
    *,
    part: tuple[int, int] = (1, 1),
    rescore: bool = False,
    progress: Progress | None = None,
) -> Report:
    """Score whatever is not scored yet, and say what became of every row."""
    plan = make_plan(recipe, part, rescore)
    report = Report(done_before=len(plan.done))
    for footer in plan.done.values():
        report.add(footer)
    if not plan.todo:
        return report
    workshop = open_workshop(recipe, plan.identity)
    _write_manifest(plan, workshop.columns())
    for path in plan.output.sweep():
        log.info("removed %s, left by a run that was killed", path)
    with progress or Progress() as shown:
        _score(plan, workshop, report, shown)
    return report


def _score(plan: Plan, workshop: Workshop, report: Report, progress: Progress) -> None:
    sizes = {shard: _size(shard) for shard in plan.todo}
    progress.start(len(sizes), sum(sizes.values()))
    for shard, size in sizes.items():
        reached = 0.0

        def advance(rows: int, share: float, size: int = size) -> None:
            nonlocal reached
            progress.advance(rows, (share - reached) * size)
            reached = share

        try:
            stored = score_stored(workshop, shard, plan.output, assay.__version__)
            if stored:
                advance(stored.input.rows, 1.0)
            # One check of the probes against autograd is enough for a process: the models do not change.
            verify = report.scored == report.reused
            footer = stored or score_shard(workshop, shard, plan.output, assay.__version__, advance, verify)
        except ShardError as error:
            log.error("%s: %s", shard.path, error)
            report.unreadable[shard.path] = str(error)
            _quarantine_shard(plan.output, shard, str(error))
        else:
            report.add(footer)
            report.scored += 1
            report.rescored += shard in plan.stale
            report.reused += stored is not None
        progress.finish_shard()


def _size(shard: Shard) -> int:
    try:
        return shard.fingerprint().size
    except OSError:
        return 0


def _quarantine_shard(output: Store, shard: Shard, reason: str) -> None:
    output.remove(shard.table)  # were there one, it would speak of an input that is no more
    with tempfile.TemporaryFile() as spool:
        quarantine = QuarantineWriter(shard, spool)
        quarantine.add(None, None, reason)
        quarantine.save(output)


def _write_manifest(plan: Plan, columns: Sequence[Column]) -> None:
    """Write what is the same for every runner of this recipe; counts are in the tables' footers."""
    manifest: dict[str, Any] = {
        "format": 1,
        "version": assay.__version__,
        "corpus": plan.recipe.corpus.path,
        "recipe": plan.identity.recipe,
        "recipe_hash": canonical_hash(plan.identity.recipe),
        "models": plan.identity.models,
        **({"corpora": plan.identity.corpora} if plan.identity.corpora else {}),
        "seed": plan.recipe.seed,
        "columns": [vars(column) for column in columns],
        "shards": [{"path": shard.path, "table": shard.table} for shard in plan.corpus.shards],
    }
    plan.output.write_text(MANIFEST, json.dumps(manifest, indent=2, ensure_ascii=False) + "\n")
    plan.output.write_text(RESOLVED_RECIPE, plan.recipe.to_yaml())
