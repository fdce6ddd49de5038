"""The emoji of four vendors with their categories as classes, and a small convolutional network."""

from __future__ import annotations

from functools import partial

import torch

from benchmarks.quality.online.classification import BATCH, NOISE, World, compared, mislabelled
from benchmarks.quality.online.pictures import Pictures, cnn, parts

TRUSTED, TRAIN, TEST = 0.1, 0.5, 0.15  # shares of the emoji


def make_world(pictures: Pictures, steps: int, noise: float, seed: int) -> World:
    torch.manual_seed(seed)
    trusted, train, test = (pictures.of(part) for part in parts(pictures, [TRUSTED, TRAIN, TEST])[:3])
    x, y, classes = pictures.pixels, pictures.categories, int(pictures.categories.max()) + 1
    given, is_wrong = mislabelled(y[train], classes, noise)
    return World(
        x=x[train],
        given=given,
        right=y[train],
        is_wrong=is_wrong,
        test=(x[test], y[test]),
        trusted=(x[trusted], y[trusted]),
        start=cnn(classes),
        batches=in_epochs(len(train), steps),
        trusted_batches=in_epochs(len(trusted), steps),
        every=8,
    )


def in_epochs(count: int, steps: int) -> list[torch.Tensor]:
    """So many batches of rows, each row once before any comes again (but for what an epoch's last batch lacks)."""
    batches: list[torch.Tensor] = []
    size = min(BATCH, count)
    while len(batches) < steps:
        batches += torch.randperm(count)[: count // size * size].view(-1, size)
    return batches[:steps]


def main(pictures: Pictures, quick: bool) -> None:
    seeds, steps = (1, 8) if quick else (5, 112)
    worlds = {"small CNN": partial(make_world, pictures, steps)}
    compared(worlds, NOISE[1:2] if quick else NOISE, seeds, None if quick else "quality-online-emoji.json")
