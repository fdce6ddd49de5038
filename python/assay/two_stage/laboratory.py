"""One model, trained on rows of a scored corpus again and again, and judged on the same held-out samples each time."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import pickle
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch

from assay._json import dumps
from assay._version import __version__
from assay.corpus.claim import claim
from assay.corpus.errors import CorpusError
from assay.corpus.footer import canonical_hash
from assay.corpus.scores_folder import refuse_scores
from assay.corpus.shards import Corpus, find_shards, refuse_overlap
from assay.corpus.storage import Store
from assay.engine import run
from assay.engine.columns import with_columns
from assay.engine.devices import find_devices, place, take
from assay.engine.pool import corpus_fingerprint, samples_by_row
from assay.engine.progress import Progress
from assay.recipe.errors import EngineError
from assay.recipe.models import build_models, fingerprints
from assay.recipe.recipe import Recipe
from assay.recipe.tasks import Encoded
from assay.two_stage.report import Trial
from assay.two_stage.training import Evaluation, Learner, Training, evaluate, train, with_a_loss

log = logging.getLogger("assay")
TRIALS = "trials.jsonl"
Rows = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Laboratory:
    """What trains and judges.

    Attributes:
        samples: those of the corpus that the model can train on, by row: rows of all shards, counted one after another.
        held_out: the samples that every training is judged on; none of them is one of the corpus, or of what scores are
            fitted to.
    """

    learner: Learner
    samples: Mapping[int, Encoded]
    held_out: Sequence[Encoded]
    training: Training
    known: _Trials

    def untrained(self) -> Evaluation:
        """The model as it is."""
        return evaluate(self.learner, self.learner.model, self.held_out, 0)

    def trainable(self, scores: pa.Table) -> pa.Table:
        """Of a table of scores the rows that the model can train on: of others nobody has as many samples as rows."""
        found = scores.filter(pa.array(np.isin(scores["row"].to_numpy(), list(self.samples))))
        if not found.num_rows:
            raise EngineError("corpus: none of the rows with scores is a sample for the model that is trained")
        return found

    def contents(self, scores: pa.Table) -> npt.NDArray[np.uint64]:
        """(rows,) of a table of ``trainable`` rows: the same number for samples that are the same to the last token."""
        digests = (_content(self.samples[row]) for row in scores["row"].to_pylist())
        return np.array([int.from_bytes(digest[:8], "little") for digest in digests], np.uint64)

    def is_known(self, seed: int, rows: Rows) -> bool:
        """Whether an earlier call has trained on them."""
        return self.known.key(rows, seed, self.training) in self.known.evaluations

    def seconds_per_step(self, rows: Rows, steps: int) -> float:
        """Of a training on these rows, measured in so many once everything is warm."""
        brief = replace(self.training, steps=steps, evaluations=1)
        samples = [self.samples[row] for row in rows.tolist()]
        for _ in range(2):
            began = time.perf_counter()
            train(self.learner, samples, self.held_out[:1], brief, 0)
        return (time.perf_counter() - began) / steps

    def trial(self, data: str, seed: int, rows: Rows) -> Trial:
        """A training on the samples of these rows, which ``data`` names; of an earlier call, if it has been done."""
        training, samples = self.training, [self.samples[row] for row in rows.tolist()]
        key = self.known.key(rows, seed, training)
        if found := self.known.evaluations.get(key):
            return Trial(data, seed, len(samples), found)

        def tell(evaluation: Evaluation) -> None:
            log.info("%s, seed %d, step %d: held-out loss %.4f", data, seed, evaluation.step, evaluation.loss)

        trial = Trial(data, seed, len(samples), train(self.learner, samples, self.held_out, training, seed, tell))
        self.known.add(key, trial)
        return trial


@dataclass(frozen=True)
class Trainee:
    """Who is trained, and on what nobody trains.

    Attributes:
        model: the name of the recipe's model; no method need use it.
        held_out: path or glob of the samples that it is judged on, with the corpus's columns.
    """

    model: str
    held_out: str


@contextlib.contextmanager
def laboratory(
    recipe: Recipe,
    trainee: Trainee,
    output: Store,
    training: Training,
    progress: Progress | None = None,
    written: Sequence[str] = (),
) -> Iterator[Laboratory]:
    """Score the corpus, and get the model and all samples ready.

    Args:
        written: the files that will be written into ``output`` beside those of the trainings.

    Raises:
        EngineError: no such model; held-out samples that are trained on, or that a score is fitted to.
        CorpusError: an output that lies in the corpus, the held-out samples or targets, or among scores, or that has
            somebody's files of these names.
    """
    _refuse_untrainable(recipe, trainee.model)
    corpora = {path: find_shards(path) for path in (recipe.corpus.path, trainee.held_out, *recipe.fitted_to().values())}
    corpus, held_out = corpora[recipe.corpus.path], corpora[trainee.held_out]
    fitted = {name: corpora[path] for name, path in recipe.fitted_to().items() if path != recipe.corpus.path}
    _refuse_leaks(corpus, held_out, fitted)
    for path, own in corpora.items():
        refuse_overlap(output, path, own, [TRIALS])
    refuse_scores(output, Store.at(recipe.output))
    _refuse_strangers(output, [TRIALS, *written])
    run(recipe, progress=progress or Progress())
    with claim(output, "an experiment"):
        learner, spec = _learner(recipe, trainee.model, corpus), recipe.models[trainee.model]
        basis = {
            "model": [spec.identity(), fingerprints({trainee.model: spec})],
            "held_out": corpus_fingerprint(held_out, images=recipe.task.files_column),
            "corpus": corpus_fingerprint(corpus, images=recipe.task.files_column),
            "task": json.loads(dumps(recipe.task.model_dump())),
            "version": __version__,
        }
        samples = _samples("corpus", corpus, learner)
        judged = _unseen(_samples("held-out", held_out, learner), "the corpus", samples)
        for name, own in fitted.items():
            judged = _unseen(judged, name, samples_by_row(name, own, learner.encoder))
        basis["judged"] = hashlib.sha256(np.fromiter(judged, np.int64).tobytes()).hexdigest()
        yield Laboratory(learner, samples, list(judged.values()), training, _Trials(output, basis))


def _refuse_untrainable(recipe: Recipe, model: str) -> None:
    """EngineError unless it is a model of the recipe, and its task one to train on."""
    if model not in recipe.models:
        raise EngineError(f"train: no model is called {model!r}; the recipe has {', '.join(recipe.models)}")
    if not recipe.task.asks_models:
        raise EngineError(f"train: nothing is predicted in a task of kind {recipe.task.kind}; expected another kind")
    if not recipe.task.teaches:
        raise EngineError(
            f"train: nobody is trained on a task of kind {recipe.task.kind}; select by its scores, and train elsewhere"
        )
    if recipe.task.group_rows is not None:
        raise EngineError("train: samples of a contrastive task share their losses, and are not trained on here")


def _refuse_leaks(corpus: Corpus, held_out: Corpus, fitted: Mapping[str, Corpus]) -> None:
    """EngineError if a file of held-out samples is trained on, or a score has seen it."""
    judged = {held_out.store.real(shard.path) for shard in held_out.shards}
    for name, other in {"the corpus": corpus, **fitted}.items():
        if shared := sorted(judged.intersection(other.store.real(shard.path) for shard in other.shards)):
            nobody = "nobody trains on" if other is corpus else "no score is fitted to"
            raise EngineError(f"held-out: {shared[0]} is part of {name}; expected samples that {nobody}")


def _unseen(held_out: Mapping[int, Encoded], what: str, samples: Mapping[int, Encoded]) -> Mapping[int, Encoded]:
    """The held-out samples that are not among these too, in files of other names."""
    contents = {row: _content(sample) for row, sample in held_out.items()}
    known = set(contents.values())
    seen = {content for sample in samples.values() if (content := _content(sample)) in known}
    found = {row: sample for row, sample in held_out.items() if contents[row] not in seen}
    if not found:
        raise EngineError(
            f"held-out: all of its {len(held_out):,} samples are in {what} too; expected some that nobody trains "
            "on and no score is fitted to"
        )
    if len(found) < len(held_out):
        log.warning(
            "held-out: %d of %d samples are in %s too; nothing is judged on them",
            len(held_out) - len(found),
            len(held_out),
            what,
        )
    return found


def _content(sample: Encoded) -> bytes:
    return hashlib.sha256(pickle.dumps(sample.data)).digest()


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
        self._lines = _lines(output)
        self.evaluations: dict[str, list[Evaluation]] = dict(filter(None, map(_trial, self._lines)))

    def key(self, rows: Rows, seed: int, training: Training) -> str:
        """What decides a training's outcome. How many others there are does not."""
        own = {name: value for name, value in asdict(training).items() if name != "seeds"}
        digest = hashlib.sha256(rows.tobytes()).hexdigest()
        return canonical_hash({**self._basis, "training": own, "rows": digest, "seed": seed})

    def add(self, key: str, trial: Trial) -> None:
        self.evaluations[key] = list(trial.evaluations)
        self._lines.append(dumps({"key": key, **asdict(trial)}))
        self._output.write_text(TRIALS, "".join(f"{line}\n" for line in self._lines))


def _refuse_strangers(output: Store, written: Sequence[str]) -> None:
    """CorpusError for a file that would be lost: the first that is written anywhere is the list of trainings."""
    there = [name for name in written if output.exists(name)]
    if there and not any(map(_trial, _lines(output))):
        raise CorpusError(
            f"{output.full(there[0])}: is there, and no experiment has written it; choose another output, or move it"
        )


def _lines(output: Store) -> list[str]:
    """The list of trainings, if there is any."""
    if not output.exists(TRIALS):
        return []
    with output.open(TRIALS) as file:
        return file.read().decode(errors="replace").splitlines()


def _trial(line: str) -> tuple[str, list[Evaluation]] | None:
    """The key and the evaluations; a line that was cut off by a kill says nothing."""
    try:
        entry = json.loads(line)
        return entry["key"], [Evaluation(**each) for each in entry["evaluations"]]
    except (ValueError, KeyError, TypeError):
        return None
