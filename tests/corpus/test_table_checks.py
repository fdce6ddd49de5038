"""A shard's rows are counted, and their ids made, without what scoring reads of them: in every format the same rows."""

from __future__ import annotations

import io
import tarfile

import numpy as np
import pytest
from safetensors.numpy import save_file

from assay.corpus.shards import find_shards
from assay.corpus.table_checks import _shard_ids
from tests.corpus.test_readers import FORMATS, TEXTS, shard_of


def ids_of(shard, column=None) -> list[str | None]:
    found = []
    for first, ids in _shard_ids(shard, column):
        assert first == len(found)
        found += ids
    return found


@pytest.mark.parametrize("name", ["a.parquet", "a.jsonl", "a.jsonl.gz", "a.arrow", "stream.arrow"])
def test_tables_and_lines(tmp_path, name):
    shard = shard_of(tmp_path, name, FORMATS[name]())
    assert ids_of(shard) == [f"{name}:{i}" for i in range(len(TEXTS))]
    assert ids_of(shard, "id") == [str(i) for i in range(len(TEXTS))]


def csv(path):
    path.write_text("text,id\na,x\nb\n,y\n")


def npy(path):
    np.save(path, np.zeros((3, 2)))


def safetensors(path):
    save_file({"pixels": np.zeros((3, 2, 2), np.float32), "label": np.zeros(3, np.int64)}, path)


def tar(path):
    with tarfile.open(path, "w") as archive:
        for i in range(3):
            for suffix in ("jpg", "txt"):
                member = tarfile.TarInfo(f"{i}.{suffix}")
                member.size = 1
                archive.addfile(member, io.BytesIO(b"x"))


def images(path):
    for i, name in enumerate(("cat", "cat", "dog")):
        (path / name).mkdir(parents=True, exist_ok=True)
        (path / f"{name}/{i}.png").write_bytes(b"not opened")


@pytest.mark.parametrize(
    ("name", "write"),
    [("a.csv", csv), ("a.npy", npy), ("a.safetensors", safetensors), ("a.tar", tar), ("pets", images)],
)
def test_others(tmp_path, name, write):
    write(tmp_path / name)
    (shard,) = find_shards(str(tmp_path / name)).shards
    assert ids_of(shard) == [f"{name}:{i}" for i in range(3)]


@pytest.mark.parametrize(
    ("lines", "ids"),
    [
        (
            '{"id": "a"}\n\n{"id": 5}\n[]\n{"x": 1}\n{"id": null}\n{"id": 1.5}\n',
            ["a", None, "5", None, None, None, None],
        ),
        ("", []),
    ],
)
def test_rows_without_an_id_have_none(tmp_path, lines, ids):
    shard = shard_of(tmp_path, "a.jsonl", lines.encode())
    assert ids_of(shard, "id") == ids
    assert ids_of(shard) == [f"a.jsonl:{i}" for i in range(len(ids))]
