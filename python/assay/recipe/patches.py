"""Images as SigLIP 2 takes them in sizes of their own (NaFlex): rows of patches, filled up to one number of them."""

from __future__ import annotations

import math

import torch
from torch import Tensor

_MOST_SCALE, _PRECISION = 100.0, 1e-5  # transformers' own


def patched_size(height: int, width: int, patch: int, most: int) -> tuple[int, int]:
    """(H, W) in whole patches: about the largest, at the image's ratio, that has at most so many of them; the scale is
    searched for by halving, step for step as transformers does, so that ties fall alike."""

    def scaled(size: int, scale: float) -> int:
        return max(patch, math.ceil(size * scale / patch) * patch)

    low, high = _PRECISION / 10, _MOST_SCALE
    while high - low >= _PRECISION:
        scale = (low + high) / 2
        if (scaled(height, scale) / patch) * (scaled(width, scale) / patch) <= most:
            low = scale
        else:
            high = scale
    return scaled(height, low), scaled(width, low)


def patches(images: list[Tensor], patch: int, most: int) -> dict[str, Tensor]:
    """Images (C, H, W) of whole patches to ``pixel_values`` (B, most, patch · patch · C), ``pixel_attention_mask``
    (B, most), 0 where an image has no patch, and ``spatial_shapes`` (B, 2), its patches down and across."""
    rows = torch.zeros(len(images), most, patch * patch * len(images[0]))
    mask = torch.zeros(len(images), most, dtype=torch.int64)
    shapes = torch.tensor([[image.shape[1] // patch, image.shape[2] // patch] for image in images])
    for i, (image, (down, across)) in enumerate(zip(images, shapes.tolist(), strict=True)):
        tiles = image.reshape(len(image), down, patch, across, patch)
        rows[i, : down * across] = tiles.permute(1, 3, 2, 4, 0).reshape(down * across, -1)
        mask[i, : down * across] = 1
    return {"pixel_values": rows, "pixel_attention_mask": mask, "spatial_shapes": shapes}
