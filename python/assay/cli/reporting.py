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
    from assay.report import Confusion, Ends, Page, Shown, Survey

_TEXT = 1200
_COLUMNS = 8
# Of a task's keys those that hold what its models are to say.
_LABELS = ("label_column", "target_column", "tags_column")


ShownScores = Annotated[
    list[str] | None,
    typer.Option("--by", metavar="SCORE", help="A score to show, in place of the first 24. May be given again."),
]
GroupColumns = Annotated[
    list[str] | None,
    typer.Option(
        "--group",
        metavar="COLUMN",
        help="A column of the corpus to group by, in place of those with names such as label, source or language. "
        "May be given again.",
    ),
]


def report(
    scores: ScoresFolder,
    out: Annotated[str, typer.Option("--out", metavar="FILE", help="Where the page goes: page.html")],
    samples: Annotated[int, typer.Option(metavar="N", help="So many of the best, the worst and random rows.")] = 4,
    seed: Annotated[int, typer.Option(help="For the rows that are drawn.")] = 0,
    by: ShownScores = None,
    group: GroupColumns = None,
    corpus: CorpusNow = None,
) -> int:
    """Write one page of HTML: how scores are distributed, what cuts keep, and the rows at either end."""
    from assay.corpus.scores_folder import open_scores
    from assay.report import need_charts, open_output

    if not 0 <= samples <= 100:
        raise ValueError(f"--samples {samples}: expected a number from 0 to 100")
    if seed < 0:
        raise ValueError(f"--seed {seed}: expected 0 or more")
    log_to_stderr(quiet=True)
    need_charts()
    found = open_scores(scores, corpus)
    store, name = open_output(out, found)
    page = make_page(found, by or (), group or (), samples, seed)
    store.write_text(name, page.to_html())
    say(f"page: {out}")
    if not page.facts.left_out:
        return OK
    path, reason = next(iter(page.facts.left_out.items()))
    return fail(f"{len(page.facts.left_out)} shards are not in it ({path}: {reason})", INCOMPLETE)


def make_page(scores: Scores, by: Sequence[str], group: Sequence[str], samples: int = 4, seed: int = 0) -> Page:
    """All that the page says."""
    from assay.report import Page, find_columns, find_duplicates, find_neighbours, gather, read_groups, survey

    label = label_column(scores)
    columns = find_columns(scores, group, label)
    facts, numbers = gather(scores), survey(scores, seed, by)
    read, refused = read_groups(scores, list(dict.fromkeys([*columns, *([label] if label else [])])), seed)
    labels = next((its.codes for its in read if its.column == label), None)
    content, images = _content_columns(scores)
    same = find_duplicates(scores, content, labels, seed, images)
    near = find_neighbours(scores, seed)
    places = [group.places[0] for group in same.largest] if same is not None else []
    places = list(dict.fromkeys([*places, *(place for its in near for _, *pair in its.closest for place in pair)]))
    return Page(
        facts,
        numbers,
        *_rows(scores, numbers, samples, seed),
        _confusion(scores),
        [its for its in read if its.column in columns],
        {name: why for name, why in refused.items() if name in columns},
        same,
        near,
        dict(zip(places, shown_rows(scores, _at(scores, places)), strict=True)),
    )


def _content_columns(scores: Scores) -> tuple[list[str], set[str]]:
    """What a row is made of, labels aside; and which of it are images."""
    from assay.cli.cards import task_of
    from assay.corpus.errors import CorpusError

    try:
        named = task_of(scores).column_keys()
    except CorpusError:
        return [], set()
    return list(dict.fromkeys(column for key, column in named.items() if key not in _LABELS)), _images(named)


def _images(named: Mapping[str, str]) -> set[str]:
    """Of a task's columns by their keys, those that hold images."""
    return {column for key, column in named.items() if key.startswith("image")}


def _at(scores: Scores, places: Sequence[int]) -> Sequence[Ranked]:
    """The rows at these places, counted over all tables."""
    from assay.corpus.scores_folder import State
    from assay.curate import ranked_at

    done = scores.of(State.DONE)
    starts = np.cumsum([0, *(status.table.scored if status.table else 0 for status in done)])
    tables = np.searchsorted(starts, places, side="right") - 1
    at = np.stack([tables, places - starts[tables]], axis=1).tolist() if len(places) else []
    return ranked_at(scores, [status.shard for status in done], at)


def _rows(scores: Scores, numbers: Survey, count: int, seed: int) -> tuple[list[Ends], list[Shown]]:
    """The rows at both ends of each score, and random ones."""
    from assay.curate import rank
    from assay.report import Ends

    columns = [its.column for its in numbers.distributions if its.minimum < its.maximum]
    if not count or not columns:
        return [], []
    rankings = []
    for column in columns:
        keep = column.keep if column.keep in ("high", "low") else "high"
        rankings.append(rank(scores, column.name, best=count, worst=count, keep=keep))
    random = _at(scores, np.random.default_rng(seed).permutation(numbers.sample.places)[:count].tolist())
    every = [*random, *(ranked for ranking in rankings for end in (ranking.best, ranking.worst) for ranked in end)]
    shown = {(its.shard.path, its.row): card for its, card in zip(every, shown_rows(scores, every), strict=True)}
    ends = [
        Ends(column.name, column.keep, *([shown[r.shard.path, r.row] for r in end] for end in (its.best, its.worst)))
        for column, its in zip(columns, rankings, strict=True)
    ]
    return ends, [shown[its.shard.path, its.row] for its in random]


def _confusion(scores: Scores) -> Confusion | str | None:
    """Labels against predictions, where a classification's ensemble made some, or why they cannot be compared."""
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
        if not isinstance(task, ClassificationSpec) or task.soft_labels:
            return None
        return count_labels(scores, by, task.label_column, task.labels)
    except CorpusError as error:
        return str(error)


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
    images = _images(task.column_keys())
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
