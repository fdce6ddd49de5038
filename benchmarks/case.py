"""One thing to measure, on a CPU or a GPU: an op at a shape, its minimal work, and what it is compared with."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor

# ASSAY_GPU_TESTS_ON=cpu runs every line at toy sizes on the CPU; what it prints are no measurements.
REHEARSAL = os.environ.get("ASSAY_GPU_TESTS_ON") == "cpu"
DEVICE = torch.device("cpu" if REHEARSAL else "cuda")

T = TypeVar("T")


def here(full: T, rehearsal: T) -> T:
    """What a GPU gets, or what a rehearsal has time for."""
    return rehearsal if REHEARSAL else full


@dataclass(frozen=True)
class Target:
    """DESIGN's contract for a case: at least ``limit`` of the read ceiling, or at most ``limit`` × the GEMMs' time."""

    of: str  # "read" or "gemm"
    limit: float

    def verdict(self, fraction: float, ratios: Mapping[str, float]) -> tuple[str, bool]:
        """What is wanted and found, and whether it is met. ``ratios``: each rival's time ÷ the op's."""
        if self.of == "read":
            return f"≥ {self.limit:.0%} of the read ceiling, {fraction:.1%}", fraction >= self.limit
        if "gemm" not in ratios:
            return f"≤ {self.limit:.2f} × the GEMMs, which did not run", False
        slower = 1 / ratios["gemm"]
        return f"≤ {self.limit:.2f} × the GEMMs, {slower:.2f}", slower <= self.limit


@dataclass(frozen=True)
class Case:
    """``run`` and every rival take what ``make`` returns."""

    op: str
    shape: str
    dtype: torch.dtype
    bytes: int  # that must be read and written at least
    flops: int  # that must be done at least; for memory-bound ops a nominal count, to place them on the roofline
    bound: str  # "read" or "gemm"
    make: Callable[[], tuple[Any, ...]]
    run: Callable[..., Any]
    rivals: Mapping[str, Callable[..., Any]] = field(default_factory=dict)  # "gemm", "ceiling", "eager", peers by name
    to_compile: Callable[..., Any] | None = None  # for the comparison with torch.compile
    # On the CPU, whose ceilings are calls beside the op: what the rival "ceiling" is; rounds, the first ones uncounted;
    # and peers that are not there, with the reason.
    ceiling: str = ""
    rounds: int = 15
    warmup: int = 2
    absent: Mapping[str, str] = field(default_factory=dict)
    # On a GPU:
    target: Target | None = None
    logits_bytes: int = 0  # of logits that the op must not store: its memory stays under 1 % of them

    @property
    def name(self) -> str:
        return f"{self.op} {self.shape} {dtype_name(self.dtype)}"


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def tensor_bytes(value: Any) -> int:
    """Of all tensors in nested tuples and lists."""
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    return sum(tensor_bytes(v) for v in value) if isinstance(value, (tuple, list)) else 0
