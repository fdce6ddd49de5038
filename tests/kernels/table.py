"""What the compilers report about each kernel, as rows of one table."""

from __future__ import annotations

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
        f"{r.kernel} for {r.target}: {r.spill_bytes} bytes spilled, {r.stack_bytes} bytes of stack; expected 0 and 0 "
        "in a hot kernel: make its tile smaller or its warps more"
        for r in rows
        if r.hot and (r.spill_bytes or r.stack_bytes)
    ]
    return spilling + [
        f"{r.kernel} for {r.target}: {r.lopsided} sums between threads fuse a product on one side only, and the "
        "threads that share a row hold different bits of it; expected 0: sum along each thread's own numbers first"
        for r in rows
        if r.lopsided
    ]
