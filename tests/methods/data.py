"""Digits with wrong labels, small networks, and the models that judge them."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.datasets import load_digits
from torch import Tensor, nn


@dataclass(frozen=True)
class Noisy:
    x: Tensor  # (N, 64) standardised
    given: Tensor  # (N,) labels, some of them wrong
    true: Tensor  # (N,)

    @property
    def wrong(self) -> NDArray[np.bool_]:
        return (self.given != self.true).numpy()


def noisy_digits(noise: float, seed: int = 0, size: int | None = None) -> Noisy:
    """Symmetric label noise: a wrong label is one of the nine others, equally likely."""
    features, target = load_digits(return_X_y=True)
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(features))[:size]
    x = (features - features.mean(0)) / (features.std(0) + 1e-6)
    true = target[order]
    given = true.copy()
    flipped = rng.choice(len(order), int(noise * len(order)), replace=False)
    given[flipped] = (given[flipped] + rng.integers(1, 10, len(flipped))) % 10
    return Noisy(torch.tensor(x[order], dtype=torch.float32), torch.tensor(given), torch.tensor(true))


def mlp(seed: int, width: int = 64) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(64, width), nn.ReLU(), nn.Linear(width, 10))


def train(model: nn.Module, x: Tensor, y: Tensor, epochs: int, lr: float = 0.05, seed: int = 0) -> nn.Module:
    model = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
    for _ in range(epochs):
        for rows in torch.randperm(len(x), generator=generator).split(32):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x[rows]), y[rows]).backward()
            optimizer.step()
    return model
