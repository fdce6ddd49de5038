"""scikit-learn's digits, a linear probe on the pixels and a small convolutional network."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from sklearn.datasets import load_digits
from torch import nn

from benchmarks.quality.online.classification import BATCH, NOISE, World, compared, mislabelled

TRUSTED, TRAIN = 150, 1000


def linear_probe() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))


def small_cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, stride=2), nn.ReLU(),
        nn.Flatten(), nn.Linear(32 * 9, 10),
    )  # fmt: skip


MODELS: dict[str, Callable[[], nn.Module]] = {"linear probe": linear_probe, "small CNN": small_cnn}


def make_world(make: Callable[[], nn.Module], steps: int, noise: float, seed: int) -> World:
    pixels, digits = load_digits(return_X_y=True)
    x, y = torch.tensor(pixels / 16, dtype=torch.float32).view(-1, 1, 8, 8), torch.tensor(digits)
    torch.manual_seed(seed)
    order = torch.randperm(len(x))
    trusted, train, test = order[:TRUSTED], order[TRUSTED : TRUSTED + TRAIN], order[TRUSTED + TRAIN :]
    given, is_wrong = mislabelled(y[train], 10, noise)
    return World(
        x=x[train],
        given=given,
        right=y[train],
        is_wrong=is_wrong,
        test=(x[test], y[test]),
        trusted=(x[trusted], y[trusted]),
        start=make(),
        batches=[torch.randperm(TRAIN)[:BATCH] for _ in range(steps)],
        trusted_batches=[torch.arange(TRUSTED)] * 200,
        every=10,
    )


def main(quick: bool) -> None:
    seeds, steps = (1, 20) if quick else (5, 250)
    models = dict(list(MODELS.items())[:1]) if quick else MODELS
    worlds = {name: partial(make_world, make, steps) for name, make in models.items()}
    compared(worlds, NOISE[1:2] if quick else NOISE, seeds, None if quick else "quality-online.json")
