"""The same rows in every format: the same scores, and a selection writes the same format back with the same rows."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import save_file

from assay import select
from assay.corpus.readers import read
from assay.corpus.shards import find_shards
from assay.curate.curation import curate
from assay.engine.local import run
from assay.recipe.recipe import load_recipe
from tests.small_project import Project, make_project, make_rows

ROWS = make_rows(40, 3)


def write_safetensors(path: Path) -> None:
    pixels = torch.tensor([row["pixels"] for row in ROWS])
    save_file({"x": pixels, "y": torch.tensor([row["label"] for row in ROWS])}, path)


def write_archive(path: Path) -> None:
    with tarfile.open(path, "w:gz") as archive:
        for i, row in enumerate(ROWS):
            meta = json.dumps({"deep": {"pixels": row["pixels"]}}).encode()
            for suffix, data in (("json", meta), ("cls", str(row["label"]).encode())):
                info = tarfile.TarInfo(f"{i:04}.{suffix}")
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))


def write_parquet(path: Path) -> None:
    rows = [{"deep": {"pixels": row["pixels"], "more": {"label": row["label"]}}} for row in ROWS]
    pixels = pa.list_(pa.float32())
    kind = pa.struct([("pixels", pixels), ("more", pa.struct([("label", pa.int64())]))])
    pq.write_table(pa.Table.from_pylist(rows, pa.schema([("deep", kind)])), path)


def write_lines(path: Path) -> None:
    path.write_text("".join(json.dumps({"pixels": row["pixels"], "a": {"label": row["label"]}}) + "\n" for row in ROWS))


FORMATS = {
    "a.safetensors": (write_safetensors, "x", "y"),
    "a.tar.gz": (write_archive, "json.deep.pixels", "cls"),
    "a.parquet": (write_parquet, "deep.pixels", "deep.more.label"),
    "a.jsonl": (write_lines, "pixels", "a.label"),
}


def scored(project: Project, name: str) -> np.ndarray:
    write, x, y = FORMATS[name]
    write(project.root / name)
    task = {**project.recipe["task"], "input_column": x, "label_column": y}
    project.write_recipe(corpus={"path": name}, task=task, output=f"{name}.scores")
    summary = run(load_recipe(str(project.path), []))
    assert summary.clean, summary.lines()
    return pq.read_table(project.root / f"{name}.scores/a.parquet")["mimic"].to_numpy()


def values(path: Path, column: str) -> list:
    (shard,) = find_shards(str(path)).shards
    return [
        np.asarray(value, np.float32).tolist() for chunk in read(shard, [column]) for value in chunk.columns[column]
    ]


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> tuple[Project, dict[str, np.ndarray]]:
    project = make_project(tmp_path_factory.mktemp("formats"))
    return project, {name: scored(project, name) for name in FORMATS}


def test_the_same_rows_have_the_same_scores(whole):
    _, scores = whole
    for name in FORMATS:
        assert np.array_equal(scores[name], scores["a.jsonl"]), name


@pytest.mark.parametrize("name", FORMATS)
def test_a_selection_writes_the_same_format_back(whole, name):
    project, scores = whole
    out = project.root / f"{name}.out"
    curated = curate(str(project.root / f"{name}.scores"), "mimic", lambda t: select.top(t, "mimic", 0.5), str(out))
    assert curated.kept == 20
    best = np.sort(np.argsort(-scores[name], kind="stable")[:20])
    pixels = FORMATS[name][1]
    assert values(out / name, pixels) == [np.asarray(ROWS[i]["pixels"], np.float32).tolist() for i in best]
    assert pq.read_table(out / "_selection/a.parquet")["kept"].to_numpy().nonzero()[0].tolist() == best.tolist()
