"""Partial sums of slices and tiles, added up: in float64, and in one order whatever else is in the batch."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from assay.kernels._common import Launch, ceil_div

BLOCK, STEP = 128, 32  # sums of a program, and slices that it reads at a time
WARPS = 4
SAMPLE_BLOCK = 2048  # numbers that a program reads at a time, of one sample or of several
# Of a sample: more of them than this are added up over their slices first, by more programs than there are samples.
LONG_SAMPLE = 8 * SAMPLE_BLOCK


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
    """out (count,) float32 or float64 = Σ_s partial (slices, count) float32, in float64 until then."""
    i, total = _totals(partial, count, slices, BLOCK, STEP)
    tl.store(out + i, total.to(out.dtype.element_ty), mask=i < count)


@triton.jit(do_not_specialize=["samples", "slices"])
def _total_samples(partial, out, samples, size, slices, SAMPLES: tl.constexpr, BLOCK: tl.constexpr):
    """out (samples,) float32 = the sums of partial (slices, samples, size) per sample, in float64 until then."""
    b = tl.program_id(0).to(tl.int64) * SAMPLES + tl.arange(0, SAMPLES)
    total = tl.zeros((SAMPLES, BLOCK), tl.float64)
    for j0 in range(0, slices * size, BLOCK):
        j = j0 + tl.arange(0, BLOCK)
        at = (j // size).to(tl.int64) * samples * size + j % size
        mask = (b < samples)[:, None] & (j < slices * size)[None, :]
        total += tl.load(partial + (b * size)[:, None] + at[None, :], mask=mask, other=0.0).to(tl.float64)
    tl.store(out + b, tl.sum(total, axis=1).to(tl.float32), mask=b < samples)


def plan_total(partial: Tensor, out: Tensor) -> Launch:
    """out (...) float32 or float64, contiguous, = the sum of partial (slices, ...) float32 over its slices."""
    return Launch(_total_slices, *_over_slices(partial, out, "out"), WARPS, 1)


def plan_sum(partial: Tensor, sums: Tensor) -> Launch:
    """sums (...) float64, contiguous, += the sum of partial (slices, ...) float32 over its slices."""
    return Launch(_add_slices, *_over_slices(partial, sums, "sums"), WARPS, 1)


def plan_samples(partial: Tensor, out: Tensor) -> list[Launch]:
    """out (B,) float32 = each sample's part of partial (..., B * size) float32 or float64, contiguous, added up."""
    samples = len(out)
    size = partial.shape[-1] // samples
    slices = partial.numel() // (samples * size)
    if slices > 1 and slices * size > LONG_SAMPLE:
        rows = partial.new_empty(samples * size, dtype=torch.float64)
        return [plan_total(partial.view(slices, -1), rows), *plan_samples(rows, out)]
    block = min(SAMPLE_BLOCK, triton.next_power_of_2(slices * size))
    arguments = {
        "partial": partial,
        "out": out,
        "samples": samples,
        "size": size,
        "slices": slices,
        "SAMPLES": SAMPLE_BLOCK // block,
        "BLOCK": block,
    }
    return [Launch(_total_samples, (ceil_div(samples, SAMPLE_BLOCK // block),), arguments, WARPS, 1)]


def _over_slices(partial: Tensor, result: Tensor, name: str) -> tuple[tuple[int], dict[str, Any]]:
    count = result.numel()
    arguments = {"partial": partial, name: result, "count": count, "slices": len(partial), "BLOCK": BLOCK, "STEP": STEP}
    return (ceil_div(count, BLOCK),), arguments
