"""Features on disk: whole or not at all, mapped without a copy, and refused where they are not what is expected."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import warnings

import fsspec
import numpy as np
import pyarrow as pa
import pytest
import torch

from assay.corpus import features as module
from assay.corpus.errors import CorpusError
from assay.corpus.features import (
    FeatureSpec,
    FeatureStore,
    FeatureWriter,
    Place,
    open_features,
    quantize,
)
from assay.corpus.shards import find_shards
from assay.corpus.storage import Store
from assay.corpus.tables import METADATA_KEY
from assay.ops import topk_scan

DTYPES = ["float32", "float16", "bfloat16", "int8"]
FOOTER = {
    "format": 1,
    "version": "0",
    "input": {"path": "a.jsonl", "size": 10, "mtime_ns": 5, "rows": 30},
    "recipe": {"seed": 1, "methods": [{"method": "trak", "dim": 6}]},
    "recipe_hash": "sha256:1",
    "models": {"model": "sha256:2"},
    "seed": 1,
}


@pytest.fixture(params=["local", "memory"])
def store(request, tmp_path) -> Store:
    if request.param == "local":
        return Store.at(str(tmp_path))
    fs = fsspec.filesystem("memory")
    if fs.exists("/features"):
        fs.rm("/features", recursive=True)
    return Store.at("memory://features")


def write(store, path, features, dtype="float16", step=7, footer=FOOTER, method="trak", first=0):
    """Rows are the even numbers, ids the path and the row."""
    spec = FeatureSpec(method, features.shape[1], dtype, {"kind": "Kronecker", "seed": 3})
    with tempfile.TemporaryFile() as spool:
        writer = FeatureWriter(spec, spool)
        for start in range(0, len(features), step):
            rows = 2 * np.arange(start, min(start + step, len(features))) + first
            writer.add(rows, [f"{path}:{row}" for row in rows], features[start : start + step])
        writer.save(store, path, footer)
    return spec


def whole(file):
    return torch.cat([batch.values() for batch in file.batches()])


@pytest.mark.parametrize("dtype", DTYPES)
def test_round_trip(store, dtype, monkeypatch):
    monkeypatch.setattr(module, "MAX_BATCH_ROWS", 8)
    features = torch.randn(30, 6)
    spec = write(store, "deep/a.arrow", features, dtype)
    file = open_features(store, "deep/a.arrow", {"recipe_hash": "sha256:1", "features": {"dtype": dtype}})
    assert (file.spec, file.rows, file.shard) == (spec, 30, "a.jsonl")
    assert file.metadata["input"] == FOOTER["input"]
    batches = list(file.batches())
    assert [len(batch.rows) for batch in batches] == [8, 8, 8, 6]
    assert np.concatenate([batch.rows for batch in batches]).tolist() == list(range(0, 60, 2))
    assert [i for batch in batches for i in batch.ids.to_pylist()] == [f"deep/a.arrow:{r}" for r in range(0, 60, 2)]
    assert all(batch.features.dtype == spec.torch_dtype for batch in batches)
    got = whole(file)
    if dtype == "int8":
        assert got.dtype == torch.float32
        assert bool(((got - features).abs() <= features.abs().amax(1, keepdim=True) / 254 * 1.001).all())
    else:
        assert torch.equal(got, features.to(spec.torch_dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_arrow_columns_are_as_documented(tmp_path, dtype):
    """What another Arrow reader sees."""
    features = torch.randn(5, 3)
    write(Store.at(str(tmp_path)), "a.arrow", features, dtype)
    with pa.ipc.open_file(str(tmp_path / "a.arrow")) as reader:
        table = reader.read_all()
    element = {"float32": pa.float32(), "float16": pa.float16(), "bfloat16": pa.uint16(), "int8": pa.int8()}[dtype]
    assert table.column_names == ["row", "id", "feature"] + ["scale"] * (dtype == "int8")
    kind = table.schema.field("feature").type
    assert (kind.value_type, kind.list_size) == (element, 3)
    assert table.schema.field("row").type == pa.int64()
    assert table.schema.field("id").type == pa.string()
    if dtype in ("float32", "float16"):
        torch.testing.assert_close(torch.tensor(table["feature"].to_pylist()), features, rtol=1e-3, atol=1e-3)
    footer = table.schema.metadata[METADATA_KEY].decode()
    assert footer.startswith('{"features":{"dim":3,"dtype":"')  # sorted keys, no spaces: the same run, the same bytes


def test_local_files_are_mapped_not_copied(tmp_path):
    """Neither a copy nor a warning; and the tensor outlives the reader, the file object and the file's name."""
    store = Store.at(str(tmp_path))
    features = torch.randn(2000, 64)
    write(store, "a.arrow", features, "bfloat16", step=500)
    file = open_features(store, "a.arrow")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        before = pa.total_allocated_bytes()
        (batch,) = list(file.batches())
        assert pa.total_allocated_bytes() - before < 1000
        got = batch.features
    with open("/proc/self/maps") as maps:
        areas = [line.split() for line in maps if str(tmp_path / "a.arrow") in line]
    bounds = [[int(x, 16) for x in area[0].split("-")] for area in areas]
    assert any(low <= got.data_ptr() < high for low, high in bounds)
    del batch, file
    os.unlink(tmp_path / "a.arrow")
    assert torch.equal(got, features.bfloat16())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [0, 1, 50])
