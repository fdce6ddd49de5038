"""Arrays of `.npy` and safetensors files: rows along the first axis; headers that lie cost nothing."""

from __future__ import annotations

import io
import json
import pickle

import fsspec
import numpy as np
import pytest
import safetensors.numpy
import torch
from safetensors import safe_open
from safetensors.torch import save

from assay.corpus import format as limits
from assay.corpus.copying import copy_rows
from assay.corpus.errors import ShardError
from assay.corpus.format import ColumnFacts
from assay.corpus.readers import columns_of, read
from assay.corpus.shards import Shard, find_shards
from assay.corpus.storage import Store

RNG = np.random.default_rng(0)
ROWS = 2500


def shard_of(folder, name: str, content: bytes) -> Shard:
    (folder / name).write_bytes(content)
    (shard,) = find_shards(str(folder / name)).shards
    return shard


def npy(array: np.ndarray, **options) -> bytes:
    sink = io.BytesIO()
    np.save(sink, array, **options)
    return sink.getvalue()


def columns(shard: Shard, *names: str) -> dict[str, list]:
    found: dict[str, list] = {name: [] for name in names}
    for chunk in read(shard, names):
        assert chunk.first == len(found[names[0]])
        assert not chunk.faults
        for name in names:
            found[name] += chunk.columns[name]
    return found


DTYPES = ["<f4", ">f8", "<f2", "|i1", ">i4", "<u8", "?"]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(ROWS,), (ROWS, 3), (ROWS, 2, 2)])
def test_npy(tmp_path, dtype, shape):
    array = RNG.integers(0, 2, shape).astype(dtype)
    shard = shard_of(tmp_path, "a.npy", npy(array))
    got = columns(shard, "value")["value"]
    assert np.array_equal(got, array)
    assert len(shape) > 1 or type(got[0]) in (int, float, bool)
    assert len(shape) == 1 or got[0].dtype == array.dtype.newbyteorder("=")
    keep = RNG.random(ROWS) < 0.3
    copy_rows(shard, keep, Store.at(str(tmp_path / "out")))
    chosen = np.load(tmp_path / "out/a.npy")
    assert chosen.dtype == array.dtype
    assert np.array_equal(chosen, array[keep])


TENSORS = {
    "x": torch.randn(ROWS, 2, 3),
    "half": torch.randn(ROWS, 4).to(torch.bfloat16),
    "f16": torch.randn(ROWS).to(torch.float16),
    "label": torch.randint(0, 9, (ROWS,)),
    "flag": torch.rand(ROWS) < 0.5,
    "byte": torch.randint(0, 255, (ROWS, 2)).to(torch.uint8),
}


def test_safetensors(tmp_path):
    shard = shard_of(tmp_path, "a.safetensors", save(TENSORS, {"origin": "a test"}))
    got = columns(shard, *TENSORS)
    for name, tensor in TENSORS.items():
        assert np.array_equal(np.asarray(got[name], np.float64), tensor.double().numpy()), name
    assert isinstance(got["label"][0], int)
    assert isinstance(got["flag"][0], bool)
    keep = RNG.random(ROWS) < 0.3
    copy_rows(shard, keep, Store.at(str(tmp_path / "out")))
    with safe_open(tmp_path / "out/a.safetensors", "pt") as chosen:
        assert chosen.metadata() == {"origin": "a test"}
        assert set(chosen.keys()) == TENSORS.keys()
        for name, tensor in TENSORS.items():
            assert torch.equal(chosen.get_tensor(name), tensor[torch.from_numpy(keep)])


def test_facts(tmp_path):
    assert columns_of(shard_of(tmp_path, "a.npy", npy(np.zeros((2, 3, 4), ">f4")))) == {
        "value": ColumnFacts("list<list<float>>")
    }
    assert columns_of(shard_of(tmp_path, "b.safetensors", save(TENSORS))) == {
        "x": ColumnFacts("list<list<float>>"),
        "half": ColumnFacts("list<float>"),
        "f16": ColumnFacts("halffloat"),
        "label": ColumnFacts("int64"),
        "flag": ColumnFacts("bool"),
        "byte": ColumnFacts("list<uint8>"),
    }


