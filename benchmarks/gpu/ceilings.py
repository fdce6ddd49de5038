"""What this card reaches, measured in the same run: copy, read-only sum, GEMM in each dtype."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.case import DEVICE, REHEARSAL, dtype_name, here
from benchmarks.gpu.stopwatch import Replay, interleave

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
ELEMENTS = here(1 << 29, 1 << 16)  # 2 GiB of float32
SIDE = here(8192, 128)


@dataclass(frozen=True)
class Ceilings:
    read: float  # GB/s, the best of several read-only sums
    copy: float  # GB/s, bytes read plus bytes written
    gemm: dict[str, float]  # TFLOP/s by dtype; float32 without TF32
    readers: dict[str, float]  # GB/s of each sum that was tried


def measure() -> Ceilings:
    source = torch.randn(ELEMENTS, device=DEVICE)
    goal = torch.empty_like(source)
    size = source.numel() * source.element_size()
    readers = {"torch.sum": lambda: source.sum(), **_triton_readers(source)}
    times = _medians({"copy": lambda: goal.copy_(source), **readers})
    gemm = {}
    for dtype in DTYPES:
        a, b = (torch.randn(SIDE, SIDE, device=DEVICE).to(dtype) for _ in range(2))
        ms = _medians({"gemm": lambda a=a, b=b: a @ b})["gemm"]
        gemm[dtype_name(dtype)] = 2 * SIDE**3 / ms / 1e9
    rates = {name: size / times[name] / 1e6 for name in readers}
    return Ceilings(max(rates.values()), 2 * size / times["copy"] / 1e6, gemm, rates)


def _medians(calls: dict[str, Callable[[], Any]]) -> dict[str, float]:
    pool = None if REHEARSAL else torch.cuda.graph_pool_handle()
    timings, _ = interleave({name: Replay([call], pool) for name, call in calls.items()}, seconds=0.25)
    return {name: t.median for name, t in timings.items()}


def _triton_readers(source: Tensor) -> dict[str, Callable[[], Any]]:
    if REHEARSAL:
        return {}
    from benchmarks.gpu.read_sum import read_sum_kernel

    readers = {}
    for programs, block, warps in ((1 << 12, 4096, 8), (1 << 14, 8192, 8), (1 << 15, 2048, 4)):
        partial = torch.empty(programs, device=DEVICE)

        def run(programs: int = programs, block: int = block, warps: int = warps, partial: Tensor = partial) -> None:
            each = source.numel() // programs
            read_sum_kernel[(programs,)](source, partial, each, BLOCK=block, num_warps=warps)

        readers[f"triton {programs} × {block}"] = run
    return readers
