"""What a row must hold to be scored. Each check returns the value, or raises BadRow with the reason."""

from __future__ import annotations

import hashlib
import math
import reprlib
import uuid
from collections.abc import Sequence
from decimal import Decimal
from typing import Any

import numpy as np
import numpy.typing as npt

from assay.corpus.errors import BadRow

DEEPEST = 100
"""How many lists or mappings a value may have inside one another, itself among them."""

_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 60


def check_text(name: str, value: object) -> str:
    """A string with something in it, made of characters that exist: no lone surrogates."""
    if value is None:
        raise BadRow(f"{name} is null")
    if not isinstance(value, str):
        raise BadRow(f"{name} is {_kind(value)}, expected a string")
    if not value:
        raise BadRow(f"{name} is empty")
    _check_encodes(name, value)
    return value


def check_label(name: str, value: object, classes: int) -> int:
    """An integer in [0, classes). Whole floats count: nulls make floats of a pandas column."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        raise BadRow(f"{name} is null")
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise BadRow(f"{name} is {_kind(value)}, expected an integer")
    if isinstance(value, float) and not value.is_integer():
        raise BadRow(f"{name} is {value}, expected an integer")
    label = int(value)
    if not 0 <= label < classes:
        raise BadRow(f"{name} is {label}, outside the classes 0 to {classes - 1}")
    return label


def check_probabilities(name: str, value: object, classes: int, tolerance: float) -> npt.NDArray[np.float32]:
    """One probability per class: not negative, of sum 1 within ``tolerance``, which the float32 values keep to."""
    p = check_features(name, value, classes)
    if (p < 0).any():
        raise BadRow(f"{name} holds {float(p.min()):g}, expected probabilities")
    total = float(p.sum(dtype=np.float64))
    if abs(total - 1) > tolerance:
        raise BadRow(f"{name} has the sum {total:.6g}, expected probabilities of sum 1")
    return p


def check_depth(name: str, value: object) -> None:
    """BadRow for lists and mappings nested deeper than `DEEPEST`: what goes through them may take a call for each."""
    level = [value]
    for _ in range(DEEPEST):
        inner = [own.values() if isinstance(own, dict) else own for own in level if isinstance(own, list | dict)]
        level = [item for items in inner for item in items if isinstance(item, list | dict)]
        if not level:
            return
    raise BadRow(f"{name} is nested too deeply, more than {DEEPEST} lists or mappings inside one another")


def check_numbers(name: str, value: object, size: int, shape: Sequence[int] = ()) -> npt.NDArray[np.float32]:
    """``size`` finite numbers, as in `check_features`; one may stand without a list."""
    alone = isinstance(value, int | float | Decimal) and not isinstance(value, bool)
    if isinstance(value, float) and math.isnan(value):
        raise BadRow(f"{name} is null or NaN")
    if alone or value is None or isinstance(value, list | np.ndarray):
        check_depth(name, value)
        value = _floats(value)
        return check_features(name, [value] if alone else value, size, shape)
    raise BadRow(f"{name} is {_kind(value)}, expected {'a number' if size == 1 else f'a list of {size} numbers'}")


def _floats(value: Any) -> Any:
    """Decimals, and integers beyond float64, as floats."""
    if isinstance(value, list):
        return [_floats(item) for item in value]
    if isinstance(value, Decimal) or (isinstance(value, int) and not isinstance(value, bool)):
        try:
            return float(value)
        except OverflowError:
            return math.inf
    return value


def check_words(name: str, value: object) -> list[str]:
    """A list of strings, each with something in it."""
    if value is None:
        raise BadRow(f"{name} is null")
    if not isinstance(value, list | np.ndarray):
        raise BadRow(f"{name} is {_kind(value)}, expected a list of strings")
    if not len(value):
        raise BadRow(f"{name} is empty")
    return [check_text(f"{name}[{i}]", word) for i, word in enumerate(value)]


def shown(value: object) -> str:
    """A value in a reason: on one line, and no longer than that can take."""
    return _SHORT.repr(value)


def check_features(name: str, value: object, size: int, shape: Sequence[int] = ()) -> npt.NDArray[np.float32]:
    """``size`` finite numbers, flat or nested as ``shape``, as one flat float32 vector."""
    if value is None:
        raise BadRow(f"{name} is null")
    if not isinstance(value, list | np.ndarray):
        raise BadRow(f"{name} is {_kind(value)}, expected a list of numbers")
    try:
        numbers = np.asarray(value)
    except ValueError as error:
        raise BadRow(f"{name} is ragged, expected {size} numbers") from error
    if numbers.size and numbers.dtype.kind not in "biuf":
        raise BadRow(f"{name} holds something that is not a number")
    with np.errstate(over="ignore"):
        features = numbers.astype(np.float32).reshape(-1)
    if features.size != size:
        raise BadRow(f"{name} holds {features.size} numbers, expected {size}")
    if is_turned(numbers.shape, shape):
        raise BadRow(f"{name} has the shape {numbers.shape}, expected {tuple(shape)}: the same axes in another order")
    if not np.isfinite(features).all():
        raise BadRow(f"{name} holds a NaN, an infinity or a null")
    return features


def is_turned(found: Sequence[int], wanted: Sequence[int]) -> bool:
    """Whether numbers have the axes that are wanted in another order, as images have whose channels come last: laid out
    flat they would be as many, and others. Axes of length 1 are in no order."""
    ours, theirs = ([length for length in shape if length > 1] for shape in (found, wanted))
    return ours != theirs and sorted(ours) == sorted(theirs)


def stacked_features(values: Sequence[object], size: int) -> npt.NDArray[np.float32] | None:
    """(n, size): what `check_features` makes of n values, finite or not; None unless all are arrays of numbers, of this
    size and of one shape and type."""
    first = values[0] if values else None
    if not isinstance(first, np.ndarray) or first.dtype.kind not in "biuf" or first.size != size:
        return None
    kind = (first.shape, first.dtype)
    arrays = [v for v in values if isinstance(v, np.ndarray) and (v.shape, v.dtype) == kind]
    if len(arrays) < len(values):
        return None
    with np.errstate(over="ignore"):
        return np.concatenate(arrays, axis=None).astype(np.float32, copy=False).reshape(len(arrays), size)


def check_id(name: str, value: object) -> str:
    """A string or an integer (or UUID), as a string."""
    if value is None:
        raise BadRow(f"{name} is null")
    if isinstance(value, bool) or not isinstance(value, str | int | uuid.UUID):
        raise BadRow(f"{name} is {_kind(value)}, expected a string or an integer")
    text = str(value)
    _check_encodes(name, text)
    return text


class SeenIds:
    """Tells which ids came before, in 16 bytes per id rather than a set of strings."""

    def __init__(self) -> None:
        self._old = np.empty(0, dtype="V16")
        self._recent: set[bytes] = set()

    def repeats(self, ids: Sequence[str]) -> list[bool]:
        """For each id whether it was seen before, in earlier calls or earlier in this one."""
        digests = [hashlib.blake2b(text.encode(), digest_size=16).digest() for text in ids]
        known = self._among_old(digests)
        repeated = []
        for digest, old in zip(digests, known, strict=True):
            repeated.append(old or digest in self._recent)
            self._recent.add(digest)
        # Folding in only once there are a quarter as many keeps the sorting linear in the shard's rows.
        if len(self._recent) > max(1 << 14, len(self._old) // 4):
            self._old = np.unique(np.concatenate([self._old, _as_records(self._recent)]))
            self._recent = set()
        return repeated

    def _among_old(self, digests: list[bytes]) -> list[bool]:
        wanted = _as_records(digests)
        places = np.searchsorted(self._old, wanted)
        return [bool(p < len(self._old) and self._old[p] == d) for p, d in zip(places, wanted, strict=True)]


def _as_records(digests: Sequence[bytes] | set[bytes]) -> npt.NDArray[Any]:
    return np.frombuffer(b"".join(digests), dtype="V16")


def _check_encodes(name: str, text: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise BadRow(f"{name} has a lone surrogate at character {error.start}") from error


def _kind(value: object) -> str:
    return f"of type {type(value).__name__}"
