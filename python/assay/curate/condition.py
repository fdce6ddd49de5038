"""What a condition on scores consists of, in SQL, and the error that points into it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from assay.corpus.errors import CorpusError
from assay.curate.dataset import SHARD

Kind = Literal["number", "text", "condition"]


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
    inside: str = ""


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
