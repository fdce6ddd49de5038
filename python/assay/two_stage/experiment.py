"""Small models score and select, the large one trains on the selection: beside random rows and everything."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch

from assay import select
from assay._version import __version__
from assay.corpus.claim import claim
from assay.corpus.footer import canonical_hash
from assay.corpus.shards import Corpus, find_shards, refuse_overlap
from assay.corpus.storage import Store
from assay.curate.whole import read_whole
from assay.engine import run
from assay.engine.columns import with_columns
from assay.engine.devices import find_devices, place, take
from assay.engine.pool import corpus_fingerprint, samples_by_row
from assay.engine.progress import Progress
from assay.recipe.errors import EngineError
from assay.recipe.models import build_models, fingerprints
from assay.recipe.recipe import Recipe
from assay.recipe.tasks import Encoded
from assay.two_stage.report import EVERYTHING, RANDOM, SELECTION, Report, Trial
from assay.two_stage.training import Evaluation, Learner, Training, evaluate, train, with_a_loss

log = logging.getLogger("assay")
TRIALS = "trials.jsonl"
Fit = Callable[[Sequence[Encoded], int, Callable[[Evaluation], None]], list[Evaluation]]
"""Samples, a seed and who is told of each evaluation -> the evaluations of a training."""


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
    training = training or Training()
    spec = recipe.models.get(question.model)
    if spec is None:
        raise EngineError(f"train: no model is called {question.model!r}; the recipe has {', '.join(recipe.models)}")
    if not recipe.task.asks_models:
        raise EngineError(f"train: nothing is predicted in a task of kind {recipe.task.kind}; expected another kind")
    if recipe.task.group_rows is not None:
        raise EngineError("train: samples of a contrastive task share their losses, and are not trained on here")
    corpus, held_out = find_shards(recipe.corpus.path), find_shards(question.held_out)
    output = Store.at(out)
    _refuse_leaks(corpus, held_out)
    for path, shards in ((recipe.corpus.path, corpus), (question.held_out, held_out)):
        refuse_overlap(output, path, shards)
    run(recipe, progress=progress or Progress())
    rule, chosen = _choices(recipe, question, training.seeds)
    with claim(output, "an experiment"):
        learner = _learner(recipe, question.model, corpus)
        samples = _samples("corpus", corpus, learner)
        judged = list(_samples("held-out", held_out, learner).values())
        basis = {
            "model": fingerprints({question.model: spec}),
            "held_out": corpus_fingerprint(held_out),
            "corpus": corpus_fingerprint(corpus),
            "task": json.loads(json.dumps(recipe.task.model_dump())),
            "training": asdict(training),
            "version": __version__,
        }
        trials = _Trials(output, basis)

        def fit(own: Sequence[Encoded], seed: int, tell: Callable[[Evaluation], None]) -> list[Evaluation]:
            return train(learner, own, judged, training, seed, tell)

        found = [
            trials.run(data, seed, rows, [samples[row] for row in rows.tolist() if row in samples], fit)
            for seed in range(training.seeds)
            for data, rows in chosen[seed].items()
        ]
        untrained = evaluate(learner, learner.model, judged, 0)
        report = Report(question.by, question.top, rule, question.model, training, untrained, len(judged), found)
        output.write_text("report.json", json.dumps(report.to_json(), indent=1) + "\n")
        output.write_text("report.md", report.markdown())
    return report


def _refuse_leaks(corpus: Corpus, held_out: Corpus) -> None:
    own = {corpus.store.real(shard.path) for shard in corpus.shards}
    if shared := sorted(own.intersection(held_out.store.real(shard.path) for shard in held_out.shards)):
        raise EngineError(f"held-out: {shared[0]} is part of the corpus; expected samples that nobody trains on")


def _choices(recipe: Recipe, question: Question, seeds: int) -> tuple[str, list[dict[str, npt.NDArray[np.int64]]]]:
    """The selection in words, and by seed the rows of everybody: rows of all shards, counted one after another."""
    table = read_whole(recipe.output, [question.by]).table
    rows = table["row"].to_numpy()
    best = select.top(table, question.by, question.top, question.keep)
    kept = rows[best.mask]
    if not len(kept):
        raise EngineError(f"{question.by}: no row is selected ({best.summary()})")
    drawn = [rows[select.random(table, len(kept), seed).mask] for seed in range(seeds)]
    return best.summary(), [{SELECTION: kept, RANDOM: own, EVERYTHING: rows} for own in drawn]


def _learner(recipe: Recipe, name: str, corpus: Corpus) -> Learner:
    """The model to train, with the task as its own tokenizer or processor has it."""
    others = {path: find_shards(path) for path in recipe.fitted_to().values()}
    recipe = with_columns(recipe, {**others, recipe.corpus.path: corpus})
    specs = {name: recipe.models[name]}
    device = find_devices(recipe.run.devices)[0]
    take(device)
    make_encoder = recipe.task.open(specs)
    models = build_models(specs, recipe.task.auto_class)
    narrow = {p.dtype for p in models[name].parameters() if p.requires_grad} - {torch.float32, torch.float64}
    if narrow:
        raise EngineError(f"models.{name}.dtype: weights of {narrow.pop()} cannot be trained well; expected float32")
    if not any(p.requires_grad for p in models[name].parameters()):
        raise EngineError(f"models.{name}: has no trainable weight")
    encoder = make_encoder(models)
    return Learner(place(name, models[name], device), recipe.task.task(), encoder, recipe.batch)


def _samples(what: str, corpus: Corpus, learner: Learner) -> dict[int, Encoded]:
    return with_a_loss(learner, samples_by_row(what, corpus, learner.encoder), what)


class _Trials:
    """Evaluations of trainings by what those are made of, of an earlier call too."""

    def __init__(self, output: Store, basis: Mapping[str, Any]) -> None:
        self._output, self._basis = output, basis
        self._lines: list[str] = []
        if output.exists(TRIALS):
            with output.open(TRIALS) as file:
                self._lines = file.read().decode(errors="replace").splitlines()
        self._known: dict[str, list[Evaluation]] = dict(filter(None, map(_trial, self._lines)))

    def run(self, data: str, seed: int, rows: npt.NDArray[np.int64], samples: Sequence[Encoded], fit: Fit) -> Trial:
        """Train on the samples of these rows, unless that has been done."""
        if not samples:
            raise EngineError(f"{data}: none of its {len(rows)} rows is a sample for the model that is trained")
        digest = hashlib.sha256(rows.tobytes()).hexdigest()
        key = canonical_hash({**self._basis, "rows": digest, "seed": seed})
        if key in self._known:
            return Trial(data, seed, len(samples), self._known[key])

        def tell(evaluation: Evaluation) -> None:
            log.info("%s, seed %d, step %d: held-out loss %.4f", data, seed, evaluation.step, evaluation.loss)

        trial = Trial(data, seed, len(samples), fit(samples, seed, tell))
        self._known[key] = list(trial.evaluations)
        self._lines.append(json.dumps({"key": key, **asdict(trial)}))
        self._output.write_text(TRIALS, "".join(f"{line}\n" for line in self._lines))
        return trial


def _trial(line: str) -> tuple[str, list[Evaluation]] | None:
    """The key and the evaluations; a line that was cut off by a kill says nothing."""
    try:
        entry = json.loads(line)
        return entry["key"], [Evaluation(**each) for each in entry["evaluations"]]
    except (ValueError, KeyError, TypeError):
        return None
