"""Scores of several runs side by side: joined by shard and row, of the same shards or not at all."""

from __future__ import annotations

import json
import os

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from assay.corpus.errors import CorpusError
from assay.corpus.scores_folder import open_scores
from assay.curate import ExpressionError, RuleOptions, curate, explain
from assay.curate.rows import Rows, open_beside
from assay.curate.where import ask, parse_condition
from assay.curate.whole import scored_shards
from tests.small_scores import Column, make_scores

pytest.importorskip("duckdb")

ROWS = {"a": 30, "web/b": 17}
LACKING = {"a": [0, 7, 8, 29], "web/b": [3]}
OTHERS = {"a": [1, 7, 28, 29], "web/b": [0, 1, 2, 16]}


@pytest.fixture
def runs(tmp_path):
    rng = np.random.default_rng(0)
    values = {name: rng.normal(size=(3, rows)).astype(np.float32) for name, rows in ROWS.items()}
    ours = make_scores(tmp_path, {n: {"x": v[0]} for n, v in values.items()}, name="ours", without=LACKING)
    theirs = {n: {"x": v[1], "y": v[2]} for n, v in values.items()}
    other = make_scores(tmp_path, theirs, {"y": Column("y", "low")}, name="other", without=OTHERS)
    return ours, other, values


def test_scores_are_joined_by_shard_and_row(runs, tmp_path, monkeypatch):
    ours, other, values = runs
    monkeypatch.setattr("assay.curate.rows.ROW_GROUP_ROWS", 4)
    scores = open_scores(ours)
    tables = scored_shards(scores)
    rows = Rows(scores.store, tables, open_beside(scores, tables, {"b": other}))
    text = "x < b.x and b.y > quantile(b.y, 0.2)"
    answer = ask(rows, parse_condition(text, rows.names()))
    left = {name: np.setdiff1d(np.arange(ROWS[name]), LACKING[name]) for name in ROWS}
    x = np.concatenate([values[name][0][left[name]] for name in ROWS])
    there = np.concatenate([~np.isin(left[name], OTHERS[name]) for name in ROWS])
    bx, by = (np.where(there, np.concatenate([values[n][i][left[n]] for n in ROWS]), np.nan) for i in (1, 2))
    expected = there & (x < bx) & (by > np.nanquantile(by, 0.2, method="lower"))
    assert 0 < expected.sum() < there.sum()
    np.testing.assert_array_equal(answer.codes == 1, expected)
    assert answer.counts()["nan"] == {"b.x": (~there).sum()}


def test_the_manifest_names_both_runs(runs, tmp_path):
    ours, other, _ = runs
    text, beside = "x < b.x or shard like 'web/%'", {"b": other}
    rule = RuleOptions(where=text).rule()
    curated = curate(ours, None, rule, str(tmp_path / "out"), where=text, beside=beside)
    manifest = json.loads((tmp_path / "out/manifest.json").read_text())
    assert manifest["with"]["b"]["scores"] == other
    assert set(manifest["with"]["b"]["table_sha256"]) == {"a.parquet", "web/b.parquet"}
    fates = pq.read_table(tmp_path / "out/_selection/web/b.parquet").to_pylist()
    assert fates[0]["reason"] == "dropped: b.x is NaN"
    assert curated.kept == sum(f["kept"] for f in fates) + pq.read_table(tmp_path / "out/a.parquet").num_rows


def test_another_corpus_is_refused(runs, tmp_path):
    ours, other, values = runs
    rule, out = RuleOptions(where="x < b.x").rule(), str(tmp_path / "out")
    with pytest.raises(CorpusError, match="no manifest"):
        curate(ours, None, rule, out, where="x < b.x", beside={"b": str(tmp_path / "data")})
    os.remove(tmp_path / "other/web/b.parquet")
    with pytest.raises(CorpusError, match=r"--with b=.*: not of the same shards: 1 of 2 shards have no score table"):
        curate(ours, None, rule, out, where="x < b.x", beside={"b": other})
    path = tmp_path / "data/a.parquet"
    os.utime(path)
    ours = make_scores(tmp_path, {n: {"x": v[0]} for n, v in values.items()}, name="ours")
    os.remove(tmp_path / "other/manifest.json")
    (tmp_path / "other").rename(tmp_path / "gone")
    stale = make_scores(tmp_path, {n: {"x": v[0]} for n, v in values.items()}, name="stale")
    table = pq.read_table(tmp_path / "gone/a.parquet")
    pq.write_table(table, tmp_path / "stale/a.parquet")
    with pytest.raises(CorpusError, match=r"--with b=.*not of the same shards: 1 of 2 .*the file has changed since"):
        curate(ours, None, rule, out, where="x < b.x", beside={"b": stale})
    assert not (tmp_path / "out").exists()


def test_misuse_is_named(runs, tmp_path):
    ours, other, _ = runs
    rule, out = RuleOptions(where="x > 0").rule(), str(tmp_path / "out")
    for beside, where, message in (
        ({"b-c": other}, "x > 0", "expected a name of letters"),
        ({"b": other}, "x > b.z", "there is no score b.z; did you mean b"),
        ({"b": other}, None, "--with b: has no effect, for --where names no b.score"),
        ({"b": other, "c": other}, "x > b.x", "--with c: has no effect"),
    ):
        with pytest.raises(CorpusError, match=message):
            curate(ours, None, rule, out, where=where, beside=beside)
    with pytest.raises(CorpusError, match=r"lies among the scores .*other"):
        curate(ours, None, rule, f"{other}/out", where="x > b.x", beside={"b": other})
    dotted = make_scores(tmp_path, {n: {"b.x": np.zeros(r, np.float32)} for n, r in ROWS.items()}, name="dotted")
    with pytest.raises(CorpusError, match=r"--with b: .* has a score b\.x; take another name"):
        curate(dotted, None, rule, out, where="b.x > 0", beside={"b": other})


