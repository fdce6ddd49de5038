"""What the compilers report about each kernel, as rows of one table."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import astuple, dataclass, fields


@dataclass(frozen=True)
class Row:
    """One kernel compiled for one target. ``hot`` kernels must keep everything in registers and shared memory."""

    kernel: str
    target: str  # "sm_90"
    registers: int  # per thread
    spill_bytes: int  # per thread, registers kept in local memory
    stack_bytes: int  # per thread, the stack frame (spilled registers are part of it)
    shared_bytes: int  # per block
    hot: bool
    lopsided: int = 0  # sums between threads that leave them with different bits (butterfly.py)


@dataclass(frozen=True)
class Worth:
    """Kernels that may spill: a card has measured it to be worth it, or no loop over data holds a spilled number."""

    kernel: str  # what their names match
    target: str
    bytes: int  # spilled by none more, with any Triton
    why: str  # shares of time are of an H200, benchmarks/results/gpu/second/tune.jsonl


WORTH = (
    Worth(r"head\.sweep .*direction\+sketch(16|32)$", "sm_90", 56, "0.73 of the time of 128×64, which spills nothing"),
    # Triton 3.9's spill alone: the card ran 3.6's code, of which none is spilled.
    Worth(r"head\.sweep .*unbiased", "sm_90", 72, "128×128 takes 1.02 to 1.03 of the time of 128×256"),
    Worth(r"head\.mix .*mixture of three$", "sm_90", 96, "0.77 of 128×64's time, measured with two models"),
    Worth(
        r"ensemble_kernel<(bf16|f16|float), (once|kept|twice|twice_global), ",
        "sm_100",
        36,
        "the row's number and the like: stored once, read at a row's beginning and end, by SASS in no loop over logits",
    ),
)


def allowed(row: Row) -> int:
    """Bytes that a hot kernel may spill."""
    return max((w.bytes for w in WORTH if w.target == row.target and re.match(w.kernel, row.kernel)), default=0)


def render(rows: Sequence[Row]) -> str:
    """An aligned table, names to the left and numbers to the right."""
    head = tuple(f.name.removesuffix("_bytes") for f in fields(Row))
    cells = [head, *(tuple("hot" if v is True else "" if v is False else str(v) for v in astuple(r)) for r in rows)]
    widths = [max(len(line[c]) for line in cells) for c in range(len(head))]
    left = {"kernel", "target", "hot"}
    lines = []
    for line in cells:
        padded = [f"{v:<{w}}" if h in left else f"{v:>{w}}" for v, w, h in zip(line, widths, head, strict=True)]
        lines.append("  ".join(padded).rstrip())
    return "\n".join(lines)


def check(rows: Sequence[Row]) -> list[str]:
    """A line for each hot kernel that spills or has a stack frame, each whose threads differ; none if all is well."""
    spilling = [
        f"{r.kernel} for {r.target}: {r.spill_bytes} bytes spilled, {r.stack_bytes} bytes of stack; expected "
        f"{allowed(r)} at most in a hot kernel: make its tile smaller or its warps more"
        for r in rows
        if r.hot and max(r.spill_bytes, r.stack_bytes) > allowed(r)
    ]
    return spilling + [
        f"{r.kernel} for {r.target}: {r.lopsided} sums between threads fuse a product on one side only, and the "
        "threads that share a row hold different bits of it; expected 0: sum along each thread's own numbers first"
        for r in rows
        if r.lopsided
    ]
