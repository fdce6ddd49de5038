"""The same rows in every format: the same scores, and a selection writes the same format back with the same rows."""

from __future__ import annotations

import io
import json
import shutil
import tarfile
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from safetensors.torch import save_file

from assay import select
from assay.corpus.errors import CorpusError
from assay.corpus.readers import read
from assay.corpus.shards import find_shards
from assay.curate.curation import curate
from assay.engine.local import run
from assay.recipe.recipe import load_recipe
from tests.engine.test_text import WORDS, save_model
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


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> tuple[Path, Path]:
    """A folder of images whose paths are texts, and a recipe that scores those."""
    root = tmp_path_factory.mktemp("pictures")
    save_model(root / "model", 0)
    words = WORDS[1:]
    for i in range(20):
        path = root / "pets" / words[i % 3] / f"{words[i % 7]} {words[i % 5]} {i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(f"image {i}".encode())
    recipe = {
        "version": 1,
        "corpus": {"path": "pets", "id_column": "path"},
        "task": {"kind": "causal_lm", "text_column": "path", "max_length": 16},
        "models": {"m": {"kind": "transformers", "path": "model"}},
        "methods": [{"method": "ensemble", "models": ["m"]}],
        "output": "scores",
    }
    (root / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return root / "recipe.yaml", root


def files(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*.png"))}


def test_folders_of_images_from_scores_to_a_selection(pictures):
    recipe, root = pictures
    assert run(load_recipe(str(recipe), [])).clean
    scores = str(root / "scores")
    table = pq.read_table(root / "scores/pets.parquet")
    assert table["id"].to_pylist() == sorted(files(root / "pets"))
    for count in (12, 5):  # the second replaces the first
        curated = curate(scores, "ensemble_nll", partial(keep_best, count=count), str(root / "out"))
        assert curated.kept == count
        best = np.sort(np.argsort(table["ensemble_nll"].to_numpy(), kind="stable")[:count])
        chosen = [table["id"][int(i)].as_py() for i in best]
        assert files(root / "out/pets") == {name: files(root / "pets")[name] for name in sorted(chosen)}
    assert run(load_recipe(str(recipe), ["corpus.path=out", "output=again"])).rows_scored == 5
    added = root / "pets/the/gold for some.png"
    added.write_bytes(b"new")
    with pytest.raises(CorpusError, match="the file has changed since it was scored"):
        curate(scores, "ensemble_nll", partial(keep_best, count=5), str(root / "other"))
    summary = run(load_recipe(str(recipe), []))
    assert (summary.rescored, summary.rows) == (1, 21)


def test_what_another_corpus_left_in_the_output_is_neither_kept_nor_removed(pictures, tmp_path):
    shutil.copytree(pictures[1], tmp_path, dirs_exist_ok=True, ignore=shutil.ignore_patterns("scores", "out", "again"))
    recipe, scores = load_recipe(str(tmp_path / "recipe.yaml"), []), str(tmp_path / "scores")

    def select_all() -> None:
        curate(scores, "ensemble_nll", partial(keep_best, count=len(files(tmp_path / "pets"))), str(tmp_path / "out"))

    run(recipe)
    select_all()
    select_all()
    first, *rest = files(tmp_path / "pets")
    (tmp_path / "pets" / first).unlink()
    run(recipe)
    with pytest.raises(CorpusError, match=f"holds 1 files that this selection would not write .pets/{first}"):
        select_all()
    assert (tmp_path / "out/pets" / first).exists()
    (tmp_path / "out/pets" / first).unlink()
    select_all()
    assert list(files(tmp_path / "out/pets")) == rest


def test_a_file_of_mine_in_a_lance_data_set_of_the_output_stays(tmp_path):
    lance = pytest.importorskip("lance")
    project = make_project(tmp_path)
    lance.write_dataset(pa.Table.from_pylist(ROWS[:8]), str(tmp_path / "a.lance"))
    project.write_recipe(corpus={"path": "a.lance"})
    assert run(load_recipe(str(project.path), [])).clean

    def select_half() -> None:
        curate(str(project.scores), "mimic", lambda t: select.top(t, "mimic", 0.5), str(tmp_path / "out"))

    select_half()
    select_half()
    mine = tmp_path / "out/a.lance/notes.txt"
    mine.write_text("mine")
    with pytest.raises(CorpusError, match=r"would not write \(a\.lance/notes\.txt\)"):
        select_half()
    assert mine.read_text() == "mine"


def keep_best(table: pa.Table, count: int) -> select.Selection:
    return select.top(table, "ensemble_nll", count, "low")


def test_the_output_of_an_image_folder_must_be_elsewhere(pictures):
    recipe, _ = pictures
    for output in ("pets/out", "pets", "."):
        with pytest.raises(CorpusError, match="must not lie in each other"):
            run(load_recipe(str(recipe), [f"output={output}"]))