def test_another_file_system():
    fs = fsspec.filesystem("memory")
    fs.pipe_file("/arrays/a.npy", npy(np.arange(5)))
    fs.pipe_file("/arrays/b.safetensors", save({"value": torch.arange(5)}))
    for shard in find_shards("memory://arrays").shards:
        assert columns(shard, "value")["value"] == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("name", ["a.npy", "a.safetensors"])
def test_nothing_kept_and_a_mask_of_another_length(tmp_path, name):
    content = npy(np.arange(6).reshape(3, 2)) if name == "a.npy" else save({"value": torch.arange(6).reshape(3, 2)})
    shard = shard_of(tmp_path, name, content)
    copy_rows(shard, np.zeros(3, bool), Store.at(str(tmp_path / "none")))
    (none,) = find_shards(str(tmp_path / "none")).shards
    assert columns(none, "value")["value"] == []
    assert columns_of(none) == columns_of(shard)
    copy_rows(shard, np.ones(3, bool), Store.at(str(tmp_path / "all")))
    assert (tmp_path / "all" / name).read_bytes() == content
    with pytest.raises(ShardError, match="3 rows, but 4"):
        copy_rows(shard, np.ones(4, bool), Store.at(str(tmp_path / "more")))
    assert not (tmp_path / "more" / name).exists()


class Opened:
    def __reduce__(self):
        return (pytest.fail, ("a pickle was opened",))


def header(text: str, version: int = 1) -> bytes:
    body = text.encode()
    return b"\x93NUMPY" + bytes([version, 0]) + len(body).to_bytes(2 if version == 1 else 4, "little") + body


FACTS = "{{'descr': {!r}, 'fortran_order': {}, 'shape': {}}}"
BAD_NPY = {
    "objects": (npy(np.array([Opened()], object), allow_pickle=True), "holds Python objects"),
    "a pickle": (pickle.dumps([1]), "magic"),
    "texts": (npy(np.array(["a"])), "holds <U1"),
    "records": (npy(np.zeros(2, [("a", "f4")])), "holds"),
    "complex": (npy(np.zeros(2, "c8")), "holds complex64"),
    "dates": (npy(np.zeros(2, "M8[s]")), "holds datetime64"),
    "columns": (npy(np.asfortranarray(np.zeros((2, 3)))), "stored column by column"),
    "a number": (npy(np.array(1.0)), "a single number"),
    "empty rows": (npy(np.zeros((1 << 40, 0))), "rows of 0 bytes"),
    "cut": (npy(np.zeros(10))[:-1], "cut short"),
    "longer": (npy(np.zeros(10)) + b"x", "where its header speaks of"),
    "huge": (header(FACTS.format("<f8", False, (1 << 60,))) + bytes(8), "its header speaks of"),
    "negative": (header(FACTS.format("<f8", False, (-1, -8))) + bytes(64), "has the shape"),
    "long header": (header(FACTS.format("<f8", False, (1,)) + " " * 20_000) + bytes(8), "Header"),
    "code": (header(FACTS.format("<f8", False, "__import__('os')")) + bytes(8), None),
    "unclosed": (header("{'descr': ((((") + bytes(8), None),
    "deep": (header("(" * 9000) + bytes(8), None),
    "no mapping": (header("[1]") + bytes(8), None),
    "odd type": (header(FACTS.format("<q99", False, (1,))) + bytes(8), None),
    "true": (header(FACTS.format("<f8", False, (True,))) + bytes(7), "header speaks of"),
    "version": (header(FACTS.format("<f8", False, (1,)), 9) + bytes(8), "version"),
    "nothing": (b"", None),
}


def refused(shard, column, reason) -> None:
    """Neither its rows nor its columns can be read."""
    for use in (lambda: columns(shard, column), lambda: columns_of(shard)):
        with pytest.raises(ShardError, match=reason):
            use()


@pytest.mark.parametrize("name", BAD_NPY)
def test_npy_files_that_are_none_are_errors(tmp_path, name):
    refused(shard_of(tmp_path, "a.npy", BAD_NPY[name][0]), "value", BAD_NPY[name][1])


