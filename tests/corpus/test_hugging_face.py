"""Every feature type of Hugging Face's `datasets`, as it lies on disk: its value, or refused by name."""

from __future__ import annotations

import datetime
import subprocess
import sys
from decimal import Decimal

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Value
from datasets.features.features import _FEATURE_TYPES

from assay.corpus.copying import copy_rows
from assay.corpus.errors import ShardError
from assay.corpus.readers import columns_of, read
from assay.corpus.shards import find_shards
from assay.corpus.storage import Store

NOON = datetime.datetime(2020, 1, 2, 12, 0, 0)
MEDIA = {"bytes": b"x", "path": None}
COLUMNS = {
    "null": (Value("null"), None),
    "bool": (Value("bool"), True),
    **{kind: (Value(kind), 7) for kind in ("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64")},
    **{kind: (Value(kind), 0.5) for kind in ("float32", "float64")},
    "float16": (Value("float16"), np.float16(0.5)),
    "time32": (Value("time32[ms]"), NOON.time()),
    "time64": (Value("time64[us]"), NOON.time()),
    "timestamp": (Value("timestamp[us]"), NOON),
    "timestamp_zone": (Value("timestamp[us, tz=UTC]"), NOON.replace(tzinfo=datetime.timezone.utc)),
    "date32": (Value("date32"), NOON.date()),
    "date64": (Value("date64"), NOON.date()),
    "duration": (Value("duration[ms]"), datetime.timedelta(seconds=1)),
    "decimal128": (Value("decimal128(5, 2)"), Decimal("1.25")),
    "decimal256": (Value("decimal256(50, 2)"), Decimal("1.25")),
    **{kind: (Value(kind), b"x") for kind in ("binary", "large_binary", "binary_view")},
    **{kind: (Value(kind), "ü") for kind in ("string", "large_string", "string_view")},
    "label": (datasets.ClassLabel(names=["a", "b"]), 1),
    "list": (datasets.List(Value("int8")), [1, 2]),
    "fixed_list": (datasets.List(Value("float32"), length=2), [1, 2]),
    "large_list": (datasets.LargeList(Value("string")), ["a"]),
    "tags": (datasets.List(datasets.ClassLabel(names=["O", "B"])), [0, 1]),
    "sequence": (datasets.Sequence({"x": Value("int8")}), {"x": [1, 2]}),
    "structs": ([{"x": Value("int8"), "y": Value("string")}], [{"x": 1, "y": "a"}]),
    "struct": ({"a": Value("string"), "g": datasets.Array2D((1, 2), "int8")}, {"a": "q", "g": [[1, 2]]}),
    "translation": (datasets.Translation(["de", "en"]), {"de": "x", "en": "y"}),
    "translations": (
        datasets.TranslationVariableLanguages(["de", "en"]),
        {"language": ["de"], "translation": ["x"]},
    ),
    "image": (datasets.Image(decode=False), MEDIA),
    "audio": (datasets.Audio(decode=False), {"bytes": None, "path": "a.wav"}),
    "video": (datasets.Video(decode=False), MEDIA),
    "pdf": (datasets.Pdf(decode=False), MEDIA),
    "array2": (datasets.Array2D((2, 2), "float32"), [[1, 2], [3, 4]]),
    "array2_uneven": (datasets.Array2D((None, 2), "float32"), [[1, 2], [3, 4]]),
    "array3": (datasets.Array3D((1, 2, 2), "uint8"), [[[1, 2], [3, 4]]]),
    "array4": (datasets.Array4D((1, 1, 2, 2), "int64"), [[[[1, 2], [3, 4]]]]),
    "array5": (datasets.Array5D((1, 1, 1, 2, 2), "float64"), [[[[[1, 2], [3, 4]]]]]),
}
ROWS = 3


def storage(kind: pa.DataType, values: list) -> pa.Array:
    """Rows of a type, extension types inside of it as well."""
    if isinstance(kind, pa.BaseExtensionType):
        return pa.ExtensionArray.from_storage(kind, storage(kind.storage_type, values))
    if pa.types.is_struct(kind):
        return pa.StructArray.from_arrays(
            [storage(field.type, [value[field.name] for value in values]) for field in kind], fields=list(kind)
        )
    return pa.array(values, kind)


