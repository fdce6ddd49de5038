"""Arrow types as values: what a type means, not what it stores; what has no Python value is a fault of its row."""

from __future__ import annotations

import uuid

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from assay.corpus.checks import check_features, check_id
from assay.corpus.errors import ShardError
from assay.corpus.readers import read
from assay.corpus.shards import find_shards


def from_numbers(kind: pa.DataType, numbers: list[int], width: type) -> pa.Array:
    return pa.Array.from_buffers(kind, len(numbers), [None, pa.py_buffer(np.array(numbers, width).tobytes())])


def values_and_faults(tmp_path, array: pa.Array, metadata: dict | None = None) -> tuple[list, dict]:
    """What a column gives, read from an Arrow file."""
    schema = pa.schema([pa.field("x", array.type, metadata=metadata)])
    with pa.ipc.new_file(str(tmp_path / "a.arrow"), schema) as writer:
        writer.write_batch(pa.RecordBatch.from_arrays([array], schema=schema))
    (shard,) = find_shards(str(tmp_path)).shards
    (chunk,) = read(shard, ["x"])
    return list(chunk.columns["x"]), dict(chunk.faults)


@pytest.mark.parametrize(
    "array",
    [
        from_numbers(pa.date32(), [1, 2**31 - 1, 2], np.int32),
        from_numbers(pa.date64(), [86_400_000, 2**62, 86_400_000], np.int64),
        from_numbers(pa.timestamp("s"), [1, 2**62, 2], np.int64),
        from_numbers(pa.timestamp("us", tz="UTC"), [1, -(2**62), 2], np.int64),
        from_numbers(pa.duration("s"), [1, 2**62, 2], np.int64),
    ],
)
def test_a_value_beyond_pythons_range_is_a_fault_of_its_row(tmp_path, array):
    values, faults = values_and_faults(tmp_path, array)
    assert list(faults) == [1]
    assert faults[1].startswith("x has no Python value")
    assert values[1] is None
    assert [values[0], values[2]] == [array[0].as_py(), array[2].as_py()]


def test_a_wrapped_value_is_a_fault_of_its_row_too(tmp_path):
    bad = from_numbers(pa.date32(), [1, 2**31 - 1], np.int32)
    for array in (
        pa.DictionaryArray.from_arrays(pa.array([0, 1, 0], pa.int8()), bad),
        pa.StructArray.from_arrays([bad.take(pa.array([0, 1, 0]))], ["day"]),
        pa.ListArray.from_arrays(pa.array([0, 1, 2, 2], pa.int32()), bad),
        pa.RunEndEncodedArray.from_arrays(pa.array([1, 2, 3], pa.int32()), bad.take(pa.array([0, 1, 0]))),
    ):
        values, faults = values_and_faults(tmp_path, array)
        assert (list(faults), len(values)) == ([1], 3)
        assert values[0] is not None


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.string_view()])
def test_text_that_is_not_utf8_is_a_fault_of_its_row(tmp_path, kind):
    raw = {pa.string(): pa.binary(), pa.large_string(): pa.large_binary(), pa.string_view(): pa.binary_view()}[kind]
    texts = pa.array([b"fine", b"\xed\xa0\x80" * 9, None], raw).view(kind)
    assert values_and_faults(tmp_path, texts) == (["fine", None, None], {1: "x is not valid UTF-8"})
    coded = pa.DictionaryArray.from_arrays(pa.array([1, 0], pa.int8()), texts)
    assert values_and_faults(tmp_path, coded) == ([None, "fine"], {0: "x is not valid UTF-8"})


OTHER_TYPES = [
    pa.array([True, None]),
    pa.array([1, None], pa.decimal128(5)),
    pa.array([1, None], pa.decimal256(50)),
    pa.array([1, None], pa.time32("s")),
    pa.array([1, None], pa.time64("ns")),
    pa.array([(1, 2, 3), None], pa.month_day_nano_interval()),
    pa.array([b"a", None], pa.binary()),
    pa.array([b"a", None], pa.binary(1)),
    pa.array([b"a", None], pa.large_binary()),
    pa.array([b"a" * 20, None], pa.binary_view()),
    pa.array([{"a": 1}, None]),
    pa.array([None, None], pa.null()),
    pa.array(["a", None]).dictionary_encode(),
    pa.array([["a"], None], pa.list_view(pa.string_view())),
    pa.UnionArray.from_sparse(pa.array([0, 1], pa.int8()), [pa.array([1, 2]), pa.array(["a", None])]),
    pa.UnionArray.from_dense(
        pa.array([0, 1], pa.int8()), pa.array([0, 0], pa.int32()), [pa.array([1]), pa.array([None], pa.string())]
    ),
    pa.RunEndEncodedArray.from_arrays(pa.array([1, 2], pa.int16()), pa.array(["a", None])),
]


@pytest.mark.parametrize("array", OTHER_TYPES, ids=lambda array: str(array.type).split("<")[0])
def test_every_type_gives_its_rows(tmp_path, array):
    values, faults = values_and_faults(tmp_path, array)
    assert faults == {}
    assert values == array.to_pylist()