def test_the_same_features_are_the_same_bytes(tmp_path, dtype, rows, monkeypatch):
    """However they arrive: batch sizes of the writer's caller leave no trace."""
    monkeypatch.setattr(module, "MAX_BATCH_ROWS", 16)
    store, features = Store.at(str(tmp_path)), torch.randn(rows, 4)
    for name, step in (("a", 50), ("b", 3), ("c", 17)):
        folder = Store.at(store.full(name))
        write(folder, "x.arrow", features, dtype, step=step)
    content = [(tmp_path / name / "x.arrow").read_bytes() for name in "abc"]
    assert content[0] == content[1] == content[2]
    assert open_features(Store.at(store.full("a")), "x.arrow").rows == rows


def test_quantize():
    rows = torch.tensor([[0.0, 0.0, 0.0], [127.0, -63.5, 1.4], [-1e-3, 5e-4, 0], [torch.nan, 1, 1], [1, -torch.inf, 0]])
    steps, scales = quantize(rows)
    assert steps[:2].tolist() == [[0, 0, 0], [127, -64, 1]]
    assert steps[2].tolist() == [-127, 64, 0]
    assert scales[:2].tolist() == [0.0, 1.0]
    assert scales[3:].isnan().tolist() == [True, True]
    wide = torch.randn(200, 33) * torch.logspace(-30, 30, 200)[:, None]
    steps, scales = quantize(wide)
    assert int(steps.min()) >= -127
    error = (steps * scales[:, None] - wide).abs() / scales[:, None]
    assert float(error.max()) <= 0.5001
    assert bool((steps.abs().amax(1) == 127).all())


def test_overflow_is_an_error_and_nan_a_feature(tmp_path):
    store = Store.at(str(tmp_path))
    with pytest.raises(ValueError, match=r"values up to 7e\+04 overflow float16; store them as bfloat16"):
        write(store, "a.arrow", torch.full((2, 2), 7e4))
    write(store, "a.arrow", torch.tensor([[torch.nan, torch.inf]]))
    (got,) = whole(open_features(store, "a.arrow"))
    assert got.isnan().tolist() == [True, False]
    assert got[1] == torch.inf
    assert store.files() == ["a.arrow"]


def test_shards_keep_their_paths(tmp_path):
    (tmp_path / "in/deep").mkdir(parents=True)
    for name in ("a.jsonl.gz", "deep/b.parquet", "c.arrow"):
        (tmp_path / "in" / name).write_bytes(b"")
    paths = [f"{shard.stem}.arrow" for shard in find_shards(str(tmp_path / "in")).shards]
    assert paths == ["a.arrow", "c.arrow", "deep/b.arrow"]


