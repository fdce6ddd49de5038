"""Does a score predict anything on this corpus? Small trainings on what it chooses, beside what its controls choose."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from fnmatch import fnmatchcase
from typing import Literal

import pyarrow as pa

from assay import select
from assay.corpus.scores_folder import Scores, open_scores
from assay.corpus.storage import Store
from assay.curate.proofs import PROOF, RANDOM, Claim, Gain, Proof, end_of, scores_digest
from assay.curate.whole import read_whole
from assay.engine.progress import Progress
from assay.recipe.errors import EngineError
from assay.recipe.recipe import Recipe
from assay.two_stage.intervals import LEAST, paired_interval
from assay.two_stage.laboratory import Laboratory, Rows, Trainee, laboratory
from assay.two_stage.training import Training

log = logging.getLogger("assay")
CONTROLS = ("reference_loss", "*_reference_loss", "bm25*", "dsir*", "ngram_classifier*")
"""Scores that people trust and that cost little: what a score has to be better than to be worth its price."""
POOL = 0.5
_TRIED_STEPS = 3


@dataclass(frozen=True)
class Cost:
    """What is to be trained: so many trainings, of which so many are done, and how long the others may take."""

    trainings: int
    done: int
    seconds: float


@dataclass(frozen=True)
class Comparison:
    """What is tried out.

    Attributes:
        by: the scores that are to be proved.
        keep: by score, which end is better, if not as the score says.
        against: scores to compare them with, besides random rows; None for those of `CONTROLS` that are there.
        top: how much of each pool is chosen: a share, or a number of rows.
        pools: how many random halves of the scored rows there are to choose from; 6 at least.
    """

    by: Sequence[str]
    against: Sequence[str] | None = None
    top: int | float = 0.5
    pools: int = 8
    keep: Mapping[str, Literal["high", "low"]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.by:
            raise ValueError("by: expected the name of a score, found none")
        if self.pools < LEAST:
            raise ValueError(f"pools: expected at least {LEAST}, with fewer nothing is sure; found {self.pools}")


def prove(
    recipe: Recipe,
    trainee: Trainee,
    comparison: Comparison,
    out: str,
    training: Training | None = None,
    progress: Progress | None = None,
    on_cost: Callable[[Cost], None] = lambda cost: None,
) -> Proof:
    """Train a model on what each score chooses from random halves of the corpus, on what its controls choose from the
    same halves, and on random rows of them, all as many and for as many steps; compare held-out losses half by half.

    A score is proved if its gain over random rows, by Wilcoxon's interval of 95 %, is above 0. Under ``out`` lie
    ``proof.json``, which `assay select --proved` asks, and ``trials.jsonl``: called again, only what is missing is
    trained. ``on_cost`` is told before the first training.

    Raises:
        EngineError: as of `two_stage`; or a score that chooses nothing from a half.
        CorpusError: no such score, or an output that lies in the corpus.
    """
    training, output = training or Training(), Store.at(out)
    with laboratory(recipe, trainee, output, training, progress) as lab:
        scores = open_scores(recipe.output)
        controls = list(_controls(scores) if comparison.against is None else comparison.against)
        names = list(dict.fromkeys([*comparison.by, *controls]))
        table = read_whole(recipe.output, names).table
        chosen = [_choices(table, names, comparison, pool) for pool in range(comparison.pools)]
        began = time.perf_counter()
        untrained = lab.untrained().loss
        on_cost(_cost(lab, chosen, time.perf_counter() - began))
        losses = {
            name: [lab.trial(name, pool, own[name]).last.loss for pool, own in enumerate(chosen)]
            for name in (RANDOM, *names)
        }
        claims = {
            name: _claim(name, end_of(scores, name, comparison.keep.get(name)), losses, [RANDOM, *controls])
            for name in comparison.by
        }
        basis = {**asdict(training), **asdict(comparison), "against": controls, "trained": trainee.model}
        basis |= {"samples": len(chosen[0][RANDOM]), "held_out": len(lab.held_out), "untrained": untrained}
        proof = Proof(scores=scores_digest(scores), claims=claims, losses=losses, basis=basis)
        output.write_text(PROOF, json.dumps(proof.model_dump(), indent=1) + "\n")
    return proof


def _controls(scores: Scores) -> list[str]:
    return [name for name in scores.columns if any(fnmatchcase(name, pattern) for pattern in CONTROLS)]


def _choices(table: pa.Table, names: Sequence[str], comparison: Comparison, pool: int) -> dict[str, Rows]:
    """By score, and of random rows, the rows that it chooses of a random half."""
    rows = table["row"].to_numpy()
    half = select.random(table, POOL, 2 * pool).mask
    own, places = table.filter(pa.array(half)), rows[half]
    found = {name: select.top(own, name, comparison.top, comparison.keep.get(name)).mask for name in names}
    fewest = min(mask.sum() for mask in found.values())
    for name, mask in found.items():
        if not mask.any():
            raise EngineError(f"{name}: chooses no row of a half of the corpus; it has {len(rows):,} rows with scores")
        if mask.sum() != fewest:
            raise EngineError(f"{name}: chooses {mask.sum():,} rows where another score has only {fewest:,} numbers")
    found[RANDOM] = select.random(own, int(fewest), 2 * pool + 1).mask
    return {name: places[mask] for name, mask in found.items()}


def _cost(lab: Laboratory, chosen: Sequence[Mapping[str, Rows]], evaluation: float) -> Cost:
    """Of all trainings, of which each evaluation takes so many seconds; a step is timed on a few of them."""
    todo = [(pool, rows) for pool, own in enumerate(chosen) for rows in own.values() if not lab.is_known(pool, rows)]
    trainings = sum(map(len, chosen))
    if not todo:
        return Cost(trainings, trainings, 0.0)
    step = lab.seconds_per_step(todo[0][1], _TRIED_STEPS)
    each = lab.training.steps * step + len(lab.training.stops) * evaluation
    return Cost(trainings, trainings - len(todo), len(todo) * each)


def _claim(name: str, keep: str, losses: Mapping[str, Sequence[float]], controls: Sequence[str]) -> Claim:
    gains = {}
    for control in controls:
        if control != name:
            found = paired_interval([theirs - own for own, theirs in zip(losses[name], losses[control], strict=True)])
            gains[control] = Gain(**asdict(found))
    return Claim(proved=gains[RANDOM].low > 0, keep=keep, gains=gains)
