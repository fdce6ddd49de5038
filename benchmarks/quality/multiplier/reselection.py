"""Selection by metagradients: MAGIC's derivatives of the target's loss, and MGD, which selects again by them.

The run that is differentiated goes on from the warmed-up proxy, once through the pool, at the rate at which the
leaderboard's text board is smooth; at the warm-up's own rate a derivative says less of what removing pieces does.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from assay.retrain import Adam, Training, magic
from assay.tasks import CausalLM

Scores = NDArray[np.float64]
BATCH, RATE = 64, 5e-4
ROUNDS, SHARE = 4, 0.5  # of MGD: trainings, and the share of the counts that each may change


@dataclass(frozen=True)
class Reselection:
    """The run.

    Attributes:
        model: its start.
        pool, target: (N, T), (M, T) bytes.
    """

    model: nn.Module
    pool: Tensor
    target: Tensor

    @property
    def run(self) -> Training:
        """Once through the pool, which is in random order."""
        batches = np.array_split(np.arange(len(self.pool)), -(-len(self.pool) // BATCH))
        rates = [RATE * (1 - step / len(batches)) for step in range(len(batches))]
        optimizer = Adam(rates, (0.9, 0.99), eps_root=1e-12, weight_decay=0.01, decoupled_weight_decay=True)
        return Training(self.model, CausalLM(fused=False), {"input_ids": self.pool}, batches, optimizer)

    def gradient(self, counts: Scores) -> Scores:
        """Counts (N,) -> (N,): what one more of each piece takes off the target's loss."""
        found = magic(self.run, {"target": [{"input_ids": self.target}]}, weights=counts, directions=0)
        return np.asarray(found.scores[:, 0])

    def descended(self, rng: np.random.Generator) -> Scores:
        """Metagradient descent."""
        return descended(self.gradient, len(self.pool), rng)


def descended(gradient: Callable[[Scores], Scores], size: int, rng: np.random.Generator) -> Scores:
    """Metagradient descent on counts (2503.13751): each round a random share of them goes up or down by one, by its
    derivative's sign, and never below 0. The score is the count; equal ones are in the order of the mean derivative.
    The paper has a count enter the training at one late step only; here it weighs the piece wherever it comes.

    Args:
        gradient: counts (N,) -> (N,), what one more of each takes off the target's loss.
    """
    counts, total = np.ones(size), np.zeros(size)
    for _ in range(ROUNDS):
        found = gradient(counts)
        total += found
        counts = np.maximum(counts + np.sign(found) * (rng.random(size) < SHARE), 0)
    places: Scores = total.argsort(kind="stable").argsort(kind="stable") / size
    return counts + places
