"""What a shard says of its columns: types and classes, from schemas, Hugging Face features or the first rows."""

from __future__ import annotations

import gzip
import json

import datasets
import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from assay.corpus.errors import ShardError
from assay.corpus.format import ColumnFacts
from assay.corpus.readers import columns_of
from assay.corpus.shards import find_shards

FEATURES = datasets.Features(
    {
        "label": datasets.ClassLabel(names=["cat", "dog"]),
        "tags": datasets.List(datasets.ClassLabel(names=["O", "B-PER"])),
        "deep": datasets.List(datasets.LargeList(datasets.ClassLabel(names=["x"]))),
        "old": datasets.Sequence({"kind": datasets.ClassLabel(names=["u", "v"])}),
        "image": datasets.Image(decode=False),
        "images": datasets.List(datasets.Image(decode=False)),
        "sound": datasets.Audio(decode=False),
        "meta": {"lang": datasets.Value("string"), "class": datasets.ClassLabel(names=["q"])},
        "grid": datasets.Array2D((2, 2), "float32"),
        "chat": [{"role": datasets.Value("string"), "content": datasets.Value("large_string")}],
        "when": datasets.Value("timestamp[us, tz=UTC]"),
        "price": datasets.Value("decimal128(5, 2)"),
        "raw": datasets.Value("binary"),
        "half": datasets.Value("float16"),
    }
)
EXPECTED = {
    "label": ColumnFacts("int64", ("cat", "dog")),
    "tags": ColumnFacts("list<int64>", ("O", "B-PER")),
    "deep": ColumnFacts("list<list<int64>>", ("x",)),
    "old": ColumnFacts("struct<kind: list<int64>>"),
    "old.kind": ColumnFacts("list<int64>", ("u", "v")),
    "image": ColumnFacts("image"),
    "image.bytes": ColumnFacts("binary"),
    "image.path": ColumnFacts("string"),
    "images": ColumnFacts("list<image>"),
    "sound": ColumnFacts("audio"),
    "sound.bytes": ColumnFacts("binary"),
    "sound.path": ColumnFacts("string"),
    "meta": ColumnFacts("struct<lang: string, class: int64>"),
    "meta.lang": ColumnFacts("string"),
    "meta.class": ColumnFacts("int64", ("q",)),
    "grid": ColumnFacts("list<list<float>>"),
    "chat": ColumnFacts("list<struct<role: string, content: string>>"),
    "when": ColumnFacts("timestamp[us, tz=UTC]"),
    "price": ColumnFacts("decimal128(5, 2)"),
    "raw": ColumnFacts("binary"),
    "half": ColumnFacts("halffloat"),
}


def data_set() -> datasets.Dataset:
    schema = FEATURES.arrow_schema
    return datasets.Dataset(pa.table([_null(field.type) for field in schema], schema=schema))


def _null(kind: pa.DataType) -> pa.Array:
    is_extension = isinstance(kind, pa.BaseExtensionType)
    return pa.ExtensionArray.from_storage(kind, _null(kind.storage_type)) if is_extension else pa.nulls(1, kind)


def facts(path) -> dict[str, ColumnFacts]:
    return columns_of(find_shards(str(path)).shards[0])


def test_hugging_face_parquet(tmp_path):
    data_set().to_parquet(tmp_path / "a.parquet")
    assert facts(tmp_path) == EXPECTED
    assert list(facts(tmp_path)) == list(EXPECTED)


def test_a_saved_data_set(tmp_path):
    data_set().save_to_disk(tmp_path / "set")
    assert facts(tmp_path / "set") == EXPECTED


def test_a_saved_data_sets_description_counts_before_its_files(tmp_path):
    data = datasets.Dataset.from_dict({"label": [0, 1]}).cast_column("label", datasets.ClassLabel(names=["a", "b"]))
    data.save_to_disk(tmp_path / "set")
    assert facts(tmp_path / "set")["label"].classes == ("a", "b")
    info = tmp_path / "set/dataset_info.json"
    info.write_text(info.read_text().replace('"a"', '"changed"'))
    assert facts(tmp_path / "set")["label"].classes == ("changed", "b")
    info.write_text("{}")
    assert facts(tmp_path / "set")["label"].classes == ("a", "b")
    info.write_text("[" * 100_000)
    with pytest.raises(ShardError):
        facts(tmp_path / "set")


def test_dictionaries_of_an_arrow_file_are_classes_and_those_of_other_files_are_not_known(tmp_path):
    labels = pa.array(["b", "a", "b"]).dictionary_encode()
    table = pa.table({"label": labels, "number": pa.array([1, 2, 1]).dictionary_encode()})
    for name, create in (("file.arrow", pa.ipc.new_file), ("stream.arrow", pa.ipc.new_stream)):
        with create(str(tmp_path / name), table.schema) as writer:
            writer.write_table(table)
    pq.write_table(table, tmp_path / "a.parquet")
    assert facts(tmp_path / "file.arrow") == {
        "label": ColumnFacts("string", ("b", "a")),
        "number": ColumnFacts("int64"),
    }
    assert facts(tmp_path / "stream.arrow")["label"] == ColumnFacts("string")
    assert facts(tmp_path / "a.parquet")["label"] == ColumnFacts("string")


ROWS = [
    {"text": "a", "n": 1, "x": 0.5, "deep": {"lang": "en", "more": {"k": [1]}}, "mixed": 1, "chat": [{"role": "user"}]},
    {"text": "b", "n": 2, "x": 1, "deep": None, "mixed": "a", "chat": [{"content": "hi"}], "none": None},
    {"half": {"x": 1, "y": 1}},
    {"half": {"x": "a", "y": 2}, "part": {"x": 1}},
    {"part": 1},
    "no object",
]