def table() -> pa.Table:
    schema = datasets.Features({name: feature for name, (feature, _) in COLUMNS.items()}).arrow_schema
    return pa.table([storage(field.type, [COLUMNS[field.name][1]] * ROWS) for field in schema], schema=schema)


@pytest.fixture(scope="module", params=["a.parquet", "a.arrow"])
def shard(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("features") / request.param
    if request.param == "a.parquet":
        pq.write_table(table(), path)
    else:  # as `save_to_disk` writes it
        with pa.ipc.new_stream(str(path), table().schema) as writer:
            writer.write_table(table())
    (found,) = find_shards(str(path)).shards
    return found


def plain(value: object) -> object:
    return value.tolist() if isinstance(value, np.ndarray) else value


@pytest.mark.parametrize("name", COLUMNS)
def test_every_type_has_its_value(shard, name):
    (chunk,) = read(shard, [name])
    assert not chunk.faults
    assert [plain(value) for value in chunk.columns[name]] == [COLUMNS[name][1]] * ROWS


@pytest.mark.parametrize("shard", ["a.arrow"], indirect=True)  # one is enough for a process of its own
def test_values_do_not_depend_on_whether_datasets_is_imported(shard):
    program = """
import sys
from assay.corpus.readers import read
from assay.corpus.shards import find_shards
(shard,) = find_shards(sys.argv[1]).shards
for name in sys.argv[2:]:
    (chunk,) = read(shard, [name])
    print(name, [value.tolist() if hasattr(value, "tolist") else value for value in chunk.columns[name]])
assert "datasets" not in sys.modules
"""
    names = [name for name in COLUMNS if name.startswith("array") or name in ("struct", "image", "tags")]
    command = [sys.executable, "-c", program, shard.store.full(shard.path), *names]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    for name, line in zip(names, run.stdout.splitlines(), strict=True):
        (chunk,) = read(shard, [name])
        assert line == f"{name} {[plain(value) for value in chunk.columns[name]]}"


def test_classes_are_those_of_the_features(shard):
    facts = columns_of(shard)
    assert {name: fact.classes for name, fact in facts.items() if fact.classes} == {
        "label": ("a", "b"),
        "tags": ("O", "B"),
    }
    assert {name: facts[name].type for name in ("image", "audio", "video", "pdf")} == {
        name: name for name in ("image", "audio", "video", "pdf")
    }


def test_a_selection_keeps_the_features(shard, tmp_path):
    def whole(path: str) -> pa.Table:
        with pa.memory_map(path) as file:
            return pq.read_table(path) if path.endswith("parquet") else pa.ipc.open_stream(file).read_all()

    copy_rows(shard, np.array([True, False, True]), Store.at(str(tmp_path)))
    source, copied = whole(shard.store.full(shard.path)), whole(str(tmp_path / shard.path))
    assert copied.schema.equals(source.schema, check_metadata=True)
    assert copied.equals(source.slice(0, 2))
    assert datasets.Features.from_arrow_schema(copied.schema) == datasets.Features.from_arrow_schema(source.schema)


def test_media_kinds_are_told_by_name(tmp_path):
    """Whatever feature of files the installed `datasets` has is read as bytes and path, and says what it is."""
    media = {
        name: kind
        for name, kind in _FEATURE_TYPES.items()
        if str(getattr(kind, "pa_type", "")).startswith("struct<bytes")
    }
    schema = datasets.Features({name: kind(decode=False) for name, kind in media.items()}).arrow_schema
    pq.write_table(schema.empty_table(), tmp_path / "a.parquet")
    (shard,) = find_shards(str(tmp_path)).shards
    facts = columns_of(shard)
    assert {name: facts[name].type for name in media} == {name: name.lower() for name in media}


def test_a_type_that_only_its_maker_understands_is_refused_by_name(tmp_path):
    field = pa.field("x", pa.binary(), metadata={b"ARROW:extension:name": b"maker.codec"})
    pq.write_table(pa.table([pa.array([b"1"])], schema=pa.schema([field])), tmp_path / "a.parquet")
    (shard,) = find_shards(str(tmp_path)).shards
    with pytest.raises(ShardError, match=r"column 'x' has the extension type maker\.codec"):
        list(read(shard, ["x"]))