def tensors(entries: dict | str, data: bytes = b"", length: int | None = None) -> bytes:
    text = (entries if isinstance(entries, str) else json.dumps(entries)).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def entry(dtype: object = "F32", shape: object = (2,), offsets: object = (0, 8)) -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


BAD_TENSORS = {
    "nothing": (b"", "not a safetensors file"),
    "header of 8 EB": (tensors({"a": entry()}, bytes(8), 1 << 62), "cut short"),
    "header beyond the file": (tensors({"a": entry()}, bytes(8), 500), "cut short"),
    "no JSON": (tensors("{"), "not a safetensors file"),
    "deep": (tensors("[" * 100_000), "not a safetensors file"),
    "a list": (tensors("[]"), "not a safetensors file"),
    "no entry": (tensors({"a": 1}), "not a safetensors file"),
    "twice": (tensors('{"a": 1, "a": 2}'), "names a twice"),
    "cut": (save({"a": torch.zeros(9)})[:-1], "cut short"),
    "longer": (save({"a": torch.zeros(9)}) + b"x", "followed by something else"),
    "no tensor": (tensors({}), "holds no array"),
    "number": (tensors({"a": entry(shape=(), offsets=(0, 4))}, bytes(4)), "a single number"),
    "uneven": (save({"a": torch.zeros(3), "b": torch.zeros(4)}), "'a' has 3 rows and 'b' 4"),
    "float8": (tensors({"a": entry("F8_E4M3", (8,))}, bytes(8)), "of type F8_E4M3"),
    "wrong size": (tensors({"a": entry(shape=(3,))}, bytes(8)), r"8 bytes for 'a', a F32 tensor of shape \(3,\)"),
    "negative": (tensors({"a": entry(shape=(-2,))}, bytes(8)), "not a safetensors file"),
    "float sizes": (tensors({"a": entry(shape=(2.0,))}, bytes(8)), "not a safetensors file"),
    "axes": (tensors({"a": entry(shape=(2,) + (1,) * 100)}, bytes(8)), "not a safetensors file"),
    "hole": (tensors({"a": entry(offsets=(4, 12))}, bytes(12)), "expected it at 0"),
    "overlap": (tensors({"a": entry(), "b": entry(offsets=(4, 12))}, bytes(12)), "expected it at 8"),
    "empty rows": (tensors({"a": entry(shape=(1 << 50, 0), offsets=(0, 0))}), "rows of 0 bytes"),
}


@pytest.mark.parametrize("name", BAD_TENSORS)
def test_safetensors_files_that_are_none_are_errors(tmp_path, name):
    refused(shard_of(tmp_path, "a.safetensors", BAD_TENSORS[name][0]), "a", BAD_TENSORS[name][1])


@pytest.mark.parametrize("name", ["a.npy", "a.safetensors"])
def test_a_column_that_is_not_there(tmp_path, name):
    content = npy(np.zeros(3)) if name == "a.npy" else safetensors.numpy.save({"value": np.zeros(3)})
    with pytest.raises(ShardError, match=r"no column 'input', only 'value'"):
        columns(shard_of(tmp_path, name, content), "input")


def test_chunks_are_of_bounded_size(tmp_path):
    shard = shard_of(tmp_path, "a.npy", npy(np.zeros((40, 100_000), np.float32)))
    chunks = list(read(shard, ["value"]))
    assert max(sum(row.nbytes for row in chunk.columns["value"]) for chunk in chunks) <= limits.CHUNK_BYTES
    assert chunks[-1].progress == 1.0


def test_bytes_flipped_in_headers_never_raise_anything_else(tmp_path):
    for name, content in (("a.npy", npy(np.zeros((3, 2)))), ("a.safetensors", save({"value": torch.zeros(3, 2)}))):
        for _ in range(100):
            damaged = bytearray(content)
            damaged[RNG.integers(0, len(content) - 48)] = RNG.integers(0, 256)
            shard = shard_of(tmp_path, name, bytes(damaged))
            try:
                columns(shard, "value")
            except ShardError:
                continue
