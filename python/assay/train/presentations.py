"""The rows of a table of training, a sample's in the order of their steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from assay.methods import Column

Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]

COUNTS = (
    Column("presentations", "none", "how many presentations the scores are made of"),
    Column("unknown", "none", "how many were left out, for lack of a finite number"),
)


@dataclass(frozen=True)
class Presentations:
    """Presentations whose scores are finite, by id and then by step.

    Attributes:
        ids: (n,), in the order of first appearance.
        owner: (m,), which id each presentation is of, ascending.
        step: (m,), ascending for each id.
        values: (m,) by score.
        unknown: (n,), how many of each id's were left out.
    """

    ids: pa.Array
    owner: Integers
    step: Integers
    values: Mapping[str, Floats]
    unknown: Integers

    @property
    def counts(self) -> Integers:
        """(n,), of presentations."""
        return np.bincount(self.owner, minlength=len(self.ids))

    def means(self, values: Floats) -> Floats:
        """(n,), of (m,) numbers; NaN of none."""
        sums = np.bincount(self.owner, weights=values, minlength=len(self.ids))
        with np.errstate(invalid="ignore"):
            found: Floats = sums / self.counts
        return found

    def table(self, columns: Sequence[Column], scores: Sequence[npt.NDArray[Any]]) -> pa.Table:
        values = [*(score.astype(np.float32) for score in scores), self.counts, self.unknown]
        return table_of(self.ids, [*columns, *COUNTS], values)


def presentations(table: pa.Table, scores: Sequence[str], first: int | None = None) -> Presentations:
    """The presentations of a table, or those that come ``first``."""
    _check_columns(table, scores)
    ids, owner = _encoded(table["id"])
    steps = table["step"].cast(pa.int64()).to_numpy()
    order = _order(owner, steps, len(ids))
    owner, steps = owner[order], steps[order]
    same = (owner[:-1] == owner[1:]) & (steps[:-1] == steps[1:])
    if same.any():
        at = int(np.argmax(same))
        raise ValueError(
            f"id {ids[int(owner[at])].as_py()!r} was presented more than once in step {steps[at]}, expected once: of "
            "several runs, make the scores of each table and average those; with Accelerate, train with drop_last=True"
        )
    values = {name: table[name].cast(pa.float64()).to_numpy()[order] for name in scores}
    if first is not None:
        number = np.arange(len(owner)) - np.searchsorted(owner, owner)
        owner, steps, values = _where(number < first, owner, steps, values)
    known = np.logical_and.reduce([np.isfinite(own) for own in values.values()])
    unknown = np.bincount(owner[~known], minlength=len(ids))
    return Presentations(ids, *_where(known, owner, steps, values), unknown)


def _where(
    chosen: npt.NDArray[np.bool_], owner: Integers, steps: Integers, values: Mapping[str, Floats]
) -> tuple[Integers, Integers, dict[str, Floats]]:
    return owner[chosen], steps[chosen], {name: own[chosen] for name, own in values.items()}


def _order(owner: Integers, steps: Integers, ids: int) -> Integers:
    """What sorts presentations by id and then by step."""
    if not len(steps):
        return np.empty(0, np.int64)
    low = int(steps.min())
    span = int(steps.max()) - low + 1
    if ids * span < 1 << 63:  # one key of both is sorted in a third of the time
        return np.argsort(owner * span + (steps - low))
    return np.lexsort((steps, owner))


def _encoded(column: pa.ChunkedArray) -> tuple[pa.Array, Integers]:
    """The different ids, in the order of first appearance, and which of them each row has."""
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    encoded = column.dictionary_encode().unify_dictionaries()
    if not encoded.num_chunks:
        return pa.array([], column.type), np.empty(0, np.int64)
    owner = np.concatenate([chunk.indices.to_numpy() for chunk in encoded.chunks]).astype(np.int64)
    return encoded.chunk(0).dictionary, owner


def _check_columns(table: pa.Table, scores: Sequence[str]) -> None:
    """ValueError unless the table has one id and step in every row, and the scores are numbers."""
    if not isinstance(table, pa.Table):
        raise TypeError(f"trajectories: a {type(table).__name__}; expected a pyarrow.Table, as of Reweighter.table()")
    for name in ("id", "step", *scores):
        if table.column_names.count(name) != 1:
            others = ", ".join(own for own in table.column_names if own not in ("id", "step", "weight"))
            raise ValueError(
                f"trajectories: the table has {table.column_names.count(name) or 'no'} columns {name!r}; expected one, "
                f"as of a Reweighter that observes assay.methods.Dynamics; its scores are {others or 'none'}"
            )
    for name in ("id", "step"):
        if table[name].null_count:
            raise ValueError(
                f"trajectories: {table[name].null_count} of the table's {table.num_rows} rows have no {name}; expected "
                "one in each: give the samples' ids to every call, reweighter.backward(losses, ids)"
            )
    if not pa.types.is_integer(table["step"].type):
        raise ValueError(f"trajectories: column 'step' holds {table['step'].type}; expected whole numbers")
    for name in scores:
        kind = table[name].type
        if not (pa.types.is_floating(kind) or pa.types.is_integer(kind) or pa.types.is_boolean(kind)):
            raise ValueError(f"trajectories: column {name!r} holds {kind} per row; expected one number")


def kept_end(table: pa.Table, by: str) -> Any:
    """Which end of a score the table says to keep."""
    said = (table.schema.field(by).metadata or {}).get(b"keep", b"none").decode()
    return said if said in ("high", "low") else "none"


def table_of(ids: pa.Array, columns: Sequence[Column], values: Sequence[Any]) -> pa.Table:
    """``id``, and a column of an array's numbers for each of ``columns``, which are its metadata."""
    arrays = [pa.array(own) for own in values]
    said = [{"keep": column.keep, "description": column.description} for column in columns]
    fields = [pa.field(c.name, own.type, metadata=m) for c, own, m in zip(columns, arrays, said, strict=True)]
    return pa.Table.from_arrays([ids, *arrays], schema=pa.schema([pa.field("id", ids.type), *fields]))
