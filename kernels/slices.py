"""Partial sums of slices, added up: in float64, and in one order whatever else is in the batch."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from assay.kernels._common import Launch, ceil_div

BLOCK, STEP = 128, 32  # sums of a program, and slices that it reads at a time
WARPS = 4


@triton.jit
def _totals(partial, count, slices, BLOCK: tl.constexpr, STEP: tl.constexpr):
    """This program's part of ``count``, and Σ_s partial (slices, count) there, float64."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float64)
    for s0 in range(0, slices, STEP):
        s = s0 + tl.arange(0, STEP).to(tl.int64)
        mask = (s < slices)[:, None] & (i < count)[None, :]
        total += tl.sum(tl.load(partial + s[:, None] * count + i[None, :], mask=mask, other=0.0).to(tl.float64), axis=0)
    return i, total


@triton.jit(do_not_specialize=["slices"])
def _add_slices(partial, sums, count, slices, BLOCK: tl.constexpr, STEP: tl.constexpr):
    """sums (count,) float64 += Σ_s partial (slices, count) float32."""
    i, total = _totals(partial, count, slices, BLOCK, STEP)
    tl.store(sums + i, tl.load(sums + i, mask=i < count, other=0.0) + total, mask=i < count)


@triton.jit(do_not_specialize=["slices"])
def _total_slices(partial, out, count, slices, BLOCK: tl.constexpr, STEP: tl.constexpr):
    """out (count,) float32 = Σ_s partial (slices, count) float32, in float64 until then."""
    i, total = _totals(partial, count, slices, BLOCK, STEP)
    tl.store(out + i, total.to(tl.float32), mask=i < count)


def plan_total(partial: Tensor, out: Tensor) -> Launch:
    """out (...) float32, contiguous, = the sum of partial (slices, ...) float32 over its slices."""
    return Launch(_total_slices, *_over_slices(partial, out, "out"), WARPS, 1)


def plan_sum(partial: Tensor, sums: Tensor) -> Launch:
    """sums (...) float64, contiguous, += the sum of partial (slices, ...) float32 over its slices."""
    return Launch(_add_slices, *_over_slices(partial, sums, "sums"), WARPS, 1)


def _over_slices(partial: Tensor, result: Tensor, name: str) -> tuple[tuple[int], dict[str, Any]]:
    count = result.numel()
    arguments = {"partial": partial, name: result, "count": count, "slices": len(partial), "BLOCK": BLOCK, "STEP": STEP}
    return (ceil_div(count, BLOCK),), arguments
