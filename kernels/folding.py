"""Long sums on tensor cores, cut into short ones.

Tensor cores truncate their float32 sums, once every 16 terms (8 of TF32): a sum of n positive terms comes out about
n/16 · 2⁻²⁵ too small, where sums that are rounded err either way. Of FOLD terms that is a millionth; longer ones add
such sums up in a second accumulator, which rounds, or are sliced between programs (kernels/dot.py).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

FOLD = 512  # a multiple of every tile's step
# Of factors whose products are squared, which doubles the error. An H200 makes a norm of folds of n terms 3.3e-9 n too
# small in bfloat16 and 6.8e-9 n in float16, whose products have bits below the sum's: both stay under 1.7e-6.
FOLDS = {torch.bfloat16: 512, torch.float16: 192}


@triton.jit
def fold(total, part, done, FOLD: tl.constexpr):
    """``part`` added to ``total`` and begun anew, if ``done`` terms are whole folds; never where FOLD is 0."""
    if FOLD > 0:
        due = done % FOLD == 0
        if due:
            total += part
            part = tl.zeros_like(part)
    return total, part


@triton.jit
def unfolded(total, part, FOLD: tl.constexpr):
    """The whole sum."""
    if FOLD > 0:
        part += total
    return part
