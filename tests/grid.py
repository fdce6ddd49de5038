"""Grids of cases of which CI runs every second or third one."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import pytest


def checkered(*axes: Sequence[Any], every: int = 2) -> list[Any]:
    """Every combination, as on a checkerboard: all but one of so many colours are ``slow``, `make test-long`'s.

    Every value of an axis is left with every second value of each of the others.
    """
    cases = []
    for places in itertools.product(*(range(len(axis)) for axis in axes)):
        values = [axis[place] for axis, place in zip(axes, places, strict=True)]
        cases.append(pytest.param(*values, marks=[pytest.mark.slow] if sum(places) % every else []))
    return cases
