"""Sums between threads whose bits differ from thread to thread, found in PTX.

A reduction between threads goes by butterflies: each thread adds what another holds to its own, and as a + b = b + a,
both hold the same bits. Where what they exchange is a rounded product and the addition is contracted with it, they do
not: one holds fma(a, b, round(cd)), the other fma(c, d, round(ab)). What a program then makes of "its" row depends on
the thread that stores it, and racecheck reports it as a race.
"""

from __future__ import annotations

import re

_MOVE = re.compile(r"\bmov\.b32\s+(%\w+), (%\w+);")
_MULTIPLY = re.compile(r"\bmul(?:\.rn)?(?:\.ftz)?\.f32\s+(%\w+), (\S+), (\S+);")
_EXCHANGE = re.compile(r"\bshfl\.sync\.bfly\.b32\s+(%\w+)(?:\|%\w+)?, (%\w+),")
_FUSED = re.compile(r"\bfma\.rn(?:\.ftz)?\.f32\s+%\w+, (\S+), (\S+), (\S+);")


def lopsided(ptx: str) -> list[str]:
    """The instructions fma d, a, b, s whose s another thread sent as its rounded product of what are here a and b."""
    products: dict[str, set[str]] = {}  # register -> its factors
    sent: dict[str, str] = {}  # register -> what was exchanged for it
    found = []
    for line in ptx.splitlines():
        if move := _MOVE.search(line):
            to, source = move.groups()
            if source in products:
                products[to] = products[source]
            if source in sent:
                sent[to] = sent[source]
        elif product := _MULTIPLY.search(line):
            products[product[1]] = {product[2], product[3]}
        elif exchange := _EXCHANGE.search(line):
            sent[exchange[1]] = exchange[2]
        elif (fused := _FUSED.search(line)) and products.get(sent.get(fused[3], "")) == {fused[1], fused[2]}:
            found.append(line.strip())
    return found
