"""One seed: a corpus, a proxy, scores of the pool; then a fresh model per selection, trained on the best fraction."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from sklearn.metrics import roc_auc_score

from benchmarks.quality.multiplier import corpus, model, packages, selections
from benchmarks.quality.multiplier.model import Shape
from benchmarks.quality.multiplier.selections import Scored

MODEL, PROXY = Shape(layers=4, width=160), Shape(layers=2, width=96)  # 1.3 and 0.26 million parameters
MIXTURES = {"library": corpus.LIBRARY, "packages": packages.PACKAGES}


@dataclass(frozen=True)
class Sizes:
    """Of one experiment; pieces are of ``corpus.LENGTH`` bytes."""

    pool: int = 6000
    target: int = 384
    validation: int = 128
    test: int = 256
    fraction: float = 0.2  # of the pool that is selected
    steps: int = 300
    every: int = 10  # steps between two looks at the test set
    model: Shape = MODEL
    proxy: Shape = PROXY
    warm_up: int = 300  # steps of the proxy
    checkpoints: int = 2
    mixture: str = "library"  # a name of ``MIXTURES``

    def corpus(self, seed: int) -> corpus.Corpus:
        return corpus.build(self.pool, self.target, self.validation, self.test, seed, MIXTURES[self.mixture])


# What the test suite runs: the same code, a tenth of the work.
QUICK = Sizes(
    pool=1600,
    target=128,
    validation=64,
    test=128,
    steps=120,
    every=5,
    model=PROXY,
    proxy=Shape(layers=2, width=64),
    warm_up=100,
)


@dataclass(frozen=True)
class Prepared:
    """What the methods made of one seed's pool."""

    scored: dict[str, Scored]
    warm_up_seconds: float


def prepare(sizes: Sizes, seed: int, names: Sequence[str]) -> Prepared:
    """Score the pool with the named methods."""
    data = sizes.corpus(seed)
    proxy = selections.warm_up(sizes.proxy, data, sizes.warm_up, sizes.checkpoints, seed)
    return Prepared(selections.score(data, proxy, seed, names), proxy.seconds)


def retrain(sizes: Sizes, seed: int, scores: selections.Scores) -> dict[str, Any]:
    """Train a fresh model on the fraction of the pool that scores highest; all share its start and their batches'
    order in the selection."""
    data = sizes.corpus(seed)
    chosen = np.argsort(-np.nan_to_num(scores, nan=-np.inf), kind="stable")[: round(sizes.fraction * len(scores))]
    fresh = model.language_model(sizes.model, seed)
    steps, losses = model.train(
        fresh, data.pool[torch.from_numpy(chosen)], model.Schedule(sizes.steps), seed, data.test, sizes.every
    )
    kinds, counts = np.unique(data.kinds[chosen], return_counts=True)
    return {
        "steps": steps,
        "losses": [round(value, 5) for value in losses],
        "domain_share": round(float(data.of_domain[chosen].mean()), 4),
        "kinds": {str(k): round(int(c) / len(chosen), 4) for k, c in zip(kinds, counts, strict=True)},
        "domain_auroc": round(float(roc_auc_score(data.of_domain, np.nan_to_num(scores))), 4),
    }


def steps_to(run: dict[str, Any], goal: float) -> int | None:
    """The first step at which the loss was at most ``goal``."""
    return next((step for step, value in zip(run["steps"], run["losses"], strict=True) if value <= goal), None)


def summary(runs: dict[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Per selection over seeds: steps to the loss that random's selection ends with, and how many times fewer.

    Args:
        runs: by selection, one run per seed.
    """
    goals = [run["losses"][-1] for run in runs["random"]]
    # Random itself may pass its last loss on the way: its own first passing is what the others are compared with.
    budget = statistics.median([steps_to(run, goal) for run, goal in zip(runs["random"], goals, strict=True)])
    rows = []
    for name, mine in runs.items():
        steps = [steps_to(run, goal) for run, goal in zip(mine, goals, strict=True)]
        reached = [s for s in steps if s is not None]
        # A run that never gets there counts as one that takes longer than any budget.
        median = statistics.median_high([s if s is not None else np.inf for s in steps])
        final = [run["losses"][-1] for run in mine]
        rows.append(
            {
                "selection": name,
                "steps": steps,
                "median_steps": None if np.isinf(median) else int(median),
                "range": [min(reached), max(reached)] if len(reached) == len(steps) else None,
                "multiplier": None if np.isinf(median) else round(budget / median, 2),
                "final_loss": {"median": statistics.median(final), "range": [min(final), max(final)]},
                "domain_share": statistics.median(run["domain_share"] for run in mine),
                "domain_auroc": statistics.median(run["domain_auroc"] for run in mine),
                "scoring_seconds": max(run["scoring_seconds"] for run in mine),
            }
        )
    return rows
