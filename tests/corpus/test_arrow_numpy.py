"""Between Arrow and numpy: the values of pyarrow's own conversions, of slices, nulls and texts of every kind."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from assay.corpus import arrow_numpy
from assay.corpus.arrow_numpy import array_of, filled_numbers_of, ids_of, numbers_of, strings_of

NUMBERS = ["int8", "uint8", "int16", "uint32", "int64", "uint64", "float16", "float32", "float64"]


@pytest.mark.parametrize("kind", NUMBERS)
@pytest.mark.parametrize("rows", [slice(0, 0), slice(0, 7), slice(3, 6)])
def test_numbers_there_and_back(kind: str, rows: slice) -> None:
    numbers = np.array([0, 1, 2, 100, 5, 6, 7]).astype(kind)
    if numbers.dtype.kind == "f":
        numbers[4:6] = np.nan, -np.inf
    array = pa.array(numbers, from_pandas=False)[rows]
    found = numbers_of(array)
    np.testing.assert_array_equal(found, numbers[rows])
    assert found.dtype == numbers.dtype
    made = array_of(numbers[rows])
    made.validate(full=True)
    assert made.equals(array) or np.isnan(found.astype(float)).any()
    assert (made.type, made.null_count) == (array.type, 0)
    np.testing.assert_array_equal(array_of(numbers[::2]).to_numpy(), numbers[::2])


def test_nulls_and_booleans_are_as_pyarrow_has_them() -> None:
    with_null = pa.array([1, None, 3], pa.int32())
    np.testing.assert_array_equal(numbers_of(with_null), [1, np.nan, 3])
    np.testing.assert_array_equal(numbers_of(with_null[2:]), [3])
    np.testing.assert_array_equal(numbers_of(pa.array([True, False])), [True, False])
    assert numbers_of(pa.array([True, None])).tolist() == [True, None]


@pytest.mark.parametrize("kind", ["int32", "int64", "uint8", "float32"])
@pytest.mark.parametrize("rows", [slice(0, 9), slice(1, 4), slice(4, 4)])
def test_nulls_are_filled(kind: str, rows: slice) -> None:
    array = pa.array([5, None, 7, None, None, 1, 2, 3, None], kind)[rows]
    np.testing.assert_array_equal(filled_numbers_of(array), array.fill_null(0).to_numpy())
    assert filled_numbers_of(array).dtype == array.to_numpy(zero_copy_only=False)[:0].astype(kind).dtype


@pytest.mark.parametrize("texts", [[], [""], ["a", "", "ä\U0001f600", "x" * 1000, "\0"]])
def test_texts(texts: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    made = strings_of(texts)
    made.validate(full=True)
    assert made.equals(pa.array(texts, pa.string()))
    monkeypatch.setattr(arrow_numpy, "_MOST_BYTES", 3)
    assert strings_of(texts).equals(made)
    with pytest.raises(UnicodeEncodeError):
        strings_of(["\ud800"])


def test_numbers_of_another_byte_order_and_what_is_no_number() -> None:
    assert array_of(np.array([1, 2.5, np.nan], ">f4")).to_pylist()[:2] == [1, 2.5]
    assert array_of(np.array([1, -2], ">i8")).to_pylist() == [1, -2]
    for other in (np.array([True, False]), np.array(["2020-01-01"], "M8[s]"), np.array([1j])):
        with pytest.raises(TypeError, match="expected integers or floats"):
            array_of(other)


def test_an_array_of_none_may_have_no_memory() -> None:
    none = pa.Array.from_buffers(pa.int32(), 0, [None, None])
    assert (numbers_of(none).tolist(), filled_numbers_of(none).tolist()) == ([], [])


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string()])
def test_ids_are_texts_or_an_array_of_them(kind: pa.DataType) -> None:
    ids = pa.array(["x", "a", "ä"], kind)
    assert ids_of(ids[1:]).equals(ids_of(["a", "ä"]))
    assert ids_of(ids).type == pa.string()