@pytest.mark.parametrize("name", ["a.jsonl", "a.json.gz"])
def test_json_lines(tmp_path, name):
    text = "\n".join(json.dumps(row) for row in ROWS).encode()
    (tmp_path / name).write_bytes(gzip.compress(text) if name.endswith("gz") else text)
    assert {name: fact.type for name, fact in facts(tmp_path).items()} == {
        "text": "string",
        "n": "int64",
        "x": "double",
        "deep": "struct<lang: string, more: struct<k: list<int64>>>",
        "deep.lang": "string",
        "deep.more": "struct<k: list<int64>>",
        "deep.more.k": "list<int64>",
        "mixed": "mixed",
        "chat": "list<struct<role: string, content: string>>",
        "none": "null",
        "half": "struct<x: mixed, y: int64>",
        "half.x": "mixed",
        "half.y": "int64",
        "part": "mixed",
        "part.x": "int64",
    }


def test_hostile_json_tells_something_or_nothing(tmp_path):
    lines = [
        b'{"deep": ' + b'{"a": ' * 900 + b"1" + b"}" * 901,
        b'{"lists": ' + b"[" * 900 + b"]" * 900 + b"}",
        b"[" * 100_000,
        b'{"big": ' + b"9" * 40 + b"}",
        b'{"bad": "\\ud800", "good": 1}',
    ]
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines))
    found = facts(tmp_path)
    assert {found[name].type for name in ("big", "bad")} == {"mixed"}
    assert found["good"].type == "int64"
    assert len(found) < 50


def test_json_of_very_many_keys_tells_little(tmp_path, monkeypatch):
    monkeypatch.setattr("assay.corpus.facts._MOST_FIELDS", 10)
    many = {f"k{i}": i for i in range(11)}
    (tmp_path / "a.jsonl").write_text(json.dumps({"map": many, "x": 1}))
    assert facts(tmp_path) == {"map": ColumnFacts("struct<…>"), "x": ColumnFacts("int64")}
    (tmp_path / "a.jsonl").write_text(json.dumps(many))
    with pytest.raises(ShardError, match="has 11 columns"):
        facts(tmp_path)


def test_csv(tmp_path):
    (tmp_path / "a.csv").write_text('text,n,x,list,empty,twice,twice\na,1,0.5,"[1.5]",,1,1\nb,,2,[],,1,1\n')
    assert {name: fact.type for name, fact in facts(tmp_path).items()} == {
        "text": "string",
        "n": "int64",
        "x": "double",
        "list": "list<double>",
        "empty": "null",
    }


def test_only_the_beginning_is_read(tmp_path):
    good = b'{"text": "a"}\n' * 200_000
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(good) + b"damaged")
    assert facts(tmp_path) == {"text": ColumnFacts("string")}


def test_a_columns_own_name_wins_over_a_path(tmp_path):
    table = pa.table({"meta": [{"lang": "en"}], "meta.lang": [1], "twice": [1]}).append_column("twice", pa.array([2]))
    pq.write_table(table, tmp_path / "a.parquet")
    assert {name: fact.type for name, fact in facts(tmp_path).items()} == {
        "meta": "struct<lang: string>",
        "meta.lang": "int64",
    }


@pytest.mark.parametrize(
    "metadata",
    [b"", b"{", b"[1]", b'{"info": null}', b'{"info": {"features": [1]}}', b"[" * 100_000, b"\xff"]
    + [json.dumps({"info": {"features": {"a": feature}}}).encode() for feature in ([], [1, 2], 3, {"_type": []})]
    + [json.dumps({"info": {"features": {"a": {"_type": "ClassLabel", "names": bad}}}}).encode() for bad in (1, [1])],
)
def test_features_that_are_none_tell_nothing(tmp_path, metadata):
    schema = pa.schema([("a", pa.int64())], metadata={b"huggingface": metadata})
    pq.write_table(schema.empty_table(), tmp_path / "a.parquet")
    assert facts(tmp_path) == {"a": ColumnFacts("int64")}


def test_a_class_label_that_is_no_integer_has_no_classes(tmp_path):
    features = {"info": {"features": {"a": {"_type": "ClassLabel", "names": ["x"]}}}}
    schema = pa.schema([("a", pa.string())], metadata={b"huggingface": json.dumps(features)})
    pq.write_table(schema.empty_table(), tmp_path / "a.parquet")
    assert facts(tmp_path) == {"a": ColumnFacts("string")}


def test_damage_is_an_error_as_it_is_when_reading(tmp_path):
    for name, content in (("a.parquet", b"PAR1"), ("a.arrow", b""), ("a.jsonl.gz", b"x"), ("a.jsonl", b"[\n")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ShardError):
            facts(tmp_path / name)


def test_dictionaries_of_another_file_system():
    table = pa.table({"label": pa.array(["b", "a"]).dictionary_encode()})
    for name, create, classes in (("a.arrow", pa.ipc.new_file, ("b", "a")), ("b.arrow", pa.ipc.new_stream, None)):
        sink = pa.BufferOutputStream()
        with create(sink, table.schema) as writer:
            writer.write_table(table)
        fsspec.filesystem("memory").pipe_file(f"/facts_arrow/{name}", sink.getvalue().to_pybytes())
        assert facts(f"memory://facts_arrow/{name}") == {"label": ColumnFacts("string", classes)}


def test_another_file_system():
    fs = fsspec.filesystem("memory")
    fs.pipe_file("/facts/a.jsonl", b'{"text": "a"}\n')
    assert facts("memory://facts") == {"text": ColumnFacts("string")}
