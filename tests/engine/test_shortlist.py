"""Retrieve, then re-rank: a method with a shortlist scores few rows, and these as if it scored all."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from assay.cli import main
from assay.corpus.errors import CorpusError
from assay.corpus.scores_folder import open_scores
from assay.corpus.validation import validate_scores
from assay.engine import local, run
from assay.engine.arrow_scorer import Scorer
from assay.engine.progress import LogProgress
from assay.recipe.errors import ChangedError, EngineError, RecipeError
from assay.recipe.recipe import load_recipe
from tests.small_models import TEXTS, llama_config, save_model
from tests.small_models import write_recipe as write_text_recipe
from tests.small_project import Project, make_project, make_rows

CHEAP = {"method": "logra", "models": ["a"], "keep_features": "int8"}
EXACT = {"method": "ekfac_cg", "model": "a"}
LISTED = {**EXACT, "shortlist": {"by": "logra", "top": 10}}


@pytest.fixture
def ranked(tmp_path: Path) -> Project:
    project = make_project(tmp_path)
    project.write_shard("../target.jsonl", make_rows(6, 2))
    project.recipe.update(targets={"t": {"path": "target.jsonl"}}, fit={"samples": 64}, methods=[CHEAP, LISTED])
    project.write_recipe()
    return project


def score(project: Project, *overrides: str, **options: Any) -> local.RunSummary:
    return run(load_recipe(str(project.path), overrides), **options)


def scores_of(project: Project, output: str = "scores") -> tuple[np.ndarray, np.ndarray]:
    tables = [pq.read_table(project.root / output / path) for path in ("a.parquet", "deep/b.parquet")]
    return tuple(np.concatenate([table[name].to_numpy() for table in tables]) for name in ("logra", "ekfac_cg"))


def final_tables(project: Project) -> dict[str, bytes]:
    return {path: data for path, data in project.tables().items() if not path.startswith("_")}


def test_the_best_by_the_cheap_score_have_the_exact_one_and_the_others_none(
    ranked: Project, capsys: pytest.CaptureFixture[str]
) -> None:
    summary = score(ranked)
    cheap, exact = scores_of(ranked)
    listed = np.sort(np.argsort(-cheap, kind="stable")[:10])
    np.testing.assert_array_equal(np.flatnonzero(~np.isnan(exact)), listed)
    score(ranked, f"methods=[{json.dumps(CHEAP)}, {json.dumps(EXACT)}]", "output=whole")
    whole_cheap, whole = scores_of(ranked, "whole")
    np.testing.assert_array_equal(cheap, whole_cheap)
    np.testing.assert_allclose(exact[listed], whole[listed], rtol=1e-3, atol=1e-5)
    assert summary.clean
    assert summary.nan["ekfac_cg"] == 70
    assert "shortlist: 10 rows, the top 10 by logra; NaN beyond" in summary.lines()
    capsys.readouterr()
    out = str(ranked.root / "chosen")
    assert main(["select", str(ranked.scores), "--by", "ekfac_cg", "--top", "20", "--out", out]) == 0
    assert main(["explain", str(ranked.scores), f"a.parquet:{np.flatnonzero(np.isnan(exact))[0]}"]) == 0
    said = capsys.readouterr().out
    assert "kept 10 of 80 rows" in said
    assert "NaN beyond the top 10 by logra" in said
    field = pq.read_schema(ranked.scores / "a.parquet").field("ekfac_cg")
    assert field.metadata[b"description"].endswith(b"; NaN beyond the top 10 by logra")
    assert validate_scores(str(ranked.scores)).problems == 0
    assert validate_scores(str(ranked.scores / "_retrieval")).problems == 0


def test_a_rerun_does_what_is_missing_and_any_number_of_runners_gives_the_same(
    ranked: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*arguments: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(local, "make_shortlist", killed)
        with pytest.raises(KeyboardInterrupt):
            score(ranked)
    assert not final_tables(ranked)
    again = score(ranked)
    assert again.retrieval is not None
    assert (again.retrieval.scored, again.retrieval.done_before, again.scored) == (0, 2, 2)
    tables = final_tables(ranked)
    (ranked.scores / "a.parquet").unlink()
    assert (score(ranked).scored, final_tables(ranked)) == (1, tables)
    shutil.rmtree(ranked.scores)
    first = score(ranked, part=(1, 2))
    assert (first.waits_for, first.clean, final_tables(ranked)) == (1, False, {})
    with pytest.raises(CorpusError, match=r"no manifest.json; .*; what its shortlist is made from is in .*_retrieval"):
        open_scores(str(ranked.scores))
    assert "waits for 1 shards that other runners score" in first.lines()[0]
    assert score(ranked, "batch.samples=16", part=(2, 2)).waits_for == 0
    assert score(ranked, part=(1, 2)).clean
    assert final_tables(ranked) == tables


def test_a_progress_line_counts_the_pass_that_goes_on(ranked: Project) -> None:
    lines: list[str] = []

    class Lines(LogProgress):
        def finish_shard(self) -> None:
            super().finish_shard()
            lines.append(", ".join(self._text().split(", ")[:2]))

    score(ranked, progress=Lines())
    assert lines[:2] == ["1/2 shards, 50 rows", "2/2 shards, 80 rows"]
    assert lines[3:] == ["2/2 shards, 10 rows"]


@pytest.mark.slow
def test_workers_give_the_same(ranked: Project) -> None:
    score(ranked)
    tables = final_tables(ranked)
    shutil.rmtree(ranked.scores)
    assert score(ranked, "run.devices='cpu,cpu'").workers == 2
    assert final_tables(ranked) == tables


@pytest.mark.slow
def test_a_worker_names_a_method_by_its_place_in_the_recipe_that_was_read(ranked: Project) -> None:
    methods = json.dumps([LISTED, {**CHEAP, "layers": ["nowhere"]}])
    for devices in ("cpu", "'cpu,cpu'"):
        with pytest.raises(EngineError, match=r"^methods\.1 \(logra\): "):
            score(ranked, f"methods={methods}", f"run.devices={devices}")


def test_another_target_needs_no_pass_over_the_corpus_and_another_shortlist_is_a_change(ranked: Project) -> None:
    score(ranked)
    with pytest.raises(ChangedError, match=r"methods\.1\.shortlist\.top: 10 → 0\.25"):
        score(ranked, "methods.1.shortlist.top=0.25")
    wider = score(ranked, "methods.1.shortlist.top=0.25", rescore=True)
    assert (wider.retrieval.scored, wider.rescored) == (0, 2)
    assert np.count_nonzero(~np.isnan(scores_of(ranked)[1])) == 20
    ranked.write_shard("../target.jsonl", make_rows(6, 5))
    with pytest.raises(ChangedError, match=r"files of targets\.t"):
        score(ranked)
    assert score(ranked, rescore=True).retrieval.reused == 2
    retrieval = ranked.scores / "_retrieval/a.parquet"
    table = pq.read_table(retrieval)
    place = table.column_names.index("logra")
    moved = table.set_column(place, table.field("logra"), [-table["logra"].to_numpy()])
    pq.write_table(moved, retrieval)
    with pytest.raises(ChangedError, match="rows of the shortlist: sha256"):
        score(ranked)


def test_what_could_not_be_read_is_in_quarantine_once(ranked: Project) -> None:
    rows = make_rows(30, 1)
    rows[3]["label"], rows[7]["pixels"] = None, [1.0]
    ranked.write_shard("deep/b.jsonl", rows)
    ranked.write_shard("c.parquet", []).write_bytes(b"PAR1 no more")
    summary = score(ranked)
    assert (summary.rows, summary.rows_scored, summary.rows_quarantined) == (80, 78, 2)
    assert list(summary.unreadable) == ["c.parquet"]
    assert [entry[:2] for entry in ranked.quarantine()] == [
        ("c.parquet", None),
        ("deep/b.jsonl", 3),
        ("deep/b.jsonl", 7),
    ]
    assert validate_scores(str(ranked.scores)).problems == 0


def test_texts_are_retrieved_by_their_words_and_scored_by_a_model(tmp_path: Path) -> None:
    """The first pass needs no model, and has rows that the second's rejects: they end in quarantine."""
    model = save_model(tmp_path / "a", 0, llama_config(num_hidden_layers=1))
    (tmp_path / "target.jsonl").write_text(json.dumps({"text": "gold in the river, g"}) + "\n")
    methods = [
        {"method": "bm25"},
        {"method": "ensemble", "models": ["a"], "tokens": True, "shortlist": {"by": "bm25", "top": 3}},
    ]
    path = write_text_recipe(tmp_path, {"a": model}, methods=methods, targets={"t": {"path": "target.jsonl"}})
    rows = [{"text": text} for text in ["g", *TEXTS]]
    (tmp_path / "data/a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    summary = run(load_recipe(str(path)))
    assert (summary.rows_scored, summary.rows_quarantined) == (8, 1)
    assert summary.retrieval.rows_scored == 9
    table = pq.read_table(tmp_path / "scores/a.parquet")
    losses, lists = table["ensemble_nll"].to_numpy(), table["ensemble_mean_nll_tokens"].to_pylist()
    assert [bool(tokens) for tokens in lists] == (~np.isnan(losses)).tolist()
    assert np.count_nonzero(~np.isnan(losses)) == 2
    assert validate_scores(str(tmp_path / "scores")).problems == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"methods": [CHEAP, {**EXACT, "shortlist": {"by": "logra", "top": 0}}]}, r"top: expected a number of rows"),
        ({"methods": [CHEAP, {**EXACT, "shortlist": {"by": "logra", "top": 1.5}}]}, r"or a share .*, got 1\.5"),
        *(
            (
                {"methods": [CHEAP, {**EXACT, "shortlist": {"by": "logra", "top": top}}]},
                rf"shortlist\.top: expected a number of rows.*, got {shown}$",
            )
            for top, shown in [(True, "True"), ("many", "'many'"), (None, "None"), ([5], r"\[5\]")]
        ),
        (
            {"methods": [CHEAP, {**EXACT, "shortlist": "logra"}]},
            r"methods\.1\.shortlist: should be a mapping of by, top, got 'logra'$",
        ),
        ({"methods": [CHEAP, {**EXACT, "shortlist": {"top": 5}}]}, r"methods\.1\.shortlist\.by: is missing"),
        ({"methods": [LISTED]}, r"methods\.0\.shortlist: of every method; expected one without"),
        (
            {"methods": [CHEAP, LISTED, {**LISTED, "name": "x", "shortlist": {"by": "logra", "top": 5}}]},
            r"methods\.2\.shortlist: expected the top 10 by logra, as of ekfac_cg: a recipe has one shortlist",
        ),
        (
            {"methods": [EXACT, {**CHEAP, "shortlist": {"by": "ekfac_cg", "top": 5}}]},
            r"methods\.1\.keep_features: holds every row's features",
        ),
    ],
)
def test_mistakes_are_found_before_anything_runs(ranked: Project, changes: dict[str, Any], message: str) -> None:
    ranked.write_recipe(**changes)
    with pytest.raises(RecipeError, match=message):
        load_recipe(str(ranked.path))


