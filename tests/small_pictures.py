"""Pictures for tests that no package has to be fetched for."""

from __future__ import annotations

import torch

from benchmarks.quality.online.pictures import SIDE, Pictures


def make_patches(count: int, text: str) -> Pictures:
    """Two renderings each of so many patches of noise, whose colour is their category. ``text`` names a patch by its
    ``{colour}`` and its number ``{i}``."""
    emoji = torch.arange(2 * count) // 2
    pixels = torch.rand(2 * count, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0)) - 0.5
    pixels[torch.arange(2 * count), emoji % 3] += 0.4
    texts = [text.format(colour=("red", "green", "blue")[i % 3], i=i) for i in range(count)]
    return Pictures(pixels, emoji, emoji % 3, texts)
