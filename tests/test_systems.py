"""docs/systems.md names files, recipe keys, Python names, commands, tests and results: all of them exist, and its
numbers are those of the results that it names."""

from __future__ import annotations

import json
import pkgutil
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command

from assay.cli import app
from assay.recipe.methods import METHODS

ROOT = Path(__file__).parent.parent
COMMANDS = get_command(app).commands
COLUMNS = ["system", "file", "key or name", "test of its property", "experiment, beside its control"]


def rows() -> list[list[str]]:
    lines = (ROOT / "docs/systems.md").read_text(encoding="utf-8").splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines if line.startswith("|")]
    return [row for row in cells if row != COLUMNS and not row[0].startswith("---")]


ROWS = [pytest.param(row, id=row[0].split(" (")[0]) for row in rows()]


def numbers(value: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], float]]:
    """Every number of a result, by its keys; places in lists are no keys, so that seeds and runs come together. And the
    mean of each list of numbers, under a key of its own."""
    if isinstance(value, dict):
        for key, own in value.items():
            yield from numbers(own, (*path, key))
    elif isinstance(value, list):
        if value and all(isinstance(own, float) for own in value):
            yield (*path, "mean", str(len(value)), str(value[0])), sum(value) / len(value)
        for own in value:
            yield from numbers(own, path)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield path, float(value)


def measured(path: Path) -> set[float]:
    """The numbers of a result, and their means by keys."""
    by_path: dict[tuple[str, ...], list[float]] = defaultdict(list)
    for keys, value in numbers(json.loads(path.read_text(encoding="utf-8"))):
        by_path[keys].append(value)
    means = {sum(values) / len(values) for values in by_path.values()}
    return means | {value for values in by_path.values() for value in values}


@pytest.mark.parametrize("row", ROWS)
def test_what_a_row_names_exists(row) -> None:
    assert len(row) == len(COLUMNS), row
    _, files, names, tests, experiment = row
    if "not there yet" in row:
        assert row[1:4] == ["not there yet"] * 3
        assert experiment == "**missing**"
        return
    for path in re.findall(r"`([^`]+)`", files):
        assert (ROOT / path).is_file(), path
    for name in re.findall(r"`([^`]+)`", names):
        assert _exists(name), name
    for place in re.findall(r"`([^`]+)`", tests):
        path, _, test = place.partition("::")
        assert f"\ndef {test}(" in (ROOT / path).read_text(encoding="utf-8"), place
    assert all("`" in cell for cell in (files, names, tests))
    results = re.findall(r"`(benchmarks/results/[^`]+)`", experiment)
    assert results or "**missing**" in experiment, "an experiment, or what is missing"
    found = {value for path in results for value in measured(ROOT / path)}
    for text in re.findall(r"(?<![\w.])-?\d*\.\d+", re.sub(r"`[^`]*`|\([^)]*\)", "", experiment)):
        digits = len(text.partition(".")[2])
        close = [value for value in found if abs(value - float(text)) <= 0.5000001 * 10**-digits]
        assert close, f"{text} is no number of {results}"


def _exists(name: str) -> bool:
    if name.startswith("method: "):
        return name.removeprefix("method: ") in METHODS._specs
    if name.startswith("assay."):
        try:
            return pkgutil.resolve_name(name) is not None
        except (ImportError, AttributeError):
            return False
    command, _, option = name.removeprefix("assay ").partition(" ")
    found = COMMANDS.get(command) if name.startswith("assay ") else None
    return found is not None and (not option or any(option in parameter.opts for parameter in found.params))


def test_a_wrong_name_and_a_wrong_number_are_found() -> None:
    good = next(row for row in rows() if row[0].startswith("BM25"))
    for at, bad in ((1, "`python/assay/none.py`"), (2, "`method: none`"), (3, "`tests/test_docs.py::test_none`")):
        with pytest.raises(AssertionError):
            test_what_a_row_names_exists([*good[:at], bad, *good[at + 1 :]])
    assert _exists("assay select --ccs")
    assert not _exists("assay prove --ccs")  # another command's
    assert not _exists("assay progress_of")  # a function beside the commands
    with pytest.raises(AssertionError, match=r"is no number of"):
        test_what_a_row_names_exists([*good[:4], good[4].replace(".916", ".917")])