def test_what_a_shortlist_cannot_be_made_by_is_named_before_it_takes_time(
    ranked: Project, capsys: pytest.CaptureFixture[str]
) -> None:
    cases = [
        ("by: lorga", r"recipe.yaml: methods\.2\.shortlist\.by: no method .* a score 'lorga'; did you mean 'logra'"),
        (
            "by: ensemble_entropy",
            r"methods\.2\.shortlist\.by: .* says of neither end that it is better; expected",
        ),
    ]
    methods = json.dumps([CHEAP, {"method": "ensemble", "models": ["a"]}, LISTED])
    for by, message in cases:
        overrides = [f"methods={methods}", f"methods.2.shortlist={{{by}, top: 5}}"]
        with pytest.raises(RecipeError, match=message):
            score(ranked, *overrides)
        assert main(["validate", str(ranked.path), *(o for s in overrides for o in ("--set", s))]) == 2
        assert not list(ranked.scores.rglob("*.parquet"))
    with pytest.raises(EngineError, match=r"methods: column 'logra' comes from a method with a shortlist and"):
        score(ranked, "methods.1.name=logra")
    with pytest.raises(EngineError, match=r"assay\.ray\.Scorer: a shortlist is chosen among a corpus's rows"):
        Scorer(load_recipe(str(ranked.path)))
    assert main(["validate", str(ranked.path)]) == 0
    assert "ekfac_cg (keep high): Gauss-Newton influence on target t; NaN beyond" in capsys.readouterr().out
