"""Small models score and select, the large one trains on the selection: beside random rows and everything."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import pyarrow as pa

from assay import select
from assay._json import dumps
from assay.corpus.storage import Store
from assay.curate.whole import read_whole
from assay.engine.progress import Progress
from assay.recipe.errors import EngineError
from assay.recipe.recipe import Recipe
from assay.two_stage.laboratory import Rows, Trainee, laboratory
from assay.two_stage.report import EVERYTHING, RANDOM, SELECTION, Report
from assay.two_stage.training import Training

_JSON, _PAGE = "report.json", "report.md"


@dataclass(frozen=True)
class Question:
    """What is tried out.

    Attributes:
        model: the name of the recipe's model to train; no method need use it.
        held_out: path or glob of the samples that it is evaluated on, with the corpus's columns.
        by: the score to select by.
        top: how much: a number of rows, or a share.
        keep: which end is better, if not as the score says.
    """

    model: str
    held_out: str
    by: str
    top: int | float
    keep: Literal["high", "low"] | None = None


def two_stage(
    recipe: Recipe,
    question: Question,
    out: str,
    training: Training | None = None,
    progress: Progress | None = None,
) -> Report:
    """Score the corpus, select by a score, train a model on the selection, on as many random rows, and on everything
    that has scores; all for the same number of steps, from the same weights.

    Under ``out`` lie ``report.json``, ``report.md``, and ``trials.jsonl`` with a line for each training as it ends:
    called again with the same recipe and question, only what is missing is trained. All samples are held in memory.

    Raises:
        EngineError: no such model, a held-out sample's file that is the corpus's too, a corpus that was not scored
            whole, or a training that failed.
        CorpusError: no such score, or an output that lies in the corpus.
    """
    training, output = training or Training(), Store.at(out)
    trainee = Trainee(question.model, question.held_out)
    with laboratory(recipe, trainee, output, training, progress, [_JSON, _PAGE]) as lab:
        table = lab.trainable(read_whole(recipe.output, [question.by]).table)
        rule, chosen = _choices(table, question, training.seeds)
        found = [lab.trial(data, seed, rows) for seed in range(training.seeds) for data, rows in chosen[seed].items()]
        own = (question.by, question.top, rule, question.model, training)
        report = Report(*own, lab.untrained(), len(lab.held_out), found)
        output.write_text(_JSON, dumps(report.to_json(), indent=1) + "\n")
        output.write_text(_PAGE, report.markdown())
    return report


def _choices(table: pa.Table, question: Question, seeds: int) -> tuple[str, list[dict[str, Rows]]]:
    """The selection in words, and by seed the rows of everybody: rows of all shards, counted one after another."""
    rows = table["row"].to_numpy()
    best = select.top(table, question.by, question.top, question.keep)
    kept = rows[best.mask]
    if not len(kept):
        raise EngineError(f"{question.by}: no row is selected ({best.summary()})")
    drawn = [rows[select.random(table, len(kept), seed).mask] for seed in range(seeds)]
    return best.summary(), [{SELECTION: kept, RANDOM: own, EVERYTHING: rows} for own in drawn]
