"""What a kernel's longest innermost loop holds in machine code, under one version of Triton and beside another's.

Triton 3.6 has pipelined loads that 3.9 does not: the same source, an inner loop of twice the instructions.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, astuple, dataclass, fields
from typing import Any

from tests.kernels import sass

# Copies to shared memory, and reads of it, per turn of a loop: how many times the other version's, and how many at
# least, is another layout and no matter of scheduling.
FACTOR, LEAST = 4, 24


@dataclass(frozen=True)
class Loop:
    """Instructions per turn: all of them, copies to shared memory, reads of it, branches."""

    all: int
    LDGSTS: int
    LDS: int
    BRA: int


def longest(cubin: bytes) -> Loop:
    """Of a compiled kernel; all 0 where it has no loop."""
    return in_listing(sass.disassemble(cubin))


def in_listing(text: str) -> Loop:
    """nvdisasm's."""
    body = max(sass.parse(text).innermost(), key=Counter.total, default=Counter())
    return Loop(body.total(), *(body[f.name] for f in fields(Loop)[1:]))


def to_json(counts: Mapping[str, Loop], version: str) -> dict[str, Any]:
    return {"triton": version, "loops": {kernel: asdict(inner) for kernel, inner in counts.items()}}


def from_json(document: Mapping[str, Any]) -> tuple[dict[str, Loop], str]:
    return {kernel: Loop(**inner) for kernel, inner in document["loops"].items()}, document["triton"]


def render(here: Mapping[str, Loop], version: str, there: Mapping[str, Loop], other: str) -> str:
    """A line per kernel and target, both versions' columns."""
    names = [field.name for field in fields(Loop)]
    rows = [["inner loop, instructions per turn", *(f"{name} {v}" for v in (version, other) for name in names)]]
    both = sorted(here.keys() & there.keys())
    rows += [[kernel, *map(str, astuple(here[kernel]) + astuple(there[kernel]))] for kernel in both]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    first, *rest = widths
    lines = [[row[0].ljust(first), *(c.rjust(w) for c, w in zip(row[1:], rest, strict=True))] for row in rows]
    return "\n".join(map("  ".join, lines))


def differences(here: Mapping[str, Loop], version: str, there: Mapping[str, Loop], other: str) -> Sequence[str]:
    """One line for each loop that one of the versions fills with copies to shared memory or reads of it."""
    found = []
    for kernel in sorted(here.keys() & there.keys()):
        for name in ("LDGSTS", "LDS"):
            counts = getattr(here[kernel], name), getattr(there[kernel], name)
            if max(counts) >= max(LEAST, FACTOR * min(counts)):
                found.append(
                    f"{kernel}: {counts[0]} {name} per turn of its loop with Triton {version}, {counts[1]} with "
                    f"{other}; expected about the same: a load is pipelined in a layout that copies it to every thread"
                )
    return found
