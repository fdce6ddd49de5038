"""Does a score predict anything on this corpus? Small trainings on what it chooses, beside what its controls choose."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from fnmatch import fnmatchcase

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from assay import select
from assay._json import dumps
from assay.corpus.scores_folder import Scores, open_scores
from assay.corpus.storage import Store
from assay.curate.proofs import PROOF, RANDOM, Claim, End, Gain, Proof, end_of, scores_digest, values_digest
from assay.curate.whole import read_whole
from assay.engine.progress import Progress
from assay.recipe.errors import EngineError
from assay.recipe.recipe import Recipe
from assay.select.rules import amount_rows, uniform
from assay.two_stage.intervals import LEAST, paired_interval
from assay.two_stage.laboratory import Laboratory, Rows, Trainee, laboratory
from assay.two_stage.training import Training

log = logging.getLogger("assay")
CONTROLS = ("reference_loss", "*_reference_loss", "bm25*", "dsir*", "ngram_classifier*")
"""Scores that people trust and that cost little: what a score has to be better than to be worth its price."""
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
        top: how much of each part is chosen: a share, or a number of rows.
        pools: how many random parts the scored rows are divided into, to choose from each; 6 at least.
    """

    by: Sequence[str]
    against: Sequence[str] | None = None
    top: int | float = 0.5
    pools: int = 8
    keep: Mapping[str, End] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.by:
            raise ValueError("by: expected the name of a score, found none")
        if RANDOM in (*self.by, *(self.against or ())):
            raise ValueError(f"{RANDOM}: names the random rows that every score is compared with; expected a score")
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
    """Divide the corpus at random; train a model on what each score chooses from each part, on what its controls choose
    from the same parts, and on random rows of them, all as many and for as many steps; compare held-out losses part by
    part.

    No row is in two parts, nor a copy of it: the gain of a score that knows nothing has either sign alike in each part,
    whatever the other parts' are, so that such a score is proved no more often than the interval says.

    A score is proved if its gain over random rows, by Wilcoxon's interval of 95 %, is above 0. Under ``out`` lie
    ``proof.json``, which `assay select --proved` asks, and ``trials.jsonl``: called again, only what is missing is
    trained. ``on_cost`` is told before the first training.

    Raises:
        EngineError: as of `two_stage`; a score that chooses nothing from a part, or all of it.
        CorpusError: no such score, or an output that lies in the corpus.
    """
    training, output = training or Training(), Store.at(out)
    with laboratory(recipe, trainee, output, training, progress, [PROOF]) as lab:
        scores = open_scores(recipe.output)
        controls = list(_controls(scores) if comparison.against is None else comparison.against)
        names = list(dict.fromkeys([*comparison.by, *controls]))
        table = lab.trainable(read_whole(recipe.output, names).table)
        values = {name: values_digest(scores, name) for name in names}
        ends = {name: _end(scores, name, comparison.keep.get(name)) for name in names}
        parts = _parts(table, lab.contents(table), comparison.pools)
        chosen = [_choices(part, ends, comparison, pool) for pool, part in enumerate(parts)]
        began = time.perf_counter()
        untrained = lab.untrained().loss
        on_cost(_cost(lab, chosen, time.perf_counter() - began))
        losses = {
            name: [lab.trial(name, pool, own[name]).last.loss for pool, own in enumerate(chosen)]
            for name in (RANDOM, *names)
        }
        gains = {name: _gains(name, losses, [RANDOM, *controls]) for name in comparison.by}
        claims = {
            name: Claim(proved=own[RANDOM].low > 0, keep=ends[name], values=values[name], gains=own)
            for name, own in gains.items()
        }
        basis = {**asdict(training), **asdict(comparison), "against": controls, "trained": trainee.model}
        basis |= {"samples": len(chosen[0][RANDOM]), "held_out": len(lab.held_out), "untrained": untrained}
        proof = Proof(scores=scores_digest(scores), claims=claims, losses=losses, basis=basis)
        output.write_text(PROOF, dumps(proof.model_dump(), indent=1) + "\n")
    return proof


def _controls(scores: Scores) -> list[str]:
    return [name for name in scores.columns if any(fnmatchcase(name, pattern) for pattern in CONTROLS)]


def _end(scores: Scores, name: str, keep: End | None) -> End:
    end = end_of(scores, name, keep)
    if end is None:
        raise EngineError(f"{name}: does not say which end of it is better; expected {name}=high or {name}=low")
    return end


def _parts(table: pa.Table, contents: npt.NDArray[np.uint64], pools: int) -> list[pa.Table]:
    """Each row in one of them, beside its copies: what is chosen from one part would be chosen from the others too.

    In random order: of equal scores none is chosen for where its row lies in the corpus.

    Args:
        contents: (rows,) alike of rows that are.

    Raises:
        EngineError: fewer different rows than parts.
    """
    order = uniform(table.num_rows, 0).argsort()
    _, first, group = np.unique(contents[order], return_index=True, return_inverse=True)
    if len(first) < pools:
        raise EngineError(f"pools: {len(first)} different rows are too few for {pools} parts; expected a larger corpus")
    part = first.argsort().argsort()[group] % pools  # dealt out in the order in which they come
    return [table.take(pa.array(order[part == pool])) for pool in range(pools)]


def _choices(part: pa.Table, ends: Mapping[str, End], comparison: Comparison, pool: int) -> dict[str, Rows]:
    """By score, and of random rows, the rows that it chooses of a part."""
    found = {name: select.top(part, name, comparison.top, end).mask for name, end in ends.items()}
    wanted = amount_rows(comparison.top, part.num_rows)
    where = f"{part.num_rows:,} rows, one of {comparison.pools} parts of the corpus"
    for name, mask in found.items():
        if not (count := int(mask.sum())):
            raise EngineError(f"{name}: chooses none of {where}; expected a larger top, or a score of more rows")
        if count < wanted:
            raise EngineError(
                f"{name}: chooses {count:,} of {where}, where {wanted:,} are asked for: the other rows' {name} is NaN; "
                "take a smaller top, or leave the score out"
            )
    if wanted == part.num_rows:
        raise EngineError(f"top: {comparison.top} takes all of {where}, so that nothing is chosen; take a smaller one")
    found[RANDOM] = select.random(part, wanted, pool + 1).mask
    rows = part["row"].to_numpy()
    return {name: np.sort(rows[mask]) for name, mask in found.items()}


def _cost(lab: Laboratory, chosen: Sequence[Mapping[str, Rows]], evaluation: float) -> Cost:
    """Of all trainings, of which each evaluation takes so many seconds; a step is timed on a few of them."""
    todo = [(pool, rows) for pool, own in enumerate(chosen) for rows in own.values() if not lab.is_known(pool, rows)]
    trainings = sum(map(len, chosen))
    if not todo:
        return Cost(trainings, trainings, 0.0)
    step = lab.seconds_per_step(todo[0][1], _TRIED_STEPS)
    each = lab.training.steps * step + len(lab.training.stops) * evaluation
    return Cost(trainings, trainings - len(todo), len(todo) * each)


def _gains(name: str, losses: Mapping[str, Sequence[float]], controls: Sequence[str]) -> dict[str, Gain]:
    gains = {}
    for control in controls:
        if control != name:
            found = paired_interval([theirs - own for own, theirs in zip(losses[name], losses[control], strict=True)])
            gains[control] = Gain(**asdict(found))
    return gains