MAP = pa.map_(pa.string(), pa.int8())
PAIRED = pa.struct({"m": MAP, "n": pa.int8()})
MAPS = [
    ([[("a", 1), ("b", None)], None, []], MAP, [{"a": 1, "b": None}, None, {}]),
    ([[[("a", 1)], None], None], pa.list_(MAP), [[{"a": 1}, None], None]),
    (
        [{"m": [("a", 1)], "n": 2}, {"m": None, "n": 3}, None],
        PAIRED,
        [{"m": {"a": 1}, "n": 2}, {"m": None, "n": 3}, None],
    ),
    ([[("a", [("b", 1)])]], pa.map_(pa.string(), MAP), [{"a": {"b": 1}}]),
]


@pytest.mark.parametrize(("values", "kind", "expected"), MAPS, ids=lambda own: str(own)[:24])
def test_maps_are_mappings(tmp_path, values, kind, expected):
    """As in JSON, whose conversations and tools have them: pyarrow gives pairs."""
    assert values_and_faults(tmp_path, pa.array(values, kind)) == (expected, {})


def test_a_map_with_a_key_twice_is_a_fault_of_its_row(tmp_path):
    found = values_and_faults(tmp_path, pa.array([[("a", 1)], [("a", 1), ("a", 2)]], MAP))
    assert found == ([{"a": 1}, None], {1: "x has a map with a key twice"})


@pytest.mark.parametrize("kind", [pa.list_view(pa.int32()), pa.large_list_view(pa.float32())])
def test_list_views_are_numeric_lists(tmp_path, kind):
    values, _ = values_and_faults(tmp_path, pa.array([[1], None, [2, 3], []], kind))
    assert [value if value is None else value.tolist() for value in values] == [[1], None, [2, 3], []]


IDS = [uuid.UUID(int=7), uuid.UUID(int=1 << 100)]


@pytest.mark.parametrize("suffix", ["parquet", "arrow"])
def test_a_uuid_is_a_text_in_canonical_form(tmp_path, suffix):
    array = pa.array([value.bytes for value in IDS] + [None], pa.uuid())
    if suffix == "arrow":
        values, _ = values_and_faults(tmp_path, array)
    else:
        pq.write_table(pa.table({"x": array}), tmp_path / "a.parquet")
        (shard,) = find_shards(str(tmp_path)).shards
        values = [value for chunk in read(shard, ["x"]) for value in chunk.columns["x"]]
    assert [check_id("x", value) for value in values[:2]] == [str(value) for value in IDS]
    assert values[2] is None


def test_a_tensor_has_its_logical_order(tmp_path):
    kind = pa.fixed_shape_tensor(pa.float32(), [2, 3], permutation=[1, 0])
    storage = pa.array([[1, 2, 3, 4, 5, 6], None, [7, 8, 9, 10, 11, 12]], pa.list_(pa.float32(), 6))
    values, _ = values_and_faults(tmp_path, pa.ExtensionArray.from_storage(kind, storage))
    assert check_features("x", values[0], 6).tolist() == [1, 4, 2, 5, 3, 6]
    assert values[1] is None
    assert check_features("x", values[2], 6).tolist() == [7, 10, 8, 11, 9, 12]
    plain = pa.fixed_shape_tensor(pa.float32(), [2, 3])
    values, _ = values_and_faults(tmp_path, pa.ExtensionArray.from_storage(plain, storage))
    assert check_features("x", values[0], 6).tolist() == [1, 2, 3, 4, 5, 6]


class Scaled(pa.ExtensionType):
    """Integers that stand for tenths."""

    def __init__(self) -> None:
        super().__init__(pa.int64(), "somebody.scaled")

    def __arrow_ext_serialize__(self) -> bytes:
        return b""

    @classmethod
    def __arrow_ext_deserialize__(cls, storage_type, serialized):
        return cls()


@pytest.mark.parametrize("is_registered", [True, False])
@pytest.mark.parametrize("is_inside", [True, False])
def test_a_type_that_means_something_else_is_refused_by_name(tmp_path, is_registered, is_inside):
    if is_registered:
        pa.register_extension_type(Scaled())
    try:
        array = pa.ExtensionArray.from_storage(Scaled(), pa.array([15]))
        if is_inside:
            array = pa.StructArray.from_arrays([array], ["a"])
        with pytest.raises(ShardError, match=r"extension type somebody\.scaled"):
            values_and_faults(tmp_path, array)
    finally:
        if is_registered:
            pa.unregister_extension_type("somebody.scaled")


def test_known_types_whose_storage_is_what_they_mean(tmp_path):
    json = pa.ExtensionArray.from_storage(pa.json_(), pa.array(['{"a": 1}', None]))
    assert values_and_faults(tmp_path, json) == (['{"a": 1}', None], {})
    flags = pa.ExtensionArray.from_storage(pa.bool8(), pa.array([0, 5, None], pa.int8()))
    assert values_and_faults(tmp_path, flags) == ([False, True, None], {})
    opaque = pa.ExtensionArray.from_storage(pa.opaque(pa.int32(), "a", "b"), pa.array([1], pa.int32()))
    with pytest.raises(ShardError, match=r"extension type arrow\.opaque"):
        values_and_faults(tmp_path, opaque)
