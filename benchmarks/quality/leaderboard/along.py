"""Methods that follow the run, or retrain."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from assay.methods import LESS, InRunInfluence
from assay.ops import Kronecker
from assay.retrain import Adam, SmallModelDatamodel, magic
from assay.retrain.magic_training import running
from benchmarks.quality.leaderboard.bank import Rows
from benchmarks.quality.leaderboard.board import Board, NotHere, with_parameters
from benchmarks.quality.leaderboard.entries import by_optimizer, entry, scored
from benchmarks.quality.leaderboard.truth import losses_of

Array = NDArray[np.float64]
EXACT = Kronecker(256, 256)  # larger than any layer here: nothing is projected
SUBSETS = 256


@entry("MAGIC")
def own_run(board: Board) -> Array:
    return np.asarray(magic(board.run, board.targets, directions=0).scores)


@entry("MAGIC, other start and order")
def other_run(board: Board) -> Array:
    return np.asarray(magic(board.other, board.targets, directions=0).scores)


@entry("datamodel")
def datamodel(board: Board) -> Array:
    """Fitted to retrainings of its own, each without a random tenth: time is theirs."""
    if board.at_once < 10:
        raise NotHere(f"{SUBSETS} retrainings take too long here")
    rng, share = np.random.default_rng(11), board.size // 10
    drops: list[Rows] = [tuple(sorted(rng.permutation(board.size)[:share].tolist())) for _ in range(SUBSETS)]
    members = np.ones((SUBSETS, board.size), bool)
    for member, rows in zip(members, drops, strict=True):
        member[list(rows)] = False
    parts = [drops[i : i + board.at_once] for i in range(0, SUBSETS, board.at_once)]
    losses = np.concatenate([losses_of(board, part) for part in parts])
    return np.asarray(SmallModelDatamodel.fit(members, -losses).scores)


@entry("In-Run, every step")
def in_run(board: Board) -> Array:
    """Each step's own batch at the weights and moments before it, first order, Adam's diagonal where it is Adam's."""
    run, weights, total = board.run, torch.ones(board.size), np.zeros((board.size, board.count))
    state = run.initial()
    with running():
        for step, rows in enumerate(run.rows):
            model = with_parameters(run.model, run.named(state[0]))
            optimizer = _optimizer(board, model, state, step)
            if optimizer is not None:  # Adam has no moments before its first step
                method = InRunInfluence(model, board.task, board.targets, optimizer=optimizer)
                total[rows] += _of_batch(board, method, rows) / len(rows)
            state = run.advance(state, step, weights)
    return total


def _of_batch(board: Board, method: InRunInfluence, rows: NDArray[np.int64]) -> Array:
    from assay import score

    table = score([board.run.batch(rows)], [method.fit()], verify=False)
    return np.stack([table[f"in_run_{name}"].to_numpy() for name in board.names], 1).astype(np.float64)


def _optimizer(
    board: Board, model: torch.nn.Module, state: tuple[torch.Tensor, ...], step: int
) -> torch.optim.Optimizer | None:
    """torch's, in the state in which the run's is before a step."""
    o, rate = board.run.optimizer, board.run.rates[step]
    if not isinstance(o, Adam):
        return torch.optim.SGD(model.parameters(), lr=rate)
    if not step:
        return None
    made = torch.optim.AdamW(model.parameters(), lr=rate, betas=tuple(o.betas), eps=o.eps)
    moments = [board.run.named(moment) for moment in state[1:]]
    for name, p in model.named_parameters():
        made.state[p] = {
            "step": torch.tensor(float(step)),
            "exp_avg": moments[0][name].clone(),
            "exp_avg_sq": moments[1][name].clone(),
        }
    return made


@entry("LESS")
def less(board: Board) -> Array:
    by_optimizer(board, "LESS' step")
    found = board.checkpoints
    states = [c.adam for c in found if c.adam is not None]
    return scored(
        board,
        LESS([c.model for c in found], board.task, board.targets, optimizers=states, weights=[c.rate for c in found]),
    )
