"""The machine code of a compiled kernel, counted: what one turn of its loops issues."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter

from tests.kernels.aot import CUOBJDUMP, Case, compiled

_SPIN = 16  # instructions, of 16 bytes each
_LINE = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)(.*)")


def disassembled(case: Case, cc: int) -> list[tuple[int, str, str]]:
    """(address, operation, operands) of every instruction of ``case`` for compute capability ``cc``."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled(case, cc).asm["cubin"])
        cubin.flush()
        text = subprocess.run([CUOBJDUMP, "-sass", cubin.name], check=True, capture_output=True, text=True).stdout
    return [(int(m[1], 16), m[2], m[3]) for m in map(_LINE.search, text.splitlines()) if m]


def loops(code: list[tuple[int, str, str]]) -> list[Counter[str]]:
    """What each innermost loop holds, by operation without its modifiers, in the order of addresses.

    A loop is what lies between a branch backwards and its target, if it is longer than a wait for a barrier.
    """
    spans = []
    for address, name, operands in code:
        target = re.search(r"\b0x([0-9a-f]+)\b", operands) if name.startswith("BRA") else None
        if target and int(target[1], 16) < address - 16 * _SPIN:
            spans.append((int(target[1], 16), address))
    inner = [s for s in spans if not any(t != s and s[0] <= t[0] and t[1] <= s[1] for t in spans)]
    return [
        Counter(name.split(".")[0] for address, name, _ in code if begin <= address <= end)
        for begin, end in sorted(inner)
    ]
