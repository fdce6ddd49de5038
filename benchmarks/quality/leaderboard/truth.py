"""The truth: what retraining without some rows does, by a loop that shares no code with what it judges.

From the same start in the same order, with the weights of dropped rows 0 in unchanged batches; many trainings are one
tensor.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.func import functional_call, vmap

from assay.retrain import SGD
from benchmarks.quality.leaderboard.bank import Rows
from benchmarks.quality.leaderboard.board import Board
from benchmarks.quality.leaderboard.forks import Job, forked, here

Array = NDArray[np.float64]
Named = dict[str, Tensor]


def retrained(board: Board, weights: Tensor) -> Named:
    """(R, N) weights -> the parameters of R trainings, stacked."""
    run = board.run
    theta = {n: p.detach().expand(len(weights), *p.shape).clone() for n, p in run.model.named_parameters()}
    m, v = ({n: torch.zeros_like(p) for n, p in theta.items()} for _ in range(2))
    for t, rows in enumerate(run.rows):
        g = _gradients(board, theta, weights[:, rows], run.batch(rows))
        theta, m, v = step(run.optimizer, theta, m, v, g, t, run.rates[t])
    return theta


def _gradients(board: Board, theta: Named, weights: Tensor, batch: Any) -> Named:
    """Of each training's weighted mean loss in its own parameters: the gradient of their sum."""
    leaves = {n: p.detach().requires_grad_() for n, p in theta.items()}

    def loss(theta: Named, w: Tensor) -> Tensor:
        each = board.losses(lambda *x: functional_call(board.run.model, theta, x), batch)
        return (w * each).sum() / len(each)

    total = vmap(loss)(leaves, weights).sum()
    return dict(zip(leaves, torch.autograd.grad(total, list(leaves.values())), strict=True))


def step(
    o: Any, theta: Named, m: Named, v: Named, gradient: Mapping[str, Tensor], t: int, rate: float
) -> tuple[Named, Named, Named]:
    """SGD with momentum and coupled decay, or AdamW, by the book."""
    theta, m, v = dict(theta), dict(m), dict(v)
    for n, g in gradient.items():
        if isinstance(o, SGD):
            m[n] = o.momentum * m[n] + g + o.weight_decay * theta[n]
            theta[n] = theta[n] - rate * m[n]
        else:
            m[n] = o.betas[0] * m[n] + (1 - o.betas[0]) * g
            v[n] = o.betas[1] * v[n] + (1 - o.betas[1]) * g * g
            mean, square = (k / (1 - b ** (t + 1)) for k, b in zip((m[n], v[n]), o.betas, strict=True))
            theta[n] = (1 - rate * o.weight_decay) * theta[n] - rate * mean / ((square + o.eps_root).sqrt() + o.eps)
    return theta, m, v


def query_losses(board: Board, theta: Mapping[str, Tensor]) -> Array:
    """(R, Q)."""
    with torch.no_grad():
        each = [
            board.losses(lambda *x, p=p: functional_call(board.run.model, p, x), board.queries)  # type: ignore[misc]
            for p in ({n: stack[r] for n, stack in theta.items()} for r in range(len(next(iter(theta.values())))))
        ]
    found: Array = torch.stack(each).double().numpy()
    return found


def losses_without(board: Board, wanted: Iterable[Rows], at_once: int) -> Array:
    """(R, Q): the queries' losses after training without those rows; what the bank lacks is trained.

    Args:
        at_once: processes; 0: this one.
    """
    wanted, bank = list(wanted), board.bank
    sample, missing = bank.sample(), bank.missing(wanted)
    todo = ([sample] if sample is not None else []) + missing
    parts = [todo[i : i + board.at_once] for i in range(0, len(todo), board.at_once)]
    jobs = {str(i): Job(partial(losses_of, board, part)) for i, part in enumerate(parts)}
    for name, done in forked(jobs, at_once) if at_once else here(jobs):
        if done.error:
            raise RuntimeError(f"{board.name}: a retraining failed: {done.error}")
        found = dict(zip(parts[int(name)], done.value, strict=True))
        if sample in found:
            bank.check(sample, found.pop(sample))
        bank.keep(found)
    return np.stack([bank.known[rows] for rows in wanted])


def losses_of(board: Board, dropped: Sequence[Rows]) -> Array:
    """(R, Q): the same without a bank, trained as one tensor."""
    weights = torch.ones(len(dropped), board.size)
    for w, rows in zip(weights, dropped, strict=True):
        w[list(rows)] = 0
    return query_losses(board, retrained(board, weights))


def tail_patches(board: Board) -> Array:
    """(N, Q): by how much one more step on a row alone, at the mean rate of the last epoch, raises a query's
    probability, the geometric mean over its tokens; less what a step on any row does, which is mostly momentum's."""
    run, last = board.run, board.checkpoints[-1]
    theta = {n: p.detach()[None] for n, p in last.model.named_parameters()}
    states = board.bank.tensors("run", dict)["states"][-1]
    _, *moments = ({n: p[None] for n, p in run.named(state).items()} for state in states)
    m, v = [*moments, {n: torch.zeros_like(p) for n, p in theta.items()}][:2]
    rate = float(np.mean(run.rates[-board.epoch :]))
    before = np.exp(-query_losses(board, theta))
    rises = []
    for row in range(board.size):
        g = _gradients(board, theta, torch.ones(1, 1), run.batch(np.array([row])))
        after, _, _ = step(run.optimizer, theta, m, v, g, run.steps, rate)
        rises.append(np.exp(-query_losses(board, after))[0] - before[0])
    found: Array = np.stack(rises)
    return found - found.mean(0)
