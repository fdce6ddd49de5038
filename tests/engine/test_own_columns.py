"""Recipes whose methods read the samples' own columns: with no model at all, and beside models."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import assay
import assay.ray
from assay.engine.local import run
from assay.methods import BM25, DSIR, NGramClassifier
from assay.recipe.errors import EngineError, RecipeError
from assay.recipe.recipe import load_recipe
from tests.methods.small_texts import TARGETS, texts_of, views
from tests.small_project import Project, make_rows

BODIES = [*texts_of("code", 20, 0), *texts_of("prose", 20, 0), "...", "été"]
METHODS = [{"method": name} for name in ("bm25", "dsir", "ngram_classifier")]


def score(project, *overrides):
    run(load_recipe(str(project.path), overrides))
    return pq.read_table(next(project.scores.rglob("a.parquet")))


@pytest.fixture
def texts(tmp_path) -> Project:
    recipe = {
        "version": 1,
        "corpus": {"path": "data", "id_column": "id"},
        "task": {"kind": "text", "text_column": "body"},
        "methods": METHODS,
        "targets": {"code": {"path": "targets/code.jsonl"}},
        "output": "scores",
    }
    made = Project(tmp_path, recipe)
    rows = [{"id": str(i), "body": body, "n": i} for i, body in enumerate(BODIES)]
    made.write_shard("a.jsonl", [*rows, {"id": "null", "body": None, "n": 0}, {"id": "empty", "body": "", "n": 0}])
    (tmp_path / "targets").mkdir()
    made.write_shard("../targets/code.jsonl", [{"body": body, "n": 1, "id": 1} for body in TARGETS["code"]])
    (tmp_path / "notes").mkdir()
    made.write_shard("../notes/a.jsonl", [{"body": body, "n": body} for body in TARGETS["code"]])
    made.write_recipe()
    return made


def test_a_recipe_without_models_scores_texts(texts) -> None:
    table = score(texts)
    target = {"code": views(TARGETS["code"])}
    methods = [method(target).fit(views(BODIES)) for method in (BM25, DSIR, NGramClassifier)]
    expected = assay.score(views(BODIES), methods)
    assert table["id"].to_pylist() == [str(i) for i in range(len(BODIES))]
    for name in ("bm25", "dsir", "ngram_classifier"):
        np.testing.assert_allclose(table[name].to_numpy(), expected[name].to_numpy(), rtol=1e-5, err_msg=name)
    assert [(id_, reason) for _, _, id_, reason in texts.quarantine()] == [
        ("null", "body is null"),
        ("empty", "body is empty"),
    ]
    assert np.isnan(table["bm25"].to_numpy()[40])
    again = texts.tables()
    score(texts, "batch.samples=3", "output=other")
    assert (texts.root / "other/a.parquet").read_bytes() == again["a.parquet"]


def test_fit_and_target_decide_scores(texts) -> None:
    first = score(texts)["bm25"].to_numpy()
    fewer = score(texts, "fit.samples=5", "output=fewer")
    assert fewer.num_rows == 42
    other = pq.read_table(texts.root / "fewer/a.parquet")["bm25"].to_numpy()
    assert np.nanmax(abs(first - other)) > 0.01


def test_a_recipe_of_texts_is_a_function_of_tables(texts) -> None:
    scorer = assay.ray.Scorer(str(texts.path))
    table = scorer(pa.table({"id": ["x", "y", "z"], "body": [BODIES[0], None, "..."], "other": [1, 2, 3]}))
    assert table["assay_fault"].to_pylist() == [None, "body is null", None]
    assert np.isnan(table["bm25"].to_numpy()).tolist() == [False, True, True]
    assert table["bm25"][0].as_py() == score(texts)["bm25"][0].as_py()


def test_a_baseline_is_one_line_beside_models(project) -> None:
    notes = [*texts_of("code", 25, 0), *texts_of("prose", 24, 0), None]
    rows = [row | {"note": note} for row, note in zip(make_rows(50), notes, strict=True)]
    project.write_shard("a.parquet", rows)
    (project.root / "data/deep/b.jsonl").unlink()
    project.write_shard("../targets/x.jsonl", rows[:4])
    cosine = {"method": "gradient_cosine", "model": "a"}
    project.recipe.update(targets={"x": {"path": "targets/x.jsonl"}}, methods=[*project.recipe["methods"], cosine])
    project.write_recipe()
    plain = score(project)
    project.recipe["methods"].append({"method": "bm25", "text_column": "note"})
    project.write_recipe(output="both")
    run(load_recipe(str(project.path)))
    both = pq.read_table(project.root / "both/a.parquet")
    assert both.column_names == [*plain.column_names, "bm25"]
    for name in plain.column_names:
        assert both[name] == plain[name], name
    assert np.isnan(both["bm25"].to_numpy()).tolist() == [False] * 49 + [True]
    method = BM25({"x": views(notes[:4])}).fit(views(notes))
    np.testing.assert_allclose(
        both["bm25"].to_numpy()[:49], assay.score(views(notes), [method])["bm25"].to_numpy()[:49], rtol=1e-6
    )


WRONG = [
    (
        ("methods.0.text_column=bdy",),
        r"methods\.0\.text_column: code\.jsonl of targets\.code has no column 'bdy'.*did you mean 'body'",
    ),
    (("methods.0.text_column=n",), r"column 'n' of targets\.code holds int64; expected texts"),
    (("methods.0.text_column=id",), r"methods\.0\.text_column: column 'id' of targets\.code holds int64; expected"),
    (
        ("methods.0.text_column=n", "targets.code.path=notes", "fit.path=notes"),
        r"methods\.0\.text_column: column 'n' holds int64; expected texts",
    ),
    (("task.text_column=text",), r"task\.text_column: code\.jsonl of targets\.code has no column 'text'"),
    (("targets={}",), r"methods\.0\.targets: needs a target"),
    (("methods.1.smoothing=0",), r"methods\.1 \(dsir\): smoothing: expected more than 0"),
    (("methods.0.k2=1",), r"methods\.0\.k2: unknown key"),
    (("task={kind: causal_lm, text_column: body}",), r"task\.kind: causal_lm is about models, and no method runs one"),
    (("methods.0={method: ensemble, models: [a]}",), r"no model is called 'a'"),
    (
        ("models={a: {kind: mlp, path: recipe.yaml}}", "methods.0={method: ensemble, models: [a]}"),
        r"methods\.0\.models\.0: no model has a loss on a task of kind text",
    ),
    (
        (
            "task={kind: contrastive, image_column: body, text_column: body}",
            "models={a: {kind: mlp, path: recipe.yaml}}",
            "methods.0={method: ensemble, models: [a]}",
        ),
        r"methods\.1\.method: scores rows one by one, and contrastive by groups",
    ),
    (
        (
            "task={kind: causal_lm, messages_column: body}",
            "models={a: {kind: mlp, path: recipe.yaml}}",
            "methods.0={method: ensemble, models: [a]}",
        ),
        r"methods\.1\.text_column: is missing; the task has no text_column",
    ),
]


@pytest.mark.parametrize(("overrides", "message"), WRONG)
def test_what_does_not_fit_is_one_line_before_a_row_is_scored(texts, overrides, message) -> None:
    with pytest.raises((EngineError, RecipeError), match=message):
        score(texts, *overrides)
    assert not texts.scores.exists()
