"""Labels of every kind become class numbers, or an error that says which row is wrong."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import torch

from assay.retrain.samples import class_numbers, count, inputs, take


@pytest.mark.parametrize(
    ("y", "numbers", "classes"),
    [
        ([2, 0, 2], [2, 0, 2], [0, 1, 2]),
        (np.array([1.0, 0.0]), [1, 0], [0, 1]),
        (torch.tensor([1, 0], dtype=torch.uint8), [1, 0], [0, 1]),
        (torch.tensor([1.0, 0.0], requires_grad=True), [1, 0], [0, 1]),
        (["b", "a", "b"], [1, 0, 1], ["a", "b"]),
        ([True, True], [1, 1], [False, True]),
        ([b"x", b"w"], [1, 0], [b"w", b"x"]),
        (pa.array(["b", "a"]), [1, 0], ["a", "b"]),
        (pd.Series(["b", "a"]).astype("category"), [1, 0], ["a", "b"]),
        (pd.Series([1, 0], dtype="Int64"), [1, 0], [0, 1]),
        (np.array([[1], [0]]), [1, 0], [0, 1]),
    ],
)
def test_labels_become_numbers(y: Any, numbers: list[int], classes: list[Any]) -> None:
    got, names = class_numbers(y)
    assert got.dtype == np.int64
    assert got.tolist() == numbers
    assert names.tolist() == classes


@pytest.mark.parametrize(
    ("y", "words"),
    [
        ([0.5, 1.0], "got 0.5 in row 0"),
        ([1.0, np.nan], "got nan in row 1"),
        (["a", None], "got str in row 0 and NoneType None in row 1"),
        (["a", "b", 1], "got str in row 0 and int 1 in row 2"),
        ([1, True], "got int in row 0 and bool True in row 1"),
        (pd.Series(["a", pd.NA], dtype=object), "got str in row 0 and NAType <NA> in row 1"),
        ([-1, 1], "from -1 to 1; other numbers that stand for classes can be given as names"),
        ([0, 10**12], "from 0.* to 1"),
        (np.eye(3), r"got ndarray of \(3, 3\)"),
        ([[1], [2, 3]], "got list"),
        ("abc", "got str"),
        (None, "got NoneType"),
        (np.ma.masked_array([0, 1], mask=[0, 1]), "got masked ones"),
        (np.array(["2020", "2021"], dtype="datetime64[Y]"), "datetime64"),
        (np.array([1j, 0]), "complex128"),
    ],
)
def test_wrong_labels_are_named(y: Any, words: str) -> None:
    with pytest.raises(ValueError, match=r"^y: expected [^\n]*" + words + r"[^\n]*$"):
        class_numbers(y)


@pytest.mark.parametrize("x", [None, 3, "texts", iter([1]), {1, 2}, np.float64(1)])
def test_what_has_no_rows_is_refused(x: Any) -> None:
    with pytest.raises(TypeError, match="x: expected samples that can be picked by number"):
        count(inputs(x))


def test_texts_stay_texts() -> None:
    """An array of them would be as wide as the longest."""
    texts = ["a", "b" * 1000, "c"]
    assert inputs(texts) is texts
    assert take(texts, np.array([2, 0])) == ["c", "a"]
    ragged = [[1, 2], [3]]
    assert inputs(ragged) is ragged
    with pytest.raises(TypeError, match="which a Table does not take"):
        take(pa.table({"a": [1, 2]}), np.array([0]))
