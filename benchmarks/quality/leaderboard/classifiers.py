"""Boards of small classifiers, one training of which takes a blink."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from assay.retrain import SGD, Adam, Training
from assay.tasks import Classification
from benchmarks.quality.leaderboard.bank import Bank
from benchmarks.quality.leaderboard.board import Board, facts, orders, warmed

BATCH = 50


@dataclass(frozen=True)
class Classifier:
    """A setting of a board.

    Attributes:
        samples: the banks' folder, N and Q -> inputs (N + Q, …) and labels (N + Q,), the queries last.
        network: a start, drawn by torch's generator; its last layer is the output's.
    """

    name: str
    title: str
    samples: Callable[[Path, int, int], tuple[Tensor, Tensor]]
    network: Callable[[], nn.Sequential]
    optimizer: Literal["adamw", "sgd"]
    rate: float
    train: int = 1000
    queries: int = 50
    steps: int = 120
    share: float = 0.01
    drops: int = 100
    larger: Sequence[float] = (0.05, 0.1)
    members: int = 5


def losses(network: Callable[..., Tensor], batch: Any) -> Tensor:
    """(B,)."""
    x, y = batch
    return nn.functional.cross_entropy(network(x), y, reduction="none")


def build(setting: Classifier, root: Path) -> Board:
    """The board, with its bank under ``root``."""
    x, y = setting.samples(root, setting.train, setting.queries)
    data, queries = (x[: setting.train], y[: setting.train]), (x[setting.train :], y[setting.train :])
    rng, half = np.random.default_rng(2), setting.train // 2

    def training(seed: int, rows: Any = None) -> Training:
        batches = orders(setting.train, BATCH, setting.steps, seed, rows)
        return Training(_start(setting, seed), Classification(), data, batches, _optimizer(setting))

    run = training(0)
    members = [training(100 + k, rng.permutation(setting.train)[:half]) for k in range(setting.members)]
    bank = Bank(root, facts(setting.name, run, members, queries))
    epoch = setting.train // BATCH
    return Board(
        setting.name,
        setting.title,
        run,
        training(1),
        members,
        queries,
        losses,
        bank,
        epoch,
        share=setting.share,
        drops=setting.drops,
        larger=setting.larger,
    )


def _start(setting: Classifier, seed: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return setting.network().eval()


def _optimizer(setting: Classifier) -> SGD | Adam:
    rates = warmed(setting.rate, setting.steps)
    if setting.optimizer == "sgd":
        return SGD(rates, momentum=0.9, weight_decay=1e-3)
    return Adam(rates, (0.9, 0.99), eps_root=1e-12, weight_decay=0.01, decoupled_weight_decay=True)
