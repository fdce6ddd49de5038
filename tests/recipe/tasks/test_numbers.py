"""Vectors: many rows at once become what each of them becomes by itself, fault by fault."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from assay.corpus.errors import BadRow
from assay.recipe.tasks.base import Encoded
from assay.recipe.tasks.numbers import NumberInputs

WHOLE = [np.arange(6) + 0.5 * i for i in range(5)]
ODD: list[Any] = [None, [1, 2, 3, 4, 5, 6], "text", np.zeros(5), np.full(6, np.nan), np.array([1e300, 0, 0, 0, 0, 0])]


def said(result: Encoded | BadRow) -> tuple[Any, ...]:
    if isinstance(result, BadRow):
        return (str(result),)
    return (result.data.dtype, result.data.tobytes(), *result[1:])


@pytest.mark.parametrize("dtype", [np.bool_, np.uint8, np.int64, np.float16, np.float32, np.float64])
@pytest.mark.parametrize("shape", [(6,), (2, 3)])
def test_rows_at_once_are_rows_one_by_one(dtype: Any, shape: tuple[int, ...]) -> None:
    inputs = NumberInputs("x", shape)
    whole = [(value.astype(dtype).reshape(shape),) for value in WHOLE]
    whole.append((np.asfortranarray(whole[0][0]),))
    rows = [*whole, *((value,) for value in ODD)]
    for some in (whole, rows, [(np.full(shape, np.nan),), *rows[:2]], whole[:1], []):
        alone = [said(inputs.encode([row])[0]) for row in some]
        assert [said(result) for result in inputs.encode(some)] == alone
        assert alone == [said(inputs.encode([row, (None,)])[0]) for row in some]  # which takes the slow way
    assert all(result.data.base is None for result in inputs.encode(whole) if isinstance(result, Encoded))


@pytest.mark.parametrize(
    ("wanted", "fits", "turned"),
    [
        ((3, 4, 5), [(3, 4, 5), (60,), (12, 5), (1, 3, 4, 5)], [(4, 5, 3), (3, 5, 4)]),
        ((2, 6), [(2, 6), (2, 1, 6), (3, 4)], [(6, 2), (6, 1, 2)]),
        ((12,), [(3, 4), (12, 1)], []),
    ],
)
def test_axes_in_another_order_are_no_sample(wanted: Any, fits: list[Any], turned: list[Any]) -> None:
    """Laid out flat, an image whose channels come last is as many numbers, and another image."""
    inputs = NumberInputs("x", wanted)
    values = np.arange(np.prod(wanted), dtype=np.float32)
    for shape in fits + turned:
        for value in (values.reshape(shape), values.reshape(shape).tolist()):
            (one,), two = inputs.encode([(value,)]), inputs.encode([(value,), (value,)])
            assert all(said(result) == said(one) for result in two)
            if shape in fits:
                assert isinstance(one, Encoded)
                assert one.data.tolist() == values.tolist()
            else:
                assert str(one) == f"x has the shape {shape}, expected {wanted}: the same axes in another order"


def test_a_row_with_a_fault_costs_no_other() -> None:
    rows = [(np.full(3, float(i)),) for i in range(4)]
    rows[2][0][1] = np.inf
    found = NumberInputs("x", [3]).encode(rows)
    assert [isinstance(result, BadRow) for result in found] == [False, False, True, False]
    assert str(found[2]) == "x holds a NaN, an infinity or a null"
