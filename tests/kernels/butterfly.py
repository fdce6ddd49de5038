"""Sums between threads whose bits differ from thread to thread, found in PTX.

A reduction between threads goes by butterflies: each thread adds what another holds to its own, and as a + b = b + a,
both hold the same bits. Where what they exchange is a rounded product and the addition is contracted with it, they do
not: one holds fma(a, b, round(cd)), the other fma(c, d, round(ab)). What a program then makes of "its" row depends on
the thread that stores it, and racecheck reports it as a race. Blackwell multiplies and adds two numbers at a time, in
the halves of a register pair.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

_MOVE = re.compile(r"\bmov\.b(?:32\s+(%\w+), (%\w+)|64\s+(\{[^}]*\}|%rd\d+), (\{[^}]*\}|%rd\d+));")
_MULTIPLY = re.compile(r"\bmul(?:\.rn)?(?:\.ftz)?\.f32(?:x2)?\s+(\S+), (\S+), (\S+);")
_EXCHANGE = re.compile(r"\bshfl\.sync\.bfly\.b32\s+(%\w+)(?:\|%\w+)?, (%\w+),")
_FUSED = re.compile(r"\bfma\.rn(?:\.ftz)?\.f32(?:x2)?\s+(\S+), (\S+), (\S+), (\S+);")


class _Words:
    """What registers hold, word by word of 32 bits: each by the name of the register that held it first."""

    def __init__(self) -> None:
        self._names: dict[str, Sequence[str]] = {}

    def of(self, register: str) -> Sequence[str]:
        """Of "%r1" one word, of the pair "%rd1" or "{%r1, %r2}" two."""
        if register.startswith("{"):
            return [name for part in register.strip("{}").split(", ") for name in self.of(part)]
        own = [f"{register}.low", f"{register}.high"] if register.startswith("%rd") else [register]
        return self._names.get(register, own)

    def move(self, to: str, source: str) -> None:
        words = self.of(source)
        parts = to.strip("{}").split(", ")
        self._names |= {to: words} if len(parts) == 1 else {p: [w] for p, w in zip(parts, words, strict=True)}

    def written(self, register: str) -> Sequence[str]:
        """The words of a register that now holds what none did."""
        self._names.pop(register, None)
        return self.of(register)


def lopsided(ptx: str) -> list[str]:
    """The instructions fma d, a, b, s whose s another thread sent as its rounded product of what are here a and b."""
    words = _Words()
    products: dict[str, set[str]] = {}  # word -> its factors
    sent: dict[str, str] = {}  # word -> what was exchanged for it
    found = []
    for line in ptx.splitlines():
        if move := _MOVE.search(line):
            words.move(*filter(None, move.groups()))
        elif product := _MULTIPLY.search(line):
            a, b = map(words.of, product.groups()[1:])
            products |= {to: set(ab) for to, *ab in zip(words.written(product[1]), a, b, strict=True)}
        elif exchange := _EXCHANGE.search(line):
            (source,) = words.of(exchange[2])
            (to,) = words.written(exchange[1])
            sent[to] = source
        elif fused := _FUSED.search(line):
            operands = zip(*map(words.of, fused.groups()[1:]), strict=True)
            if any(products.get(sent.get(s, "")) == {a, b} for a, b, s in operands):
                found.append(line.strip())
            words.written(fused[1])
    return found
