"""The best so many of very many rows without sorting them: one Boolean a row is held, and a part of the keys."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from assay.select.selection import Mask

CHUNK_ROWS = 1 << 20
_DIGIT = 16
_FEW = 1 << 20

Keys = Callable[[], Iterator[npt.NDArray[Any]]]
"""Makes the rows' keys, float32 or float64, some rows at a time, the same whenever it is called. NaN: no candidate."""


def spans(rows: int) -> Iterator[slice]:
    """The rows, CHUNK_ROWS at a time."""
    return (slice(start, min(start + CHUNK_ROWS, rows)) for start in range(0, rows, CHUNK_ROWS))


def parts_of(values: npt.NDArray[Any]) -> Iterator[npt.NDArray[Any]]:
    """The values, CHUNK_ROWS at a time."""
    return (values[span] for span in spans(len(values)))


def best(keys: Keys, rows: int, wanted: int) -> Mask:
    """(rows,), True for the ``wanted`` greatest keys, or for all candidates if those are fewer.

    Of equal keys the earlier row is taken, as a stable sort would. Keys are made anew on each of two to five passes.
    """
    mask, start = np.zeros(rows, bool), 0
    limit, ties = limit_of(keys, rows, wanted)
    if limit is None:
        return mask
    for part in keys():
        here = mask[start : (start := start + len(part))]
        here[:] = part > limit
        if ties:
            equal = np.flatnonzero(part == limit)[:ties]
            here[equal] = True
            ties -= len(equal)
    return mask


def limit_of(keys: Keys, rows: int, wanted: int) -> tuple[Any, int]:
    """The least key among the ``wanted`` greatest of ``rows``, and how many of its equals are among them.

    The limit is a number of the keys' type; None if nothing is wanted, or there is no candidate.
    """
    above, width, left, few = 0, 0, wanted, rows  # the limit's first digits, how many bits they are, whose they are
    while few > _FEW:
        counts, kind = _count(keys, above, width)
        from_the_top = np.cumsum(counts[::-1])
        left = min(left, int(from_the_top[-1]))
        if left <= 0:
            return None, 0
        place = int(np.searchsorted(from_the_top, left))
        digit = len(counts) - 1 - place
        left -= int(from_the_top[place - 1]) if place else 0
        above, width, few = above << _DIGIT | digit, width + _DIGIT, int(counts[digit])
        if width == 8 * kind.itemsize:
            return _number(above, kind), left
    parts = [part[_digits(part, width) == above] if width else part for part in _candidates(keys)]
    there = np.sort(np.concatenate([np.empty(0, np.float32), *parts]))
    left = min(left, len(there))
    if left <= 0:
        return None, 0
    limit = there[len(there) - left]
    return limit, left - int(np.count_nonzero(there > limit))


def _count(keys: Keys, above: int, width: int) -> tuple[npt.NDArray[np.int64], np.dtype[Any]]:
    """How often each next digit occurs among the keys that begin with ``above``; and the keys' type."""
    counts, kind = np.zeros(1 << _DIGIT, np.int64), np.dtype(np.float32)
    for part in _candidates(keys):
        kind = part.dtype
        if width:
            part = part[_digits(part, width) == above]
        digits = _digits(part, width + _DIGIT) & np.array((1 << _DIGIT) - 1, f"u{kind.itemsize}")
        counts += np.bincount(digits.astype(np.int64), minlength=len(counts))
    return counts, kind


def _candidates(keys: Keys) -> Iterator[npt.NDArray[Any]]:
    for part in keys():
        yield part[part == part]


def _digits(values: npt.NDArray[Any], width: int) -> npt.NDArray[Any]:
    """The first ``width`` bits of integers that are in order as the numbers are."""
    size = 8 * values.itemsize
    kind = np.dtype(f"u{values.itemsize}")
    bits = (values + values.dtype.type(0)).view(kind)  # -0 + 0 is 0: the two are equal
    negative = (bits >> kind.type(size - 1)).astype(bool)
    ordered = np.where(negative, ~bits, bits | kind.type(1 << (size - 1)))
    first: npt.NDArray[Any] = ordered >> kind.type(size - width)
    return first


def _number(ordered: int, kind: np.dtype[Any]) -> Any:
    """The number that such an integer stands for."""
    size = 8 * kind.itemsize
    bits = ordered ^ (1 << (size - 1)) if ordered >> (size - 1) else ordered ^ ((1 << size) - 1)
    return np.array(bits, f"u{kind.itemsize}").view(kind)[()]
