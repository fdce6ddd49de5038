"""Cuts at scores, as the page sends them and as a condition of `assay select` has them."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

LONGEST = 20_000
_SIGNS = {"high": ">=", "low": "<="}


@dataclass(frozen=True)
class Cut:
    """The rows whose score is at least (``keep`` high) or at most (low) ``value``, a float32's."""

    score: str
    keep: str
    value: float

    @property
    def text(self) -> str:
        """As a condition. The number is written in float64's digits, which are the float32 itself to everybody."""
        name = self.score.replace('"', '""')
        return f'"{name}" {_SIGNS[self.keep]} {self.value!r}'


def condition_text(cuts: Sequence[Cut]) -> str:
    """All of them together; empty without any."""
    return " AND ".join(cut.text for cut in cuts)


def parse_cuts(text: str, names: Sequence[str]) -> list[Cut]:
    """What the page asks for: JSON, a list of [place of the score in ``names``, high or low, number]; one per score.

    ValueError for anything else.
    """
    if len(text) > LONGEST:
        raise ValueError(f"cuts of {len(text):,} characters; expected at most {LONGEST:,}")
    try:
        given = json.loads(text, parse_constant=lambda name: math.nan)
    except RecursionError as error:
        raise ValueError("cuts are nested too deep") from error
    if not isinstance(given, list) or len(given) > len(names):
        raise ValueError(f"expected a list of at most {len(names)} cuts")
    cuts = [_cut(entry, names) for entry in given]
    if len({cut.score for cut in cuts}) < len(cuts):
        raise ValueError("expected one cut per score")
    return cuts


def _cut(entry: object, names: Sequence[str]) -> Cut:
    if not isinstance(entry, list) or len(entry) != 3:
        raise ValueError("expected cuts [score, high or low, number]")
    place, keep, number = entry
    if type(place) is not int or not 0 <= place < len(names):
        raise ValueError(f"expected a score's number from 0 to {len(names) - 1}")
    if keep not in ("high", "low"):
        raise ValueError("expected high or low")
    if type(number) not in (int, float):
        raise ValueError("expected a number to cut at")
    try:
        with np.errstate(over="ignore"):
            value = float(np.float32(number)) + 0.0
    except OverflowError:
        value = math.inf
    if not math.isfinite(value):
        raise ValueError("expected a number to cut at, within what a score can be")
    return Cut(names[place], keep, value)