def test_no_corpus_of_the_other_run_is_written_over(runs, tmp_path):
    """Neither that which it is about by its own account, nor its targets, be they a folder or a glob."""
    ours, other, _ = runs
    for folder in ("copy", "targets", "globbed/one"):
        (tmp_path / folder).mkdir(parents=True)
        pq.write_table(pa.table({"id": ["t"]}), tmp_path / folder / "a.parquet")
    path, inputs = tmp_path / "other/manifest.json", [str(tmp_path / "targets"), str(tmp_path / "globbed/*/a.parquet")]
    path.write_text(json.dumps(json.loads(path.read_text()) | {"corpus": str(tmp_path / "copy"), "inputs": inputs}))
    before = sorted(tmp_path.rglob("*"))
    rule, where = RuleOptions(where="x < b.x").rule(), "x < b.x"
    for out in ("copy", "copy/in", "targets", "targets/in", "globbed/two"):
        with pytest.raises(CorpusError, match=f"{out.split('/')[0]}.* must not lie in each other"):
            curate(ours, None, rule, str(tmp_path / out), where=where, beside={"b": other})
    assert sorted(tmp_path.rglob("*")) == before
    curate(ours, None, rule, str(tmp_path / "globbed/two"), where=where, beside={"b": other}, form="indices")


def test_rows_of_the_other_run_must_ascend(runs, tmp_path):
    ours, other, _ = runs
    table = pq.read_table(tmp_path / "other/a.parquet")
    pq.write_table(table.take(list(range(len(table) - 1, -1, -1))), tmp_path / "other/a.parquet")
    with pytest.raises(CorpusError, match="its rows do not ascend"):
        curate(
            ours, None, RuleOptions(where="x > b.x").rule(), str(tmp_path / "o"), where="x > b.x", beside={"b": other}
        )


def test_selections_are_united_and_cut(tmp_path):
    rng = np.random.default_rng(0)
    values = {stem: {"x": rng.normal(size=40).astype(np.float32)} for stem in ("a", "b")}
    values["a"]["x"][4] = np.nan
    ours = make_scores(tmp_path, values, without={"a": [0, 1], "b": [39]})

    def kept(folder):
        entries = [pq.read_table(f"{folder}/_selection/{stem}.parquet").to_pylist() for stem in ("a", "b")]
        return {row["id"] for part in entries for row in part if row["kept"]}

    best, drawn = str(tmp_path / "best"), str(tmp_path / "drawn")
    curate(ours, "x", RuleOptions(by="x", top="0.3").rule(), best)
    curate(ours, None, RuleOptions(random="0.5").rule(), drawn)
    asked = {
        "best.kept and drawn.kept": kept(best) & kept(drawn),
        "best.kept or drawn.kept": kept(best) | kept(drawn),
        "not best.kept and drawn.kept": kept(drawn) - kept(best),
        "x < 0 and drawn.kept": {id_ for id_ in kept(drawn) if values[id_[0]]["x"][int(id_[2:])] < 0},
    }
    for where, expected in asked.items():
        beside = {name: url for name, url in (("best", best), ("drawn", drawn)) if f"{name}." in where}
        curate(ours, None, RuleOptions(where=where).rule(), str(tmp_path / "out"), where=where, beside=beside)
        assert kept(tmp_path / "out") == expected, where
    manifest = json.loads((tmp_path / "out/manifest.json").read_text())
    told = manifest["with"]["drawn"]
    assert told | {"selection": drawn, "rule": "0.5 drawn at random, seed 0"} == told
    one = min(kept(drawn))
    told = explain(open_scores(ours), one, str(tmp_path / "out")).samples[0].fate.where
    assert [(each.text, each.holds) for each in told] == [("x < 0", one in expected), ("drawn.kept", True)]


@pytest.mark.parametrize("where", ["best.kept > 0", "best.kept = 1", "quantile(best.kept, 0.5) > 0", "best.kep"])
def test_what_was_kept_is_no_number(where, tmp_path):
    ours = make_scores(tmp_path, {"a": {"x": np.arange(4, dtype=np.float32)}})
    curate(ours, "x", RuleOptions(by="x", top="2").rule(), str(tmp_path / "best"))
    beside = {"best": str(tmp_path / "best")}
    with pytest.raises(ExpressionError, match=r"is a condition|is a number|there is no score"):
        curate(ours, None, RuleOptions(where=where).rule(), str(tmp_path / "out"), where=where, beside=beside)


def test_a_selection_of_other_scores_is_not_put_beside(tmp_path):
    ours = make_scores(tmp_path, {"a": {"x": np.arange(4, dtype=np.float32)}})
    other = make_scores(tmp_path, {"a": {"x": np.ones(4, np.float32)}}, name="other")
    curate(other, "x", RuleOptions(by="x", top="2").rule(), str(tmp_path / "best"))
    rule = RuleOptions(where="best.kept").rule()
    with pytest.raises(CorpusError, match=r"--with best=.*: made of other scores of a.parquet than .*; select again"):
        curate(ours, None, rule, str(tmp_path / "out"), where="best.kept", beside={"best": str(tmp_path / "best")})
