"""Sketches: random projections that keep inner products, generated where they are needed and never stored whole."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from assay.ops.philox import make_key, philox4x32

OUTPUT_SIDE, INPUT_SIDE = 0, 1
_BITS = 128  # of one Philox block


@dataclass(frozen=True)
class Kronecker:
    """Projects a gradient matrix Σ_t G_tᵀ A_t (O, I) from both sides: P_out (Σ_t G_tᵀ A_t) P_inᵀ, (rows, cols).

    P_out is (rows, O) with entries ±1/√rows, P_in is (cols, I) with entries ±1/√cols, so that
    E⟨s(x), s(y)⟩ = ⟨x, y⟩ (LoGra, 2405.13954, with random instead of learnt factors). Only the two factors of the
    gradient are projected; no matrix of the gradient's size, nor of size O·I × rows·cols, exists.

    The sign of entry (r, c) is bit r mod 32 of word ⌊r/32⌋ mod 4 of the Philox4x32-10 block at counter
    (c mod 2³², ⌊c/2³²⌋, ⌊r/128⌋, side), side 0 for P_out and 1 for P_in, under the key of (seed, name); a 1 is −1.

    Args:
        rows, cols: size of the sketch on the output and on the input side.
        seed: a 64-bit integer.
        name: of the layer that is sketched; layers of different names get independent projections.
    """

    rows: int
    cols: int
    seed: int = 0
    name: str = ""

    def __post_init__(self) -> None:
        for field in ("rows", "cols"):
            if getattr(self, field) < 1:
                raise ValueError(f"Kronecker: {field} must be at least 1, got {getattr(self, field)}")
        make_key(self.seed, self.name)

    @property
    def dim(self) -> int:
        """Numbers per sample and layer: rows · cols."""
        return self.rows * self.cols

    @property
    def key(self) -> tuple[int, int]:
        """The Philox key of (seed, name)."""
        return make_key(self.seed, self.name)

    def named(self, name: str) -> Kronecker:
        """The same sketch for the layer called ``name``."""
        return replace(self, name=name)

    def output_side(self, features: int, device: torch.device | None = None) -> Tensor:
        """P_out, (rows, features) float32."""
        return signs(self.rows, features, OUTPUT_SIDE, self.key, device)

    def input_side(self, features: int, device: torch.device | None = None) -> Tensor:
        """P_in, (cols, features) float32."""
        return signs(self.cols, features, INPUT_SIDE, self.key, device)


def signs(size: int, features: int, side: int, key: tuple[int, int], device: torch.device | None = None) -> Tensor:
    """One side of a Kronecker sketch under its key: (size, features) float32 with entries ±1/√size."""
    c = torch.arange(features, device=device)
    low, high, sides = c & 0xFFFFFFFF, c >> 32, torch.full_like(c, side)
    out = torch.empty(size, features, device=device)
    for row in range(size):
        if row % _BITS == 0:
            words = philox4x32((low, high, torch.full_like(c, row // _BITS), sides), key).unbind(-1)
        out[row] = 1 - 2 * (words[row % _BITS // 32] >> row % 32 & 1)
    return out.div_(math.sqrt(size))
