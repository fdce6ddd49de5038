"""Between Arrow and numpy without pyarrow's own conversions: the first of these in a process imports pandas, if it is
installed, which takes as long as ten thousand rows."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

_MOST_BYTES = (1 << 31) - 1  # that the offsets of Arrow's strings can count


def numbers_of(array: pa.Array) -> npt.NDArray[Any]:
    """The numbers of an array, a view of it where none is null. Otherwise nulls are NaN, of Booleans None."""
    numeric = pa.types.is_integer(array.type) or pa.types.is_floating(array.type)
    # DLPack in older pyarrow goes through a null pointer where an array without numbers has no memory.
    if numeric and not array.null_count and array.buffers()[1] is not None:
        view: npt.NDArray[Any] = np.from_dlpack(array)
        return view
    converted: npt.NDArray[Any] = array.to_numpy(zero_copy_only=False)
    return converted


def filled_numbers_of(array: pa.Array) -> npt.NDArray[Any]:
    """The numbers of an array, with 0 in place of nulls."""
    if not array.null_count:
        return numbers_of(array)
    is_valid = numbers_of(array.is_valid().cast(pa.uint8()))
    held = pa.Array.from_buffers(array.type, len(array), [None, array.buffers()[1]], 0, array.offset)
    return np.where(is_valid, numbers_of(held), 0)


def array_of(numbers: npt.NDArray[Any]) -> pa.Array:
    """(N,) numbers, no Booleans, as an array that views them where they lie one after another. NaN is not null."""
    whole = np.ascontiguousarray(numbers, numbers.dtype.newbyteorder("="))
    if whole.dtype.kind not in "iuf":
        raise TypeError(f"expected integers or floats, got {whole.dtype}")
    return pa.Array.from_buffers(pa.from_numpy_dtype(whole.dtype), len(whole), [None, pa.py_buffer(whole)])


def strings_of(texts: Sequence[str]) -> pa.Array:
    """Texts, none of them null. A UnicodeEncodeError for a lone surrogate."""
    encoded = [text.encode() for text in texts]
    ends = [0, *accumulate(map(len, encoded))]
    if ends[-1] > _MOST_BYTES:
        return pa.array(texts, pa.string())  # which says that they are too many
    offsets, content = np.array(ends, np.int32), b"".join(encoded)
    return pa.StringArray.from_buffers(len(texts), pa.py_buffer(offsets), pa.py_buffer(content))


def ids_of(ids: Sequence[str] | pa.Array) -> pa.Array:
    """`strings_of` ids, or an array of them as strings."""
    return ids.cast(pa.string()) if isinstance(ids, pa.Array) else strings_of(ids)
