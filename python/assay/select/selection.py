"""What every rule returns, and how a score's direction is found."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa

Floats = npt.NDArray[np.float64]
Mask = npt.NDArray[np.bool_]

DROPPED, KEPT, UNSCORED = 0, 1, 2


@dataclass(frozen=True)
class Selection:
    """Which rows of a table are kept.

    ``mask`` has one Boolean per row; ``weights``, if the rule thinks in degrees, one float in [0, 1]; of
    `robust` and `weigh`, any whose sum is the number of kept rows.
    ``threshold`` is where the score was cut, in the score's own units. ``codes`` indexes ``legend``, the
    reasons. ``facts`` holds what the rule learned (component means, voters' accuracies). Of a rule that looks at
    groups, ``limits`` are where each group's score was cut, NaN where nothing of it is kept; of `mix`, ``copies`` how
    often each row is to be there, 0 for one that is not kept.
    """

    rule: str
    mask: Mask
    codes: npt.NDArray[np.uint8]
    legend: tuple[str, ...]
    threshold: float | None = None
    weights: Floats | None = None
    facts: Mapping[str, float] = field(default_factory=dict)
    limits: Floats | None = None
    copies: npt.NDArray[np.uint8] | None = None

    @property
    def indices(self) -> npt.NDArray[np.int64]:
        """The kept rows' positions in the table, ascending."""
        return np.flatnonzero(self.mask)

    @property
    def reasons(self) -> npt.NDArray[np.object_]:
        """Why each row was kept or dropped, one short string per row."""
        return np.array(self.legend, dtype=object)[self.codes]

    def because(self, rows: Mask, reason: str) -> Selection:
        """The same with another reason for these rows."""
        codes = np.where(rows, np.uint8(len(self.legend)), self.codes)
        return replace(self, codes=codes, legend=(*self.legend, reason))

    @property
    def scored(self) -> Mask:
        """The rows that had a score to be judged by."""
        scored: Mask = self.codes != UNSCORED
        return scored

    def summary(self) -> str:
        """One line: the rule, how many rows it kept of how many, and where it cut."""
        kept, rows = int(self.mask.sum()), len(self.mask)
        line = f"{self.rule}: kept {kept:,} of {rows:,} rows ({kept / max(rows, 1):.1%})"
        if self.threshold is not None:
            line += f", threshold {self.threshold:.6g}"
        if self.copies is not None:
            line += f", {int(self.copies.sum(dtype=np.int64)):,} with their copies"
        unscored = rows - int(self.scored.sum())
        return line + (f", {unscored:,} NaN" if unscored else "")


@dataclass(frozen=True)
class OrientedScore:
    """A score turned so that more is better: ``values`` are the column's numbers times ``sign``, float32 where they are
    so in the table, else float64. What is computed from them is to be computed in float64."""

    name: str
    values: npt.NDArray[Any]
    valid: Mask
    sign: int

    @property
    def end(self) -> str:
        return "highest" if self.sign > 0 else "lowest"

    def select(self, mask: Mask, rule: str, kept: str, dropped: str, **details: Any) -> Selection:
        """A selection by this score, with its three reasons."""
        codes = np.where(self.valid, mask.view(np.uint8), np.uint8(UNSCORED))
        legend = (f"dropped: {dropped}", f"kept: {kept}", f"dropped: {self.name} is NaN")
        return Selection(rule, mask & self.valid, codes, legend, **details)

    def cut(self, limit: float, rule: str) -> Selection:
        """Keep what is at least ``limit`` in worth."""
        mask = np.greater_equal(self.values, limit, signature="dd->?")
        own = self.sign * limit
        side = ("at least", "below") if self.sign > 0 else ("at most", "above")
        return self.select(
            mask, rule, f"{self.name} {side[0]} {own:.6g}", f"{self.name} {side[1]} {own:.6g}", threshold=own
        )


def as_score(value: float) -> float:
    """The float32 that is written so: 0.7 is 0.699999988. A number that none is written as stays what it is."""
    with np.errstate(over="ignore"):
        nearest = np.float32(value)
    return float(nearest) if float(str(nearest)) == value else value


def indices_mask(rows: int, indices: npt.NDArray[np.int64]) -> Mask:
    """(rows,), the rows of these indices."""
    mask = np.zeros(rows, bool)
    mask[indices] = True
    return mask


def oriented(table: pa.Table, by: str, keep: Literal["high", "low"] | None = None) -> OrientedScore:
    """Read score ``by`` and orient it by ``keep`` or, without one, by the column's metadata."""
    if by not in table.schema.names:
        known = ", ".join(name for name in table.schema.names if name not in ("row", "id"))
        raise ValueError(f"by={by!r}: the table has no such score; it has {known or 'none'}")
    direction = keep
    if direction is None:
        stored = (table.schema.field(by).metadata or {}).get(b"keep", b"").decode()
        if stored not in ("high", "low"):
            raise ValueError(
                f"by={by!r}: the table does not say which end of it to keep; say high or low: keep='high', --keep high"
            )
        direction = "high" if stored == "high" else "low"
    if direction not in ("high", "low"):
        raise ValueError(f"keep={keep!r}: expected 'high' or 'low'")
    sign = 1 if direction == "high" else -1
    held = table[by]
    is_number = (pa.types.is_floating, pa.types.is_integer, pa.types.is_boolean, pa.types.is_decimal, pa.types.is_null)
    if not any(is_kind(held.type) for is_kind in is_number):
        raise ValueError(f"by={by!r}: holds {held.type} per row; expected one number")
    column = held.chunk(0).to_numpy(zero_copy_only=False) if held.num_chunks == 1 else held.to_numpy()
    if column.dtype != np.float32:
        column = column.astype(np.float64)
    return OrientedScore(by, column if sign > 0 else -column, ~np.isnan(column), sign)
