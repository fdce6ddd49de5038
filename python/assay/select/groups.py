"""Rows in groups, of which each has its own best: quotas that hold memory for one part of the groups at a time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from assay.select.best import Keys, best, parts_of
from assay.select.selection import Floats, Mask

NONE = 255
"""The cell of a row that has no key."""
_HELD_ROWS = 1 << 24


@dataclass(frozen=True)
class Groups:
    """Which group each row is of.

    Attributes:
        codes: (N,), places in ``names``.
        names: (G,) texts, of which one may be null: the group of the rows that have no value.
    """

    codes: npt.NDArray[np.int32]
    names: pa.Array

    def __len__(self) -> int:
        return len(self.names)

    def counts(self, of: Mask | None = None) -> npt.NDArray[np.int64]:
        """(G,), each group's rows, or those of them that the mask has."""
        found = np.zeros(len(self), np.int64)
        for start, codes in _placed(parts_of(self.codes)):
            here = codes if of is None else codes[of[start : start + len(codes)]]
            found += np.bincount(here, minlength=len(self))
        return found

    def least(self, values: npt.NDArray[Any], of: Mask) -> Floats:
        """(G,), each group's least value among the rows of the mask; NaN where there is none."""
        found = np.full(len(self), np.inf)
        there = np.zeros(len(self), bool)
        for start, codes in _placed(parts_of(self.codes)):
            here = of[start : start + len(codes)]
            np.minimum.at(found, codes[here], values[start : start + len(codes)][here].astype(np.float64))
            there[codes[here]] = True
        found[~there] = np.nan
        return found


def groups_of(table: pa.Table, column: str) -> Groups:
    """The groups that a column of the table makes of its rows: a dictionary, or anything that can be one."""
    if column not in table.schema.names:
        raise ValueError(f"group={column!r}: the table has no such column; it has {', '.join(table.schema.names)}")
    held = table[column]
    if pa.types.is_dictionary(held.type) and held.num_chunks != 1:  # pyarrow unifies no dictionaries with nulls
        held = held.cast(held.type.value_type)
    if not pa.types.is_dictionary(held.type):
        held = held.dictionary_encode()
    array = held.combine_chunks()
    names, codes = array.dictionary, array.indices.cast(pa.int32())
    if codes.null_count:
        if not names.null_count:
            names = pa.concat_arrays([names, pa.nulls(1, names.type)])
        codes = codes.fill_null(int(names.is_null().to_numpy(zero_copy_only=False).argmax()))
    return Groups(codes.to_numpy(), names)


def best_of_each(keys: Keys, groups: Groups, wanted: npt.NDArray[np.int64]) -> Mask:
    """(N,), True for the ``wanted`` (G,) greatest keys of each group; of equal keys the earlier row is taken."""
    mask: Mask = cells(keys, groups, wanted[None]) == 0
    return mask


def cells(keys: Keys, groups: Groups, edges: npt.NDArray[np.int64]) -> npt.NDArray[np.uint8]:
    """(N,), at or beyond how many of its group's ``edges`` (E, G) a row has its place, which is 0 for the greatest key.

    ``keys`` come in the parts of `parts_of`. NONE for a row without a key.
    """
    found = np.full(len(groups.codes), NONE, np.uint8)
    counts = groups.counts()
    for first, last in _ranges(counts):
        if counts[first:last].sum() > _HELD_ROWS:
            _cells_of_one(keys, groups, first, edges[:, first], found)
        else:
            _cells_of_some(keys, groups, first, last, edges, found)
    return found


def _ranges(counts: npt.NDArray[np.int64]) -> Iterator[tuple[int, int]]:
    """Groups that follow one another, in parts of up to _HELD_ROWS rows, or of one group."""
    ends = np.cumsum(counts)
    first = 0
    while first < len(counts):
        before = int(ends[first - 1]) if first else 0
        last = max(first + 1, int(np.searchsorted(ends, before + _HELD_ROWS, side="right")))
        yield first, last
        first = last


def _cells_of_some(
    keys: Keys, groups: Groups, first: int, last: int, edges: npt.NDArray[np.int64], found: npt.NDArray[np.uint8]
) -> None:
    places, values = [np.empty(0, np.int64)], [np.empty(0, np.float32)]
    for (start, codes), part in zip(_placed(parts_of(groups.codes)), keys(), strict=True):
        here = np.flatnonzero((codes >= first) & (codes < last) & (part == part))
        places.append(start + here)
        values.append(part[here])
    rows, own = np.concatenate(places), np.concatenate(values)
    codes = groups.codes[rows]
    order = np.lexsort((-own, codes))  # stable: of equal keys the earlier row comes first
    codes = codes[order] - first
    begins = np.cumsum(np.bincount(codes, minlength=last - first)) - np.bincount(codes, minlength=last - first)
    place = np.arange(len(codes)) - begins[codes]
    cell = np.zeros(len(codes), np.uint8)
    for edge in edges:
        cell += place >= edge[first:last][codes]
    found[rows[order]] = cell


def _cells_of_one(
    keys: Keys, groups: Groups, code: int, edges: npt.NDArray[np.int64], found: npt.NDArray[np.uint8]
) -> None:
    """Of a group that is too large to be sorted."""

    def own() -> Iterator[npt.NDArray[Any]]:
        return (part[codes == code] for part, codes in zip(keys(), parts_of(groups.codes), strict=True))

    rows = sum(map(len, own()))
    cell = np.zeros(rows, np.uint8)
    for edge in edges.tolist():
        cell += ~best(own, rows, edge)
    start = 0
    for (at, codes), part in zip(_placed(parts_of(groups.codes)), keys(), strict=True):
        here = codes == code
        its = cell[start : (start := start + int(np.count_nonzero(here)))]
        found[at : at + len(codes)][here] = np.where(np.isnan(part[here]), NONE, its)


def _placed(parts: Iterator[npt.NDArray[Any]]) -> Iterator[tuple[int, npt.NDArray[Any]]]:
    """The parts, each with its first row."""
    start = 0
    for part in parts:
        yield start, part
        start += len(part)