def test_a_failed_or_killed_write_leaves_nothing(store, tmp_path, monkeypatch):
    write(store, "a.arrow", torch.zeros(3, 2))
    with monkeypatch.context() as patch:
        patch.setattr(pa.RecordBatchFileWriter, "write_batch", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            write(store, "a.arrow", torch.ones(3, 2))
    assert store.files() == ["a.arrow"]
    assert bool((whole(open_features(store, "a.arrow")) == 0).all())
    write(store, "a.arrow", torch.ones(3, 2))  # and is made again
    assert bool((whole(open_features(store, "a.arrow")) == 1).all())


def test_killed_in_the_middle(tmp_path):
    code = f"""
import os, signal, tempfile, torch
import pyarrow as pa
from assay.corpus.features import FeatureSpec, FeatureWriter
from assay.corpus.storage import Store
original = pa.RecordBatchFileWriter.write_batch
def die(self, batch):
    original(self, batch)
    os.kill(os.getpid(), signal.SIGKILL)
pa.RecordBatchFileWriter.write_batch = die
with tempfile.TemporaryFile() as spool:
    writer = FeatureWriter(FeatureSpec("trak", 4), spool)
    writer.add(range(9), [str(i) for i in range(9)], torch.randn(9, 4))
    writer.save(Store.at({str(tmp_path)!r}), "a.arrow", {{}})
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.returncode == -9, run.stderr
    store = Store.at(str(tmp_path))
    assert open_features(store, "a.arrow") is None
    (left,) = store.files()  # a temporary under a hidden name, for the next run to sweep
    assert store.sweep(older_than=-1) == [left]
    with pytest.raises(CorpusError, match="no features found"):
        FeatureStore(str(tmp_path))


def test_wrong_batches_are_refused(tmp_path):
    with tempfile.TemporaryFile() as spool:
        writer = FeatureWriter(FeatureSpec("trak", 4), spool)
        for rows, ids, features in (
            ([0], ["a"], torch.zeros(1, 5)),
            ([0, 1], ["a", "b"], torch.zeros(1, 4)),
            ([0], ["a", "b"], torch.zeros(1, 4)),
            ([0], ["a"], torch.zeros(1, 4, dtype=torch.int64)),
        ):
            with pytest.raises(ValueError, match=r"features: expected a float tensor \(\d, 4\)"):
                writer.add(rows, ids, features)
        assert writer.rows == 0
    with pytest.raises(ValueError, match="unknown dtype 'float8'; expected one of float32, float16, bfloat16, int8"):
        FeatureSpec("trak", 4, "float8")
    with pytest.raises(ValueError, match="dim of at least 1, got 0"):
        FeatureSpec("trak", 0)


@pytest.mark.parametrize(
    ("expect", "words"),
    [
        ({"recipe_hash": "sha256:9"}, "features from another recipe (recipe_hash is sha256:1, expected sha256:9)"),
        ({"recipe": {"seed": 2}}, "features from another recipe (recipe.seed is 1, expected 2)"),
        ({"models": {"model": "sha256:3"}}, "features of other models (models.model is sha256:2, expected sha256:3)"),
        ({"models": {"other": "x"}}, "features of other models (models.other is None, expected x)"),
        ({"input": {"path": "a.jsonl", "size": 11}}, "features of another input (input.size is 10, expected 11)"),
        ({"seed": 7}, "features under another seed (seed is 1, expected 7)"),
        ({"features": {"dim": 512}}, "features of another kind (features.dim is 6, expected 512)"),
        ({"features": {"sketch": {"seed": 4}}}, "features of another kind (features.sketch.seed is 3, expected 4)"),
    ],
)
def test_what_is_not_expected_is_named(tmp_path, expect, words):
    store = Store.at(str(tmp_path))
    write(store, "a.arrow", torch.zeros(4, 6))
    for refuse in (lambda: open_features(store, "a.arrow", expect), lambda: FeatureStore(str(tmp_path), expect)):
        with pytest.raises(CorpusError) as caught:
            refuse()
        assert str(caught.value).startswith(f"{tmp_path}/a.arrow: {words}; ")
        assert "\n" not in str(caught.value)
    assert open_features(store, "a.arrow", FOOTER) is not None
    assert open_features(store, "b.arrow", expect) is None


def forge(path, columns, metadata, schema=None):
    table = pa.table(columns, schema=schema)
    with pa.ipc.new_file(str(path), table.schema.with_metadata(metadata)) as writer:
        writer.write_table(table)


def test_foreign_files_are_refused_and_not_overwritten(tmp_path):
    store = Store.at(str(tmp_path))
    (tmp_path / "a.arrow").write_bytes(b"ARROW1 and then nothing")
    (tmp_path / "empty.arrow").write_bytes(b"")
    forge(tmp_path / "corpus.arrow", {"text": ["somebody's corpus"]}, None)
    for name, words in (
        ("a", "not a readable feature file"),
        ("empty", "not a readable feature file"),
        ("corpus", "not a feature file"),
    ):
        before = (tmp_path / f"{name}.arrow").read_bytes()
        with pytest.raises(CorpusError, match=words):
            open_features(store, f"{name}.arrow")
        with pytest.raises(CorpusError, match=words):
            write(store, f"{name}.arrow", torch.zeros(2, 2))
        assert (tmp_path / f"{name}.arrow").read_bytes() == before


@pytest.mark.timeout(20)
def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "a.arrow")
    with pytest.raises(CorpusError, match=r"not a readable feature file .*not a regular file"):
        open_features(Store.at(str(tmp_path)), "a.arrow")


def test_files_that_lie_are_refused_before_native_code_sees_them(tmp_path):
    store = Store.at(str(tmp_path))
    spec = write(store, "good.arrow", torch.randn(4, 3), "float32")
    with pa.ipc.open_file(str(tmp_path / "good.arrow")) as reader:
        good, metadata = reader.read_all(), dict(reader.schema.metadata)

    def refused(metadata, words, **columns):
        table = {name: good[name] for name in good.column_names} | columns
        schema = pa.schema([pa.field(n, c.type, nullable=n in columns) for n, c in table.items()])
        forge(tmp_path / "bad.arrow", table, metadata, schema if columns else good.schema)
        with pytest.raises(CorpusError, match=words):
            list(open_features(store, "bad.arrow").batches())

    claims = metadata[METADATA_KEY].decode()
    refused({METADATA_KEY: claims.replace('"dim":3', '"dim":300').encode()}, "columns are not those of its footer")
    refused({METADATA_KEY: claims.replace("float32", "float16").encode()}, "columns are not those of its footer")
    refused({METADATA_KEY: claims.replace('"rows":4', '"rows":5').encode()}, "holds 4 rows where its footer says 5")
    refused({METADATA_KEY: b'{"features":{"dim":3}}'}, "not a feature file")
    refused(metadata, "columns are not", feature=pa.array([[0.0] * 3] * 4, pa.list_(pa.float32())))
    # nulls that the schema forbids: written under a nullable schema and relabelled
    lists = pa.FixedSizeListArray.from_arrays(
        pa.array([0.0] * 11 + [None], pa.float32()), type=spec.schema({}).field(2).type
    )
    batch = pa.RecordBatch.from_arrays([good["row"].chunk(0), good["id"].chunk(0), lists], schema=good.schema)
    with pa.ipc.new_file(str(tmp_path / "bad.arrow"), good.schema) as writer:
        writer.write_batch(batch)
    with pytest.raises(CorpusError, match="has nulls"):
        list(open_features(store, "bad.arrow").batches())


def test_truncated_anywhere_is_an_error_of_one_line(tmp_path):
    store = Store.at(str(tmp_path))
    write(store, "a.arrow", torch.randn(20, 3))
    content = (tmp_path / "a.arrow").read_bytes()
    for size in range(0, len(content), 37):
        (tmp_path / "b.arrow").write_bytes(content[:size])
        with pytest.raises(CorpusError) as caught:
            list(open_features(store, "b.arrow").batches())
        assert "\n" not in str(caught.value)


def test_corrupted_sizes_do_not_reach_the_kernel(tmp_path):
    """Every byte of the file's own description of itself flipped in turn: an error, or the features' true sizes."""
    store = Store.at(str(tmp_path))
    write(store, "a.arrow", torch.randn(20, 3))
    content = bytearray((tmp_path / "a.arrow").read_bytes())
    refused = 0
    for place in range(0, len(content), 5):
        flipped = bytearray(content)
        flipped[place] ^= 0x55
        (tmp_path / "b.arrow").write_bytes(flipped)
        try:
            for batch in open_features(store, "b.arrow").batches():
                assert batch.features.shape == (len(batch.rows), 3)
                assert topk_scan(batch.features, torch.ones(1, 3), 1)[0].shape == (1,)
                assert len(batch.ids.to_pylist()) == len(batch.rows)
        except CorpusError:
            refused += 1
    assert refused > 0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reduce", ["mean", "max", "none"])
def test_store_topk_equals_one_scan_of_everything(store, dtype, reduce, monkeypatch):
    monkeypatch.setattr(module, "MAX_BATCH_ROWS", 16)
    parts = {"a.arrow": 40, "b/c.arrow": 0, "b/d.arrow": 1, "z.arrow": 30}
    for path, rows in parts.items():
        features = torch.randint(-3, 4, (rows, 5)).float()  # ties within and across shards
        if path == "z.arrow":
            features[4, 1] = torch.nan
        source = FOOTER["input"] | {"path": path.replace(".arrow", ".jsonl")}
        write(store, path, features, dtype, footer=FOOTER | {"input": source})
    store.write_text("_hidden/x.arrow", "not ours")
    store.write_text("notes.txt", "nor this")
    features = FeatureStore(store.url, {"seed": 1})
    assert [file.path for file in features.files] == list(parts)
    assert (features.rows, features.dim, features.dtype) == (71, 5, features.spec.torch_dtype)
    tensors, rows, ids = zip(*features, strict=True)
    everything = torch.cat(tensors)
    assert everything.shape == (71, 5)
    queries = torch.randint(-2, 3, (3, 5)).float()
    for k in (0, 1, 20, 71):
        values, indices = features.topk(queries, k, reduce)
        want = topk_scan(everything, queries, k, reduce=reduce)
        assert values.shape == want[0].shape
        if dtype == "int8":  # scale · Σ rather than Σ scale: ties and the last digit may fall differently
            torch.testing.assert_close(values, want[0], rtol=1e-5, atol=1e-5, equal_nan=True)
        else:
            assert torch.equal(indices, want[1])
            assert torch.equal(values.nan_to_num(), want[0].nan_to_num())
        flat = indices.reshape(-1).tolist()
        assert [(p.row, p.id) for p in features.locate(indices)] == [
            (int(np.concatenate(rows)[i]), [x for part in ids for x in part.to_pylist()][i]) for i in flat
        ]
    assert features.locate([70, 0, 40]) == [
        Place("z.jsonl", 58, "z.arrow:58"),
        Place("a.jsonl", 0, "a.arrow:0"),
        Place("b/d.jsonl", 0, "b/d.arrow:0"),
    ]
    with pytest.raises(ValueError, match="at most the store's rows, 71, got k = 72"):
        features.topk(queries, 72, reduce)
    with pytest.raises(ValueError, match="d = 5 of the features"):
        features.topk(torch.zeros(1, 4), 1, reduce)
    with pytest.raises(IndexError, match=r"\[0, 71\), got 0 to 71"):
        features.locate([0, 71])


def test_files_of_different_making_are_no_store(tmp_path):
    store = Store.at(str(tmp_path))
    write(store, "a.arrow", torch.zeros(2, 4))
    cases = {
        "features.dim is 5, expected 4": lambda: write(store, "b.arrow", torch.zeros(2, 5)),
        "features.dtype is int8, expected float16": lambda: write(store, "b.arrow", torch.zeros(2, 4), "int8"),
        "features.method is dsdm, expected trak": lambda: write(store, "b.arrow", torch.zeros(2, 4), method="dsdm"),
        "another recipe (recipe_hash is other": lambda: write(
            store, "b.arrow", torch.zeros(2, 4), footer=FOOTER | {"recipe_hash": "other"}
        ),
        "other models (models.model is None": lambda: write(
            store, "b.arrow", torch.zeros(2, 4), footer=FOOTER | {"models": {}}
        ),
    }
    for words, make in cases.items():
        make()
        with pytest.raises(CorpusError) as caught:
            FeatureStore(str(tmp_path))
        assert words in str(caught.value)
        assert "b.arrow, beside a.arrow" in str(caught.value)


def test_memory_of_a_scan_does_not_follow_the_store(tmp_path):
    """64 MB of features are scanned with less than 16 MB of memory of the process's own."""
    store = Store.at(str(tmp_path))
    for name in ("a", "b"):
        write(store, f"{name}.arrow", torch.randn(1 << 16, 256), step=1 << 14)
    code = f"""
import torch
from assay.corpus.features import FeatureStore
def field(name): return int(next(l for l in open("/proc/self/status") if l.startswith(name)).split()[1])
features, queries = FeatureStore({str(tmp_path)!r}), torch.randn(8, 256)
features.topk(queries, 0)
before = field("RssAnon")
values, indices = features.topk(queries, 100, "max")
print(field("RssAnon") - before)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(run.stdout) < 16 * 1024, f"{int(run.stdout) / 1024:.0f} MB"
