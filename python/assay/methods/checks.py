"""What constructors check, cheaply: numbers in their ranges, and models that belong together."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from torch import nn


def check_at_least(argument: str, value: float, least: float) -> None:
    """ValueError unless ``value`` is a finite number of at least ``least``."""
    if not least <= value < math.inf:
        raise ValueError(f"{argument}: expected a finite number of at least {least:g}, got {value}")


def check_one_of(argument: str, value: object, choices: Sequence[str]) -> None:
    """ValueError unless ``value`` is one of the words."""
    if value not in choices:
        raise ValueError(f"{argument} {value!r}; expected {' or '.join(map(repr, choices))}")


@dataclass(frozen=True)
class Difference:
    """Of another model in one parameter: what was expected of it, as in the first, and what there is."""

    parameter: str
    expected: str
    actual: str


def difference(model: nn.Module, other: nn.Module, parameters: Collection[str]) -> Difference | None:
    """The first of ``model``'s ``parameters`` that ``other`` lacks, has in another shape or ties to other names; else
    the first of ``other``'s that ``model`` lacks.

    ``named_parameters()`` has a tied weight once: by that alone one of two models can look like a part of the other.
    """
    ours, theirs = dict(model.named_parameters()), dict(other.named_parameters(remove_duplicate=False))
    for name in parameters:
        if name not in theirs or theirs[name].shape != ours[name].shape:
            actual = f"shape {tuple(theirs[name].shape)}" if name in theirs else "no such parameter"
            return Difference(name, f"of shape {tuple(ours[name].shape)}", actual)
    tied, tied_there = _tied(model), _tied(other)
    for name in parameters:
        here, there = ({n for n in names[name] if n in tied and n in tied_there} for names in (tied, tied_there))
        if here != there:
            return Difference(name, _tying(here - {name}), _tying(there - {name}))
    for name, p in theirs.items():
        if name not in tied:
            return Difference(name, "absent", f"shape {tuple(p.shape)}")
    return None


def _tied(model: nn.Module) -> Mapping[str, frozenset[str]]:
    """Every name of a parameter -> all the names that it has."""
    names = defaultdict(list)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names[id(parameter)].append(name)
    return {name: frozenset(group) for group in names.values() for name in group}


def _tying(others: Collection[str]) -> str:
    return f"tied to {', '.join(sorted(others))}" if others else "untied"
