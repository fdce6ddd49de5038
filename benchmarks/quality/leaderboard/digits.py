"""The digits boards: a small network on 8 × 8 digits."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.quality.leaderboard.classifiers import Classifier


def samples(root: Path, train: int, queries: int) -> tuple[Tensor, Tensor]:
    """(N + Q, 64) in [0, 1]."""
    from sklearn.datasets import load_digits

    features, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(features))[: train + queries]
    return torch.tensor(features[order] / 16, dtype=torch.float32), torch.tensor(labels[order])


def network(activation: type[nn.Module]) -> nn.Sequential:
    return nn.Sequential(nn.Linear(64, 32), activation(), nn.Linear(32, 10))


GELU, TANH = partial(network, nn.GELU), partial(network, nn.Tanh)
DIGITS = Classifier("digits", "MLP 64–32–10 on digits, GELU, AdamW .01", samples, GELU, "adamw", 0.01)
SGD_DIGITS = Classifier("digits-sgd", "MLP 64–32–10 on digits, tanh, SGD .1", samples, TANH, "sgd", 0.1)
ROUGH = Classifier("digits-rough", "MLP 64–32–10 on digits, tanh, AdamW .1 (rough)", samples, TANH, "adamw", 0.1)
QUICK = replace(
    DIGITS,
    name="digits-quick",
    title="the same, small",
    train=200,
    queries=8,
    steps=32,
    share=0.1,
    drops=32,
    larger=(),
    members=3,
)
