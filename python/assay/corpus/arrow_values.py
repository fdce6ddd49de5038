"""Arrow arrays as Python values. A value that does not decode is a fault of its row and of no other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from assay.corpus.arrow_numpy import numbers_of
from assay.corpus.errors import BadRow, ShardError

EXTENSION_KEY = b"ARROW:extension:name"
LISTS = ("list", "large_list", "fixed_size_list", "list_view", "large_list_view")
_TENSOR = "arrow.fixed_shape_tensor"
# pyarrow gives what these mean; the storage of the others below is what they mean, in order.
_UNDERSTOOD_EXTENSIONS = ("arrow.uuid", "arrow.bool8")
_PLAIN_EXTENSIONS = (*_UNDERSTOOD_EXTENSIONS, "arrow.json", "ray.data.arrow_tensor", "datasets.features.")
_VALUE_ERRORS = (ArithmeticError, ValueError, TypeError, LookupError, NotImplementedError, pa.ArrowException)


def values_of(field: pa.Field, array: pa.Array, faults: dict[int, str]) -> Sequence[Any]:
    """One Python value per row, a numeric list as a numpy array; what does not decode becomes None and a fault.

    An extension type that means something else than its storage holds is a ShardError.
    """
    _check_meaning(field)
    array = _plain(array)
    order = _logical_order(array.type)
    if isinstance(array, pa.ExtensionArray) and array.type.extension_name not in _UNDERSTOOD_EXTENSIONS:
        array = _plain(array.storage)
    if _is_numeric_list(array.type):
        lists = _numeric_lists(array)
        return lists if order is None else [None if values is None else order(values) for values in lists]
    try:
        values = list(array.to_pylist())
    except _VALUE_ERRORS:
        values = [_value(field.name, i, scalar, faults) for i, scalar in enumerate(array)]
    change = _mappings_in(array.type)
    return values if change is None else [_changed(field.name, i, own, change, faults) for i, own in enumerate(values)]


def _value(name: str, offset: int, scalar: pa.Scalar, faults: dict[int, str]) -> Any:
    try:
        return scalar.as_py()
    except UnicodeDecodeError:
        faults[offset] = f"{name} is not valid UTF-8"
    except _VALUE_ERRORS as error:
        faults[offset] = f"{name} has no Python value, as {scalar.type} ({type(error).__name__})"
    return None


def _changed(name: str, offset: int, value: Any, change: Callable[[Any], Any], faults: dict[int, str]) -> Any:
    try:
        return change(value)
    except BadRow as fault:
        faults[offset] = f"{name} {fault}"
        return None


def _mappings_in(kind: pa.DataType) -> Callable[[Any], Any] | None:
    """What makes mappings of the lists of pairs that pyarrow gives for the maps in a type; None of one without maps.

    (Its own way, ``maps_as_pydicts``, is younger than the pyarrow that is asked for.)
    """
    if pa.types.is_dictionary(kind) or pa.types.is_run_end_encoded(kind):
        return _mappings_in(kind.value_type)
    if pa.types.is_map(kind):
        inner = _mappings_in(kind.item_type)
        return lambda pairs: None if pairs is None else _mapping(pairs, inner)
    if is_any(kind, *LISTS):
        change = _mappings_in(kind.value_type)
        return change and (lambda items: None if items is None else list(map(change, items)))
    if pa.types.is_struct(kind):
        fields = {field.name: change for field in kind if (change := _mappings_in(field.type))}
        return _in_fields(fields) if fields else None
    return None


def _mapping(pairs: Sequence[tuple[Any, Any]], change: Callable[[Any], Any] | None) -> dict[Any, Any]:
    mapping = {key: value if change is None else change(value) for key, value in pairs}
    if len(mapping) < len(pairs):
        raise BadRow("has a map with a key twice")
    return mapping


def _in_fields(fields: dict[str, Callable[[Any], Any]]) -> Callable[[Any], Any]:
    return lambda own: own and own | {name: change(own[name]) for name, change in fields.items()}


def _check_meaning(field: pa.Field) -> None:
    """ShardError for an extension type, anywhere in the field, of which only the storage could be read."""
    kind, name = field.type, extension_name(field)
    is_tensor = name == _TENSOR and isinstance(kind, pa.FixedShapeTensorType)
    if name and not is_tensor and not name.startswith(_PLAIN_EXTENSIONS):
        raise ShardError(f"column {field.name!r} has the extension type {name}, which is not supported")
    if pa.types.is_dictionary(kind) or pa.types.is_run_end_encoded(kind):
        return _check_meaning(pa.field(field.name, kind.value_type))
    storage = kind.storage_type if isinstance(kind, pa.BaseExtensionType) else kind
    for i in range(storage.num_fields):
        below = storage.field(i)
        if isinstance(below.type, pa.FixedShapeTensorType):
            raise ShardError(f"column {field.name!r} holds tensors inside of {storage}, which is not supported")
        _check_meaning(below)


def extension_name(field: pa.Field) -> str:
    """The name of the extension type that a field has or, where its type is not registered, says it has; or empty."""
    if isinstance(field.type, pa.BaseExtensionType):
        return str(field.type.extension_name)
    name: bytes = (field.metadata or {}).get(EXTENSION_KEY, b"")
    return name.decode("utf-8", "replace")


def _logical_order(kind: pa.DataType) -> Callable[[Any], Any] | None:
    """What gives a stored tensor's numbers the shape, and the order, that its type declares; None of what is none."""
    if not isinstance(kind, pa.FixedShapeTensorType):
        return None
    shape, permutation = kind.shape, kind.permutation or range(len(kind.shape))
    return lambda values: values.reshape(shape).transpose(permutation)


