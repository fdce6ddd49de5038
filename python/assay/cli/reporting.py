"""`assay report`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import typer

from assay.cli.terminal import INCOMPLETE, OK, CorpusNow, ScoresFolder, fail, log_to_stderr, say

if TYPE_CHECKING:
    from assay.corpus.scores_folder import Scores
    from assay.curate import Ranked
    from assay.recipe.tasks import TaskSpec
    from assay.report import Confusion, Ends, Shown, Survey

_TEXT = 1200
_COLUMNS = 8


def report(
    scores: ScoresFolder,
    out: Annotated[str, typer.Option("--out", metavar="FILE", help="Where the page goes: page.html")],
    samples: Annotated[int, typer.Option(metavar="N", help="So many of the best, the worst and random rows.")] = 4,
    seed: Annotated[int, typer.Option(help="For the rows that are drawn.")] = 0,
    corpus: CorpusNow = None,
) -> int:
    """Write one page of HTML: how scores are distributed, what cuts keep, and the rows at either end."""
    from assay.corpus.scores_folder import open_scores
    from assay.report import Page, gather, need_charts, open_output, survey

    if not 0 <= samples <= 100:
        raise ValueError(f"--samples {samples}: expected a number from 0 to 100")
    if seed < 0:
        raise ValueError(f"--seed {seed}: expected 0 or more")
    log_to_stderr(quiet=True)
    need_charts()
    found = open_scores(scores, corpus)
    store, name = open_output(out, found)
    numbers = survey(found, seed)
    facts = gather(found)
    page = Page(facts, numbers, *_rows(found, numbers, samples, seed), _confusion(found))
    store.write_text(name, page.to_html())
    say(f"page: {out}")
    if not facts.left_out:
        return OK
    path, reason = next(iter(facts.left_out.items()))
    return fail(f"{len(facts.left_out)} shards are not in it ({path}: {reason})", INCOMPLETE)


def _rows(scores: Scores, numbers: Survey, count: int, seed: int) -> tuple[list[Ends], list[Shown]]:
    """The rows at both ends of each score, and random ones."""
    from assay.corpus.scores_folder import State
    from assay.curate import rank, ranked_at
    from assay.report import Ends

    columns = [its.column for its in numbers.distributions if its.minimum < its.maximum]
    if not count or not columns:
        return [], []
    rankings = []
    for column in columns:
        keep = column.keep if column.keep in ("high", "low") else "high"
        rankings.append(rank(scores, column.name, best=count, worst=count, keep=keep))
    done = scores.of(State.DONE)
    starts = np.cumsum([0, *(status.table.scored if status.table else 0 for status in done)])
    drawn = np.random.default_rng(seed).permutation(numbers.sample.places)[:count]
    tables = np.searchsorted(starts, drawn, side="right") - 1
    places = np.stack([tables, drawn - starts[tables]], axis=1).tolist()
    random = ranked_at(scores, [status.shard for status in done], places)
    every = [*random, *(ranked for ranking in rankings for end in (ranking.best, ranking.worst) for ranked in end)]
    shown = {(its.shard.path, its.row): card for its, card in zip(every, shown_rows(scores, every), strict=True)}
    ends = [
        Ends(column.name, column.keep, *([shown[r.shard.path, r.row] for r in end] for end in (its.best, its.worst)))
        for column, its in zip(columns, rankings, strict=True)
    ]
    return ends, [shown[its.shard.path, its.row] for its in random]


def _confusion(scores: Scores) -> Confusion | None:
    """Labels against predictions, where a classification's ensemble made some."""
    from assay.cli.cards import task_of
    from assay.corpus.errors import CorpusError
    from assay.recipe.tasks.classification import ClassificationSpec
    from assay.report import count_labels

    methods = [its for its in scores.identity.recipe.get("methods") or () if isinstance(its, dict)]
    names = [f"{its.get('name')}_prediction" for its in methods if its.get("method") == "ensemble"]
    by = next((name for name in names if name in scores.columns), None)
    if by is None:
        return None
    try:
        task = task_of(scores)
    except CorpusError:
        return None
    if not isinstance(task, ClassificationSpec) or task.soft_labels:
        return None
    return count_labels(scores, by, task.label_column, task.labels)


def label_column(scores: Scores) -> str | None:
    """The column that a classification compares its models with."""
    from assay.cli.cards import task_of
    from assay.corpus.errors import CorpusError
    from assay.recipe.tasks.classification import ClassificationSpec

    try:
        task = task_of(scores)
    except CorpusError:
        return None
    return task.label_column if isinstance(task, ClassificationSpec) else None


def shown_rows(scores: Scores, rows: Sequence[Ranked]) -> list[Shown]:
    """The rows with what the task reads of them."""
    from assay.cli.cards import class_names, task_of
    from assay.corpus.errors import CorpusError
    from assay.curate import read_samples
    from assay.report import Shown

    try:
        task = task_of(scores)
    except CorpusError as error:
        return [Shown(its.id, f"{its.shard.path}:{its.row}", its.scores, fault=str(error)) for its in rows]
    columns = list(dict.fromkeys(task.column_keys().values()))[:_COLUMNS]
    values = read_samples(rows, columns)
    classes = {shard: class_names(shard) for shard in {its.shard for its in rows}}
    return [_card(its, values[its.shard.path, its.row], task, classes[its.shard]) for its in rows]


def _card(
    ranked: Ranked, values: Mapping[str, Any] | str, task: TaskSpec, classes: Mapping[str, Sequence[str]]
) -> Shown:
    from assay.corpus.errors import BadRow, ShardError
    from assay.corpus.images import MAX_BYTES, MAX_PIXELS, Beside, ImageLimits
    from assay.report import Shown, thumbnail

    common = ranked.id, f"{ranked.shard.path}:{ranked.row}", ranked.scores
    if isinstance(values, str):
        return Shown(*common, fault=values)
    images = {column for key, column in task.column_keys().items() if key.startswith("image")}
    limits = ImageLimits(getattr(task, "max_pixels", MAX_PIXELS), getattr(task, "max_bytes", MAX_BYTES))
    beside = Beside(ranked.shard.store, ranked.shard.folder)
    texts, pictures, faults = {}, {}, []
    for name, value in values.items():
        if name not in images:
            texts[name] = _text(value, classes.get(name, ()))
            continue
        try:
            pictures[name] = thumbnail(name, value, limits, beside)
        except (BadRow, ShardError, ImportError) as error:
            faults.append(str(error))
    return Shown(*common, texts, pictures, "; ".join(faults))


def _text(value: Any, classes: Sequence[str]) -> str:
    """A value as text, its beginning if it is long."""
    from assay.cli.values import value_lines

    text = value if isinstance(value, str) else "\n".join(value_lines(value, _TEXT // 4, classes))
    return text if len(text) <= _TEXT else f"{text[:_TEXT]} … ({len(text):,} characters)"
