"""Inputs and labels in the forms in which people hold them, picked by row and turned into class numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

# A label is a column of the logits: beyond this it is an identifier, and N × C numbers do not fit anywhere.
MOST_CLASSES = 1 << 20


def inputs(x: Any) -> Any:
    """``x`` in a form that ``take`` picks rows from: lists of numbers as an array, sparse matrices by row."""
    if hasattr(x, "tocsr"):
        return x.tocsr()
    if isinstance(x, (list, tuple)) and len(x) and not isinstance(x[0], (str, bytes, Mapping)):
        try:
            array = np.asarray([to_numpy(item) for item in x])
        except (TypeError, ValueError):
            return x
        return array if array.dtype.kind in "biuf" else x
    return x


def count(x: Any) -> int:
    """The number of samples.

    Raises:
        TypeError, ValueError: something that has none, or columns of different lengths.
    """
    if isinstance(x, Mapping):
        sizes = {name: count(column) for name, column in x.items()}
        if len(set(sizes.values())) != 1:
            raise ValueError(f"x: expected columns of one length, got {sizes or 'no columns'}")
        return next(iter(sizes.values()))
    shape = getattr(x, "shape", None)
    if shape:
        return int(shape[0])
    if shape is not None or isinstance(x, (str, bytes)) or not (hasattr(x, "__len__") and hasattr(x, "__getitem__")):
        raise TypeError(
            "x: expected samples that can be picked by number (an array, tensor, sparse matrix, data frame, data set, "
            f"list, or mapping of them), got {type(x).__name__}" + (" of no dimension" if shape is not None else "")
        )
    return len(x)


def take(x: Any, rows: NDArray[np.int64]) -> Any:
    """The samples at ``rows``, in the form of ``x``."""
    if isinstance(x, Mapping):
        return {name: take(column, rows) for name, column in x.items()}
    if isinstance(x, Tensor):
        return x[torch.as_tensor(rows, device=x.device)]
    if isinstance(x, torch.utils.data.Dataset):
        return torch.utils.data.Subset(x, rows.tolist())
    if hasattr(x, "iloc"):
        return x.iloc[rows]
    if isinstance(x, Sequence):
        return [x[row] for row in rows]
    try:
        return x[rows]
    except (TypeError, KeyError, IndexError) as error:
        raise TypeError(
            f"x: expected samples that an array of row numbers picks, which a {type(x).__name__} does not take: {error}"
        ) from error


def to_numpy(values: Any) -> Any:
    """A tensor as an array, wherever it lies; everything else as it is."""
    if not isinstance(values, Tensor):
        return values
    values = values.detach().cpu()
    return (values.float() if values.dtype == torch.bfloat16 else values).numpy()


def short(value: Any) -> str:
    """The beginning of a value's or an error's text, on one line."""
    text = " ".join((str(value) if isinstance(value, Exception) else repr(value)).split())
    return text if len(text) <= 120 else text[:117] + "..."


def class_numbers(y: Any) -> tuple[NDArray[np.int64], NDArray[Any]]:
    """Labels -> (N,) numbers of classes, and the classes (C,), what each number stands for.

    Integers (and floats without a fraction) are class numbers already, 0..C−1; truth values and names are numbered in
    their order, as scikit-learn does.

    Raises:
        ValueError: no single list of labels, labels of several kinds, missing, negative or fractional ones.
    """
    labels = _as_array(y)
    if labels.dtype == object:
        labels = _of_one_kind(labels)
    if labels.dtype.kind in "USO":
        classes, numbers = np.unique(labels.astype(object), return_inverse=True)
        return numbers.reshape(-1).astype(np.int64), classes
    if labels.dtype.kind == "b":
        return labels.astype(np.int64), np.array([False, True])
    if labels.dtype.kind == "f" and len(labels):
        wrong = np.flatnonzero(~np.isfinite(labels) | (labels != np.round(labels)))
        if len(wrong):
            raise ValueError(f"y: expected integer labels 0..C−1 or names, got {labels[wrong[0]]} in row {wrong[0]}")
    elif labels.dtype.kind not in "iuf":
        raise ValueError(f"y: expected integer labels 0..C−1 or names, got {labels.dtype}")
    low, high = (labels.min(), labels.max()) if len(labels) else (0, -1)
    if low < 0 or high >= MOST_CLASSES:
        raise ValueError(
            f"y: expected integer labels 0..C−1, got {labels.dtype} from {low:g} to {high:g}; "
            "other numbers that stand for classes can be given as names, str(label)"
        )
    return labels.astype(np.int64), np.arange(int(high) + 1)


def _as_array(y: Any) -> NDArray[Any]:
    """(N,) of ``y``, or an error; lists as objects, among which NumPy would turn 1 into "1"."""
    y = to_numpy(y)
    if np.ma.is_masked(y):
        raise ValueError("y: expected a label per sample, got masked ones")
    try:
        labels = np.array(y, dtype=object) if isinstance(y, (list, tuple)) else np.asarray(y)
    except (TypeError, ValueError) as error:
        raise ValueError(f"y: expected one label per sample, got {type(y).__name__}: {error}") from error
    if labels.ndim == 2 and labels.shape[1] == 1:  # a data frame's only column
        labels = labels[:, 0]
    if labels.ndim != 1:
        raise ValueError(f"y: expected one label per sample, shape (N,), got {type(y).__name__} of {labels.shape}")
    return labels


def _of_one_kind(labels: NDArray[Any]) -> NDArray[Any]:
    """An array of objects, all of them names (which stay objects), truth values or numbers; or an error."""
    items = [to_numpy(label) for label in labels]
    kinds: tuple[tuple[type, ...], ...] = ((str,), (bytes,), (bool, np.bool_), (Real, np.number))
    kind = next((k for k in kinds if items and isinstance(items[0], k)), ())
    truth = kind == (bool, np.bool_)
    for row, item in enumerate(items):
        if not isinstance(item, kind) or isinstance(item, (bool, np.bool_)) != truth:
            first = f"{type(items[0]).__name__} in row 0 and " if row else ""
            raise ValueError(
                "y: expected labels of one kind, all numbers or all names, got "
                f"{first}{type(item).__name__} {short(item)} in row {row}"
            )
    if not items or kind in ((str,), (bytes,)):
        return np.array(items, dtype=object)
    return np.array(items, dtype=bool if truth else np.float64)
