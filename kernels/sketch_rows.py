"""What grad_sketch's kernels share: rows of a factor times a thin matrix of signs, exact in every type."""

from __future__ import annotations

import triton
import triton.language as tl

from assay.kernels.folding import fold, unfolded


@triton.jit
def split_words(x):
    """A float32 as three numbers that bfloat16 holds and that add up to it, cut off and not rounded: nothing overflows.

    An infinity is all in the first.
    """
    first = (x.to(tl.int32, bitcast=True) & -65536).to(tl.float32, bitcast=True)
    rest = tl.where(x == first, 0.0, x - first)
    second = (rest.to(tl.int32, bitcast=True) & -65536).to(tl.float32, bitcast=True)
    return first, second, rest - second


@triton.jit
def thin_product(
    at,  # (M,) pointers to rows
    signs,
    size,
    signs_row,
    begin,
    end,
    n,  # (SIDE,): rows of the signs
    BLOCK_K: tl.constexpr,
    EVEN: tl.constexpr,
    WIDEN: tl.constexpr,
    STAGES: tl.constexpr,
    FOLD: tl.constexpr,  # features of a tensor cores' sum, where there are more; or 0
):
    """(M, SIDE) float32: the rows times the signs, over the features from ``begin`` to ``end``."""
    SPLIT: tl.constexpr = at.dtype.element_ty == tl.float32
    k = tl.arange(0, BLOCK_K)
    total = tl.zeros((at.shape[0], n.shape[0]), tl.float32)
    part = tl.zeros((at.shape[0], n.shape[0]), tl.float32)
    low = tl.zeros((at.shape[0], n.shape[0]), tl.float32)
    for k0 in tl.range(begin, end, BLOCK_K, num_stages=STAGES):
        if EVEN:
            x = tl.load(at[:, None] + (k0 + k)[None, :])
        else:
            x = tl.load(at[:, None] + (k0 + k)[None, :], mask=(k0 + k < size)[None, :], other=0.0)
        sign = tl.trans(tl.load(signs + n.to(tl.int64)[:, None] * signs_row + (k0 + k)[None, :]))
        if WIDEN:
            sign = sign.to(tl.float32)
        if SPLIT:
            first, second, third = split_words(x)
            part = tl.dot(first.to(sign.dtype), sign, part, input_precision="ieee")
            low = tl.dot(second.to(sign.dtype), sign, low, input_precision="ieee")
            low = tl.dot(third.to(sign.dtype), sign, low, input_precision="ieee")
        else:
            part = tl.dot(x.to(sign.dtype), sign, part, input_precision="ieee")
        total, part = fold(total, part, k0 + BLOCK_K - begin, FOLD)
    total = unfolded(total, part, FOLD)
    return total + low if SPLIT else total
