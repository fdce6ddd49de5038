"""Tensors fenced by NaN, on the device that runs the kernels here: the GPU, or the CPU under Triton's interpreter."""

from __future__ import annotations

import torch
from torch import Tensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
GAPS = [3, 16]  # between rows: ragged ones, aligned ones
MARGIN = 4096


def fenced(x: Tensor, gap: int) -> Tensor:
    """A copy of ``x`` with NaN before, after, and ``gap`` elements of it behind every row.

    A gap that is a multiple of 16 keeps rows aligned. Under the interpreter an out-of-bounds read is silent garbage;
    here it shows.
    """
    shape = (*x.shape[:-1], x.shape[-1] + gap)
    size = torch.Size(shape).numel()
    buffer = torch.full((MARGIN + size + MARGIN,), torch.nan, dtype=x.dtype, device=DEVICE)
    view = buffer[MARGIN : MARGIN + size].view(shape)[..., : x.shape[-1]]
    view.copy_(x)
    return view


def fence_intact(view: Tensor) -> bool:
    """Whether a dense tensor from ``fenced(x, 0)`` still has its NaN around it."""
    buffer = torch.empty(0, dtype=view.dtype, device=view.device).set_(view.untyped_storage())
    return bool(buffer[:MARGIN].isnan().all() and buffer[-MARGIN:].isnan().all())


def far_apart(*tensors: Tensor) -> list[Tensor]:
    """Copies whose first dimension, of up to three, lies 2³⁰ elements apart: 32-bit offsets would wrap on the third.

    All in one storage, whose pages take no memory where nothing touches them; of one dtype, up to 2¹¹ elements each.
    """
    storage = torch.empty(2**31 + 2**11 * len(tensors), dtype=tensors[0].dtype, device=DEVICE)
    dense = [x[0].contiguous().stride() for x in tensors]
    places = [storage.as_strided(x.shape, (2**30, *dense[i]), 2**11 * i) for i, x in enumerate(tensors)]
    for place, x in zip(places, tensors, strict=True):
        place.copy_(x)
    return places