def _plain(array: pa.Array) -> pa.Array:
    """The array without dictionary or run-end encoding, where pyarrow can."""
    try:
        if pa.types.is_dictionary(array.type):
            return array.dictionary_decode()
        if pa.types.is_run_end_encoded(array.type):
            return array.values.take(pa.array(run_places(array)))
    except pa.ArrowNotImplementedError:
        pass  # its values can still be taken one by one
    return array


def run_places(array: pa.RunEndEncodedArray) -> npt.NDArray[np.int64]:
    """For each row the place of its value among the values of a run-end encoded array."""
    rows = np.arange(array.offset, array.offset + len(array))
    return np.searchsorted(numbers_of(array.run_ends), rows, side="right")


def dense_type(kind: pa.DataType) -> pa.DataType:
    """The type with offsets in place of views of strings and bytes: the one that pyarrow's kernels take."""
    views = {pa.string_view(): pa.large_string(), pa.binary_view(): pa.large_binary()}
    if pa.types.is_struct(kind):
        return pa.struct([_dense_field(field) for field in kind])
    if pa.types.is_map(kind):
        return pa.map_(_dense_field(kind.key_field), _dense_field(kind.item_field), keys_sorted=kind.keys_sorted)
    if pa.types.is_fixed_size_list(kind):
        return pa.list_(_dense_field(kind.value_field), kind.list_size)
    if pa.types.is_list(kind):
        return pa.list_(_dense_field(kind.value_field))
    if pa.types.is_large_list(kind):
        return pa.large_list(_dense_field(kind.value_field))
    return views.get(kind, kind)


def _dense_field(field: pa.Field) -> pa.Field:
    return field.with_type(dense_type(field.type))


def _is_numeric_list(kind: pa.DataType) -> bool:
    numbers = ("integer", "floating", "boolean")
    return is_any(kind, *LISTS) and is_any(kind.value_type, *numbers)


def is_any(kind: pa.DataType, *names: str) -> bool:
    """Whether one of `pyarrow.types.is_<name>` holds."""
    return any(getattr(pa.types, f"is_{name}")(kind) for name in names)


def _numeric_lists(array: pa.Array) -> list[npt.NDArray[Any] | None]:
    """Views into one flat array: an object per number would cost more than scoring. Nulls are NaN."""
    flat = numbers_of(array.flatten())
    if flat.dtype == object:  # how pyarrow hands out Booleans with nulls
        flat = flat.astype(np.float32)
    if pa.types.is_fixed_size_list(array.type) and not array.null_count:
        return list(flat.reshape(len(array), array.type.list_size))
    sizes = pc.list_value_length(array).to_pylist()
    ends = np.cumsum([size or 0 for size in sizes])
    return [None if size is None else flat[end - size : end] for size, end in zip(sizes, ends.tolist(), strict=True)]
