"""Counts of a kernel's machine code: what a tile costs beside its product, instruction by instruction."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import triton

NVDISASM = Path(triton.__file__).parent / "backends/nvidia/bin/nvdisasm"
MATRIX = ("HGMMA", "HMMA", "UTCHMMA", "UTCQMMA", "FFMA2")  # what a product's loop is known by
_LINE = re.compile(r"/\*[0-9a-f]+\*/\s+(?:@(!?U?P\w+)\s+)?([A-Z0-9_.]+)\s*(.*?);")
_LABEL = re.compile(r"^(\.L_x_\d+):")


@dataclass(frozen=True)
class Instruction:
    opcode: str  # "FADD.FTZ"
    predicate: str | None
    operands: str

    @property
    def name(self) -> str:
        return self.opcode.partition(".")[0]


@dataclass(frozen=True)
class Code:
    instructions: Sequence[Instruction]
    targets: dict[int, int]  # from a branch to where it goes

    def loops(self) -> list[range]:
        """Of every branch backwards, innermost first."""
        found = [range(to, at + 1) for at, to in self.targets.items() if to <= at]
        return sorted(found, key=len)

    def product_loops(self, matrix: Sequence[str] = MATRIX) -> list[range]:
        """Loops that multiply and share nothing with a smaller one that does."""
        found: list[range] = []
        for loop in self.loops():
            multiplies = any(self.instructions[i].name in matrix for i in loop)
            if multiplies and not any(set(other) & set(loop) for other in found):
                found.append(loop)
        return found

    def tile_loop(self, matrix: Sequence[str] = MATRIX) -> range:
        """The smallest loop around the first product's."""
        first = self.product_loops(matrix)[0]
        return next(loop for loop in self.loops() if within(first, loop) and loop != first)

    def guarded(self, loop: range, matrix: Sequence[str] = MATRIX) -> set[int]:
        """What branches within the loop jump over, unless it multiplies: the work of a label's tile, or of the last."""
        skipped: set[int] = set()
        products = set().union(*self.product_loops(matrix))
        for at in loop:
            span = range(at + 1, self.targets.get(at, at))
            if within(span, loop) and not products & set(span):
                skipped |= set(span)
        return skipped

    def epilogue(self, matrix: Sequence[str] = MATRIX) -> list[Instruction]:
        """The tile loop without its products' loops and without what only a label's tile runs."""
        tile = self.tile_loop(matrix)
        without = self.guarded(tile, matrix).union(*map(set, self.product_loops(matrix)))
        return [self.instructions[i] for i in tile if i not in without]


def within(inner: range, outer: range) -> bool:
    return outer.start <= inner.start and inner.stop <= outer.stop


def parse(text: str) -> Code:
    """nvdisasm's listing of one kernel."""
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    for line in text.splitlines():
        if label := _LABEL.match(line.strip()):
            labels[label[1]] = len(instructions)
        elif found := _LINE.search(line):
            instructions.append(Instruction(found[2], found[1], found[3]))
    targets = {}
    for i, instruction in enumerate(instructions):
        to = re.search(r"\.L_x_\d+", instruction.operands)
        if instruction.name == "BRA" and to:
            targets[i] = labels[to[0]]
    return Code(instructions, targets)


def disassemble(cubin: bytes) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([NVDISASM, "-c", file.name], check=True, capture_output=True, text=True).stdout


def per_logit(code: Code, logits: int, threads: int) -> float:
    return len(code.epilogue()) * threads / logits


def histogram(instructions: Sequence[Instruction]) -> str:
    return " ".join(f"{name}:{count}" for name, count in Counter(i.name for i in instructions).most_common(14))
