"""Arguments of the functions that train models to know: what they are, or an error that names them."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from assay.retrain.samples import short, to_numpy

Floats = npt.NDArray[np.float64]
Rows = npt.NDArray[np.int64]


def whole(name: str, value: Any, least: int) -> int:
    """An integer of at least ``least``."""
    if not isinstance(value, (int, np.integer)) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name}: expected an integer of at least {least}, got {short(value)}")
    return int(value)


def fraction(name: str, value: Any) -> float:
    """A number that is meant to lie between 0 and 1."""
    if not isinstance(value, (int, float, np.number)) or not np.isfinite(value):
        raise ValueError(f"{name}: expected a number between 0 and 1, got {short(value)}")
    return float(value)


def positive(name: str, value: Any) -> float:
    """A finite number above 0."""
    if not isinstance(value, (int, float, np.number)) or isinstance(value, bool) or not 0 < value < np.inf:
        raise ValueError(f"{name}: expected a finite number above 0, got {short(value)}")
    return float(value)


def numbers(values: Any, name: str) -> Floats:
    """An array of float64, NaN where it is masked, or an error that names the argument."""
    try:
        array = np.asarray(to_numpy(values))
    except (TypeError, ValueError):
        array = np.empty(0, dtype=object)
    if array.dtype.kind not in "biuf":
        raise ValueError(f"{name}: expected an array of numbers, got {type(values).__name__} {short(values)}")
    if np.ma.is_masked(values):
        return np.asarray(values.astype(np.float64).filled(np.nan))
    return array.astype(np.float64)


def finite(values: Any, name: str) -> Floats:
    """Numbers, all of them finite."""
    array = numbers(values, name)
    if wrong := int((~np.isfinite(array)).sum()):
        raise ValueError(f"{name}: {wrong} of {array.size} are not finite")
    return array


def rows_of(values: Any, samples: int, name: str) -> Rows:
    """Row numbers, each once, in their order, of a list of them or of a mask (samples,)."""
    try:
        array = np.asarray(to_numpy(values))
    except (TypeError, ValueError):  # lists of several lengths
        array = np.empty(0, dtype=object)
    if array.dtype == bool and array.shape == (samples,):
        array = np.flatnonzero(array)
    if array.ndim != 1 or not array.size or array.dtype.kind not in "iu":
        raise ValueError(
            f"{name}: expected row numbers, or a mask ({samples},) with some of it True, got {array.dtype} of shape "
            f"{array.shape}: {short(values)}"
        )
    if array.min() < 0 or array.max() >= samples:
        wrong = array[(array < 0) | (array >= samples)][0]
        raise ValueError(f"{name}: row {wrong} lies outside 0..{samples - 1}")
    if len(np.unique(array)) != len(array):
        raise ValueError(f"{name}: expected each row once, got {short(values)}")
    return array.astype(np.int64)
