"""The digits boards: a small network on 8 × 8 digits, one training of which takes a blink."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from assay.retrain import SGD, Adam, Training
from assay.tasks import Classification
from benchmarks.quality.leaderboard.bank import Bank
from benchmarks.quality.leaderboard.board import Board, facts, orders, warmed

BATCH = 50


@dataclass(frozen=True)
class Digits:
    """A setting of the board."""

    name: str
    title: str
    activation: Callable[[], nn.Module]
    optimizer: str
    rate: float
    train: int = 1000
    queries: int = 50
    steps: int = 120
    share: float = 0.01
    drops: int = 100
    larger: Sequence[float] = (0.05, 0.1)
    members: int = 5


DIGITS = Digits("digits", "MLP 64–32–10 on digits, GELU, AdamW .01", nn.GELU, "adamw", 0.01)
SGD_DIGITS = Digits("digits-sgd", "MLP 64–32–10 on digits, tanh, SGD .1", nn.Tanh, "sgd", 0.1)
ROUGH = Digits("digits-rough", "MLP 64–32–10 on digits, tanh, AdamW .1 (rough)", nn.Tanh, "adamw", 0.1)
QUICK = Digits(
    "digits-quick", "the same, small", nn.GELU, "adamw", 0.01, 200, 8, 32, share=0.1, drops=32, larger=(), members=3
)


def losses(network: Callable[..., Tensor], batch: Any) -> Tensor:
    """(B,)."""
    x, y = batch
    return nn.functional.cross_entropy(network(x), y, reduction="none")


def build(setting: Digits, root: Path) -> Board:
    """The board, with its bank under ``root``."""
    from sklearn.datasets import load_digits

    features, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(features))[: setting.train + setting.queries]
    x, y = torch.tensor(features[order] / 16, dtype=torch.float32), torch.tensor(labels[order])
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


def _start(setting: Digits, seed: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(64, 32), setting.activation(), nn.Linear(32, 10)).eval()


def _optimizer(setting: Digits) -> SGD | Adam:
    rates = warmed(setting.rate, setting.steps)
    if setting.optimizer == "sgd":
        return SGD(rates, momentum=0.9, weight_decay=1e-3)
    return Adam(rates, (0.9, 0.99), eps_root=1e-12, weight_decay=0.01, decoupled_weight_decay=True)
