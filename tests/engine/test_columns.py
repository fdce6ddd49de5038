"""Columns are looked for before anything else."""

from __future__ import annotations

import errno

import pytest

from assay.corpus import storage
from assay.engine.columns import with_columns
from assay.engine.local import run
from assay.engine.plan import find_corpora
from assay.recipe.errors import EngineError
from assay.recipe.recipe import load_recipe
from tests.small_project import make_rows


def looked_at(project, *overrides):
    recipe = load_recipe(str(project.path), overrides)
    return with_columns(recipe, find_corpora(recipe))


def test_a_wrong_name_is_an_error_that_knows_the_right_one(project):
    for override, key in (
        ("task.label_column=lable", "task.label_column"),
        ("task.input_column=lable", "task.input_column"),
        ("corpus.id_column=lable", "corpus.id_column"),
    ):
        with pytest.raises(EngineError) as caught:
            looked_at(project, override)
        assert str(caught.value) == (
            f"{key}: a.parquet has no column 'lable', only 'id', 'pixels', 'label'; did you mean 'label'?"
        )


def test_a_targets_columns_are_looked_for_too(project):
    (project.root / "target").mkdir()
    (project.root / "target/t.jsonl").write_text('{"pixels": [0, 0, 0, 0, 0, 0], "class": 1}\n')
    project.write_recipe(
        targets={"good": {"path": "target"}}, methods=[{"method": "trak", "models": ["a"], "targets": ["good"]}]
    )
    with pytest.raises(EngineError, match=r"task\.label_column: t\.jsonl of targets\.good has no column 'label', only"):
        run(load_recipe(str(project.path)))


def test_another_shard_does_not_tell_in_place_of_one_that_storage_withholds(project, monkeypatch):
    opened = storage._open_regular

    def withheld(full):
        if full.endswith("data/a.parquet"):
            raise OSError(errno.EIO, "planted", full)
        return opened(full)

    monkeypatch.setattr(storage, "_open_regular", withheld)
    with pytest.raises(EngineError, match=r"a\.parquet: storage failed \(.*planted.*\); run again"):
        looked_at(project)


def test_shards_that_cannot_be_read_or_are_empty_are_passed_over(project):
    (project.root / "data/0.parquet").write_bytes(b"PAR1")
    (project.root / "data/1.jsonl").write_text("")
    project.write_shard("2.jsonl", [{"other": 1}])
    assert looked_at(project).task.soft_labels is False  # as a.parquet says
    for path in (project.root / "data").rglob("*"):
        if path.is_file() and path.name not in ("0.parquet", "1.jsonl"):
            path.unlink()
    assert looked_at(project).task.soft_labels is None  # nobody does


def test_what_the_first_shard_tells_is_the_same_for_every_part(project):
    """Not the first shard of what is left to do, or of a part of the corpus."""
    project.write_shard("z.parquet", make_rows(3, 7))
    whole = looked_at(project)
    run(load_recipe(str(project.path)), part=(2, 2))
    assert looked_at(project) == whole
    assert run(load_recipe(str(project.path))).done_before == 1


def test_a_dotted_name_is_a_columns(project):
    rows = [{"id": row["id"], "meta": {"x": row["pixels"], "y": row["label"]}} for row in make_rows(5)]
    for path in (project.root / "data").rglob("*.*"):
        path.unlink()
    project.write_shard("a.parquet", rows)
    recipe = load_recipe(str(project.path), ["task.input_column=meta.x", "task.label_column=meta.y"])
    assert run(recipe).rows_scored == 5
