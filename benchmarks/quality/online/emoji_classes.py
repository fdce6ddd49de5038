"""The emoji of four vendors with their categories as classes, and a small convolutional network."""

from __future__ import annotations

from functools import partial

import torch

from benchmarks.quality.online.classification import BATCH, NOISE, World, compared
from benchmarks.quality.online.pictures import Pictures, cnn, parts

TRUSTED, TRAIN = 0.1, 0.75  # shares of the emoji; the rest is tested on


def make_world(pictures: Pictures, steps: int, noise: float, seed: int) -> World:
    torch.manual_seed(seed)
    trusted, train, test = (pictures.of(part) for part in parts(pictures, [TRUSTED, TRAIN]))
    x, y, classes = pictures.pixels, pictures.categories, int(pictures.categories.max()) + 1
    is_wrong = torch.zeros(len(train), dtype=torch.bool)
    is_wrong[torch.randperm(len(train))[: int(noise * len(train))]] = True
    given = torch.where(is_wrong, (y[train] + torch.randint(1, classes, (len(train),))) % classes, y[train])
    return World(
        x=x[train],
        given=given,
        right=y[train],
        is_wrong=is_wrong,
        test=(x[test], y[test]),
        trusted=(x[trusted], y[trusted]),
        start=cnn(classes),
        batches=[torch.randperm(len(train))[:BATCH] for _ in range(steps)],
        trusted_batches=[torch.randperm(len(trusted))[:BATCH] for _ in range(steps)],
        every=8,
    )


def main(pictures: Pictures, quick: bool) -> None:
    seeds, steps = (1, 16) if quick else (5, 96)
    worlds = {"small CNN": partial(make_world, pictures, steps)}
    compared(worlds, NOISE[1:2] if quick else NOISE, seeds, None if quick else "quality-online-emoji.json")
