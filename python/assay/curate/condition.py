"""What a condition on scores consists of, in SQL, and the error that points into it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from assay.corpus.errors import CorpusError
from assay.curate.dataset import SHARD

Kind = Literal["number", "text", "condition"]
Logic = int | tuple[Any, ...]
"""How comparisons make a condition: one by its place, or "and", "or" or "not" and what it is of."""


class ExpressionError(CorpusError):
    """A condition that cannot be asked: what is wrong with it, and the place under which a caret points."""

    def __init__(self, message: str, text: str = "", place: int | None = None) -> None:
        shown = "".join(c if c.isprintable() else " " for c in text)
        lines = [f"--where: {message}"]
        if shown.strip():
            lines.append(f"  {shown}")
        if place is not None:
            lines.append(f"  {' ' * place}^")
        super().__init__("\n".join(lines))


@dataclass(frozen=True)
class Piece:
    """A part of the expression, in SQL.

    Attributes:
        text: how a person would write it.
        needs: the columns whose number a row must have for it, by their names in SQL.
        inside: of an aggregate or a rank: its name, for it cannot be part of another.
    """

    sql: str
    kind: Kind
    text: str
    needs: frozenset[str] = frozenset()
    parameters: Mapping[str, float | str] = field(default_factory=dict)
    plain: bool = False
    """A column or a number as it stands, which cannot fail."""
    is_score: bool = False
    """A score as it stands: a float32."""
    inside: str = ""
    logic: Logic | None = None
    """Of a condition."""

    @property
    def constant(self) -> tuple[str, float] | None:
        """Of a number as it stands, the name by which it is bound, and what it is."""
        bound = list(self.parameters.items()) if self.plain and self.kind == "number" else []
        return (bound[0][0], float(bound[0][1])) if bound else None


@dataclass(frozen=True)
class Comparison:
    """A part of a condition that no `AND`, `OR` or `NOT` divides.

    Attributes:
        needs: the columns without whose number it says nothing.
        sides: SQL of its two numbers, if it has two.
    """

    text: str
    sql: str
    needs: frozenset[str]
    sides: tuple[str, ...]


@dataclass(frozen=True)
class Compared:
    """What a comparison says of a row.

    Attributes:
        holds: None where a number in it has no value.
        left, right: its two numbers, if it has two and they have values.
        decides: whether the condition would say something else of the row if this comparison alone did.
    """

    text: str
    holds: bool | None
    left: float | None = None
    right: float | None = None
    decides: bool = False

    @property
    def distance(self) -> float | None:
        """How far the left number is above the right one; below it, negative."""
        if self.left is None or self.right is None:
            return None
        return 0.0 if self.left == self.right else self.left - self.right  # infinite ones, too


@dataclass(frozen=True)
class Aggregate:
    """A number of the whole table, or of each shard. ``share``: of a quantile, where it lies."""

    name: str
    function: str
    argument: Piece
    text: str
    place: int | None
    share: float | None = None
    by_shard: bool = False


@dataclass(frozen=True)
class Rank:
    """A number of each row that depends on all."""

    name: str
    function: str
    argument: Piece
    by_shard: bool = False


@dataclass(frozen=True)
class Condition:
    """What is asked of a row.

    Attributes:
        text: the expression as it was given.
        columns: by name in SQL, the columns that are read.
        needs: those of them by which a row is judged, in order.
    """

    text: str
    sql: str
    parameters: Mapping[str, float | str]
    columns: Mapping[str, str]
    needs: tuple[str, ...]
    aggregates: tuple[Aggregate, ...]
    ranks: tuple[Rank, ...]
    comparisons: tuple[Comparison, ...]
    logic: Logic

    @property
    def line(self) -> str:
        """The expression on one line, to be read and not to be asked again: it may have had a comment."""
        return " ".join(self.text.split())

    @property
    def shard(self) -> str:
        """The column of the shards, where something is by shard."""
        return next(column for column, name in self.columns.items() if name == SHARD)


def sound(piece: Piece) -> str:
    """SQL of a number that is null where there is none, as inf - inf: a comparison with it is neither true nor
    false. (To DuckDB NaN is more than every number.)"""
    return piece.sql if piece.plain else f"CASE WHEN isnan({piece.sql}) THEN NULL ELSE {piece.sql} END"


def decide(logic: Logic, holds: Sequence[bool | None]) -> bool | None:
    """What a condition is where its comparisons are so, in SQL's logic of three values."""
    if isinstance(logic, int):
        return holds[logic]
    word, *parts = logic
    found = [decide(part, holds) for part in parts]
    if word == "not":
        return None if found[0] is None else not found[0]
    last = word == "or"
    return last if last in found else None if None in found else not last


def decisive(logic: Logic, holds: Sequence[bool | None]) -> list[bool]:
    """Of each comparison whether the row would pass, or no longer pass, if it alone were otherwise."""
    passes = decide(logic, holds) is True
    found = []
    for i, own in enumerate(holds):
        others = [value for value in (True, False) if value is not own]
        changed = [decide(logic, [*holds[:i], other, *holds[i + 1 :]]) is True for other in others]
        found.append(any(now is not passes for now in changed))
    return found
