"""Counts of a kernel's machine code: what a turn of its loops issues, and what a tile costs beside its product."""

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
MATRIX = ("HGMMA", "HMMA", "UTCHMMA", "UTCQMMA")  # a product's loop has one of these ...
LOADS = ("UTMALDG", "LDGSTS", "LDG")  # ... and one of these
_LINE = re.compile(r"/\*[0-9a-f]+\*/\s+(?:@(!?U?P\w+)\s+)?([A-Z0-9_.]+)\s*(.*?);")
_LABEL = re.compile(r"^(\.L_x_\d+):")
SPIN = 16  # instructions: a shorter loop waits for a barrier


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
        """Of every branch backwards but those out of code that lies behind the kernel's end; innermost first."""
        found = [range(to, at + 1) for at, to in self.targets.items() if to <= at]
        return sorted((loop for loop in found if not any(self._ends(i) for i in loop)), key=len)

    def _ends(self, i: int) -> bool:
        return self.instructions[i].name == "EXIT" and self.instructions[i].predicate is None

    def innermost(self) -> list[Counter[str]]:
        """What each loop without another in it holds, by name, in the order of addresses; not those that wait."""
        loops = [loop for loop in self.loops() if len(loop) > SPIN]
        inner = [loop for loop in loops if not any(other != loop and within(other, loop) for other in loops)]
        return [Counter(self.instructions[i].name for i in loop) for loop in sorted(inner, key=lambda loop: loop.start)]

    def product_loops(self) -> list[range]:
        """Loops that load and multiply, and share nothing with a smaller one that does."""
        found: list[range] = []
        for loop in self.loops():
            names = {self.instructions[i].name for i in loop}
            product = names.intersection(MATRIX) and names.intersection(LOADS)
            if product and not any(set(other) & set(loop) for other in found):
                found.append(loop)
        return found

    def around(self, inner: range) -> range:
        """The smallest loop with this one and more in it."""
        return next(loop for loop in self.loops() if within(inner, loop) and len(loop) > len(inner))

    def guarded(self, loop: range) -> set[int]:
        """What branches within the loop jump over, unless it is a product: a label's work, or the last tile's."""
        skipped: set[int] = set()
        products = set().union(*self.product_loops())
        for at in loop:
            span = range(at + 1, self.targets.get(at, at))
            if within(span, loop) and not products & set(span):
                skipped |= set(span)
        return skipped

    def beside(self, inner: range) -> list[Instruction]:
        """The loop around ``inner`` without it, and without what is guarded: of a product, a tile's epilogue."""
        loop = self.around(inner)
        without = self.guarded(loop).union(inner, *self.product_loops())
        return [self.instructions[i] for i in loop if i not in without]

    def epilogue(self) -> list[Instruction]:
        return self.beside(self.product_loops()[0])


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
    """Instructions that each of the threads runs per logit that it holds, beside the product."""
    return len(code.epilogue()) * threads / logits


def histogram(instructions: Sequence[Instruction]) -> str:
    return " ".join(f"{name}:{count}" for name, count in Counter(i.name for i in instructions).most_common(14))
