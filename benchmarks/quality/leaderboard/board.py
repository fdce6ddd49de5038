"""A board: one training run, what it is asked about, and what methods may look at."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from assay._json import dumps
from assay.methods import AdamState, Views
from assay.retrain import SGD, Adam, Training
from assay.tasks import Task
from benchmarks.quality.leaderboard.bank import Bank

Array = NDArray[np.float64]
Losses = Callable[[Callable[..., Tensor], Any], Tensor]
"""(network, batch) -> (B,) losses in plain torch: the truth does not use what it judges."""
BATCH = 128


class NotHere(Exception):
    """A method that has nothing to say on this board; the message says why."""


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """Where the run was after ``step`` steps; ``rate`` are the rates of the epoch before, added, over 1 − momentum."""

    step: int
    model: nn.Module
    adam: AdamState | None
    rate: float


@dataclass(frozen=True, eq=False)
class Board:
    """What is judged, on what.

    Attributes:
        name, title: of the board.
        run: the training whose rows are valued.
        other: the same training from another start (where one is drawn) and in another order.
        members: trainings on random halves, for methods that average over models.
        queries: Q samples, as ``run.data``.
        losses: of a batch, in plain torch.
        bank: what trainings gave.
        epoch: steps of one.
        share, drops: how much of the pool is dropped, how often.
        larger: shares of which as many drops are judged by beside.
        at_once: trainings in one tensor.
        texts: of the pool, and of the queries; None: the rows are no texts.
        gold: by query, the rows that state its fact.
    """

    name: str
    title: str
    run: Training
    other: Training
    members: Sequence[Training]
    queries: Any
    losses: Losses
    bank: Bank
    epoch: int
    share: float = 0.01
    drops: int = 100
    larger: Sequence[float] = ()
    at_once: int = 50
    texts: tuple[Sequence[str], Sequence[str]] | None = None
    gold: Mapping[int, Sequence[int]] = field(default_factory=dict)

    @property
    def task(self) -> Task:
        assert isinstance(self.run.losses, Task)
        return self.run.losses

    @property
    def size(self) -> int:
        """N."""
        return self.run.size

    @cached_property
    def count(self) -> int:
        """Q."""
        return len(_columns(self.queries)[0])

    @property
    def names(self) -> list[str]:
        """Of the targets: one per query."""
        return [f"q{i}" for i in range(self.count)]

    @cached_property
    def batches(self) -> list[Any]:
        """The pool, in its order."""
        return [self.run.batch(rows) for rows in np.array_split(np.arange(self.size), -(-self.size // BATCH))]

    @cached_property
    def targets(self) -> dict[str, list[Any]]:
        return {name: [part(self.queries, slice(i, i + 1))] for i, name in enumerate(self.names)}

    @property
    def pool(self) -> Any:
        """All of it as one batch."""
        return self.run.batch(np.arange(self.size))

    def views(self) -> tuple[list[Views], dict[str, list[Views]]]:
        """The pool and the targets as texts."""
        if self.texts is None:
            raise NotHere("the rows are no texts")
        pool, queries = self.texts
        own = {name: [Views(None, raw={"text": [text]})] for name, text in zip(self.names, queries, strict=True)}
        return [Views(None, raw={"text": list(pool)})], own

    # ---- The models

    @cached_property
    def checkpoints(self) -> list[Checkpoint]:
        """At the end of every epoch; the last is the model that queries are asked of."""
        states = self.bank.tensors("run", lambda: {"states": _states(self.run, self.epoch)})["states"]
        found = []
        for i, state in enumerate(states):
            step = min((i + 1) * self.epoch, self.run.steps)
            theta, *moments = (self.run.named(part) for part in state)
            o, adam = self.run.optimizer, None
            if isinstance(o, Adam):
                adam = AdamState(moments[0], moments[1], tuple(o.betas), o.eps, step)
            rate = sum(self.run.rates[i * self.epoch : step]) / (1 - (o.momentum if isinstance(o, SGD) else 0.0))
            found.append(Checkpoint(step, with_parameters(self.run.model, theta), adam, rate))
        return found

    @property
    def model(self) -> nn.Module:
        return self.checkpoints[-1].model

    @cached_property
    def ensemble(self) -> list[nn.Module]:
        """The members' models."""

        def train() -> dict[str, Tensor]:
            return {"thetas": torch.stack([_states(member, member.steps)[-1][0] for member in self.members])}

        thetas = self.bank.tensors("members", train)["thetas"]
        return [with_parameters(m.model, m.named(theta.clone())) for m, theta in zip(self.members, thetas, strict=True)]


def part(batch: Any, rows: slice) -> Any:
    """Some rows of a batch."""
    if isinstance(batch, Mapping):
        return {name: column[rows] for name, column in batch.items()}
    return tuple(column[rows] for column in batch)


def with_parameters(model: nn.Module, parameters: Mapping[str, Tensor]) -> nn.Module:
    copy = deepcopy(model).eval()
    with torch.no_grad():
        for name, p in copy.named_parameters():
            p.copy_(parameters[name])
    return copy


def warmed(rate: float, steps: int) -> list[float]:
    """Up over the first quarter, then linearly to 0."""
    warm = max(steps // 4, 1)
    return [rate * min((t + 1) / warm, (steps - t) / (steps - warm)) for t in range(steps)]


def orders(size: int, batch: int, steps: int, seed: int, rows: NDArray[np.int64] | None = None) -> list[Any]:
    """The rows of every step: epochs in random order, incomplete batches left out."""
    rng, found = np.random.default_rng(seed), list[Any]()
    rows = np.arange(size) if rows is None else rows
    while len(found) < steps:
        found += list(rng.permutation(rows)[: len(rows) // batch * batch].reshape(-1, batch))
    return found[:steps]


def facts(name: str, run: Training, members: Sequence[Training], queries: Any) -> dict[str, str]:
    """What trainings depend on: the bank's key."""
    return {
        "board": name,
        "run": _digest(_of(run)),
        "members": _digest([_of(member) for member in members]),
        "queries": _digest([t.numpy().tobytes() for t in _columns(queries)]),
        "optimizer": f"{type(run.optimizer).__name__} {_digest([repr(run.optimizer)])}",
        "torch": torch.__version__,
    }


def _of(run: Training) -> str:
    data = [t.numpy().tobytes() for t in _columns(run.batch(np.arange(run.size)))]
    names = [f"{name} {tuple(p.shape)}" for name, p in run.trained.items()]
    order = [rows.tobytes() for rows in run.rows]
    return _digest([str(run.model), *names, run.start.numpy().tobytes(), *order, *data, repr(run.optimizer)])


def _digest(parts: Sequence[str | bytes]) -> str:
    found = hashlib.sha256()
    for part_ in parts:
        found.update(dumps(part_).encode() if isinstance(part_, str) else part_)
    return found.hexdigest()[:16]


def _columns(batch: Any) -> list[Tensor]:
    return list(batch.values()) if isinstance(batch, Mapping) else list(batch)


def _states(run: Training, every: int) -> Tensor:
    """(checkpoints, 1 + moments, P): after every so many steps, and after the last."""
    return torch.stack(list(_walk(run, every)))


def _walk(run: Training, every: int) -> Iterator[Tensor]:
    state, weights = run.initial(), torch.ones(run.size, dtype=run.start.dtype)
    for step in range(run.steps):
        state = run.advance(state, step, weights)
        if (step + 1) % every == 0 or step + 1 == run.steps:
            yield torch.stack([p.detach() for p in state])
