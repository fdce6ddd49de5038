"""A random subset of features: the features of a ``Mask``, taken out of a tensor."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from assay.ops import _backend, _native
from assay.ops.philox import philox4x32
from assay.ops.sketch import cached

# Features whose random words are drawn at a time.
CHUNK = 1 << 20

Draw = Callable[[int, int, int, tuple[int, int], torch.device], Tensor]


def keep(x: Tensor, count: int, side: int, key: tuple[int, int]) -> Tensor:
    """(..., features) -> (..., count): the features that a Mask keeps, or ``x`` if it has no more than that."""
    if x.shape[-1] <= count:
        return x
    out: Tensor = _keep(x, count, side, key)
    return out


def mask_scale(features: int, count: int) -> float:
    """What makes inner products of kept features unbiased."""
    return math.sqrt(features / count) if features > count else 1.0


def smallest(count: int, features: int, side: int, key: tuple[int, int], device: torch.device, draw: Draw) -> Tensor:
    """The ``count`` features with the smallest words, ties to the lower index, in the order of their indices."""
    words, indices = torch.empty(0, dtype=torch.int64, device=device), torch.empty(0, dtype=torch.int64, device=device)
    for first in range(0, features, CHUNK):
        n = min(CHUNK, features - first)
        drawn, at = draw(first, n, side, key, device), torch.arange(first, first + n, device=device)
        if len(words) == count:  # later features only enter with words below the largest that is kept
            enters = drawn < words[-1]
            drawn, at = drawn[enters], at[enters]
        words, order = torch.cat([words, drawn]).sort(stable=True)
        words, indices = words[:count], torch.cat([indices, at])[order[:count]]
    return indices.sort().values


def _draw_reference(first: int, n: int, side: int, key: tuple[int, int], device: torch.device) -> Tensor:
    c = torch.arange(first, first + n, device=device)
    return philox4x32((c & 0xFFFFFFFF, c >> 32, torch.zeros_like(c), torch.full_like(c, side)), key)[..., 0]


def _draw_native(first: int, n: int, side: int, key: tuple[int, int], device: torch.device) -> Tensor:
    return _native.philox(key, first, n, 0, side)[:, 0].long() & 0xFFFFFFFF


def _select(draw: Draw, x: Tensor, count: int, side: int, key: Sequence[int]) -> Tensor:
    keys, features = (key[0], key[1]), x.shape[-1]
    kept = cached(
        ("mask", keys, side, count, features, draw),
        x.device,
        lambda: smallest(count, features, side, keys, x.device, draw),
    )
    return x.index_select(-1, kept)


@_backend.op("keep", reference=partial(_select, _draw_reference), cpu=partial(_select, _draw_native))
def _keep(x: Tensor, count: int, side: int, key: Sequence[int]) -> Tensor:
    return x.new_empty(*x.shape[:-1], count)
