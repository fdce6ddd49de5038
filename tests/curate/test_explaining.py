"""One sample's scores, its place among all, and what a selection made of it."""

from __future__ import annotations

import json
import os

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from assay.cli import main
from assay.corpus.errors import CorpusError
from assay.corpus.scores_folder import open_scores
from assay.curate import RuleOptions, curate, explain
from tests.small_scores import Column, make_scores

NAN = np.float32("nan")


@pytest.fixture
def folder(tmp_path):
    rng = np.random.default_rng(0)
    loss, mimic = rng.normal(size=(2, 50)).round(1).astype(np.float32)
    mimic[[2, 3]] = NAN
    tokens = np.array([*[rng.normal(size=2).astype(np.float32)] * 30, None], object)[:-1]
    shards = {
        "a": {"loss": loss[:30], "mimic": mimic[:30], "tokens": tokens},
        "web/b": {"loss": loss[30:], "mimic": mimic[30:], "tokens": tokens[:20]},
    }
    columns = {"loss": Column("loss", "low", "the control"), "tokens": Column("tokens", width=None)}
    return make_scores(tmp_path, shards, columns, without={"a": [5], "web/b": [0, 19]}), loss, mimic


def test_every_score_has_its_percentile(folder, monkeypatch):
    url, loss, mimic = folder
    monkeypatch.setattr("assay.curate.rows.ROW_GROUP_ROWS", 7)
    left = np.setdiff1d(np.arange(50), [5, 30, 49])
    for row in (0, 2, 4, 12, 29):
        (sample,) = explain(open_scores(url), f"a-{row}").samples
        assert (sample.shard, sample.row, sample.id) == ("a.parquet", row, f"a-{row}")
        scores = {score.name: score for score in sample.scores}
        assert set(scores) == {"loss", "mimic"}
        assert (scores["loss"].keep, scores["loss"].description) == ("low", "the control")
        for name, values in (("loss", loss), ("mimic", mimic)):
            others = values[left][~np.isnan(values[left])]
            np.testing.assert_equal(scores[name].value, float(values[row]))
            if np.isnan(values[row]):
                assert scores[name].percentile is None
            else:
                assert scores[name].percentile == pytest.approx(100 * (others < values[row]).sum() / (len(others) - 1))
    assert explain(open_scores(url), "a-0").rows == 47


def test_the_percentile_is_that_of_conditions(folder, tmp_path):
    pytest.importorskip("duckdb")
    url, *_ = folder
    (sample,) = explain(open_scores(url), "a-7").samples
    share = next(score.percentile for score in sample.scores if score.name == "loss") / 100
    for limit, kept in ((share - 1e-9, True), (share + 1e-9, False)):
        where = f"id = 'a-7' and percent_rank(loss) > {limit} or id = 'a-8'"
        curate(url, None, RuleOptions(where=where).rule(), str(tmp_path / "out"), where=where)
        (again,) = explain(open_scores(url), "a-7", str(tmp_path / "out")).samples
        assert again.fate.kept is kept


def test_rows_without_scores_and_places_are_found(folder):
    url, *_ = folder
    scores = open_scores(url)
    (refused,) = explain(scores, "a.parquet:5").samples
    assert (refused.row, refused.quarantined, refused.scores) == (5, "bad", ())
    (placed,) = explain(scores, "web/b.parquet:3").samples
    assert placed.id == "web/b-3"
    for unknown in ("a-5", "a.parquet:05", "a.parquet:99", f"a.parquet:{10**30}", "b.parquet:3", ""):
        with pytest.raises(CorpusError, match=r"has no sample of this id, nor a row <shard>:<row>"):
            explain(scores, unknown)


def test_an_id_that_several_rows_have_shows_all(tmp_path, monkeypatch):
    values = np.arange(4, dtype=np.float32)
    url = make_scores(tmp_path, {"a": {"x": values}, "b": {"x": values}})
    import pyarrow as pa
    import pyarrow.parquet as pq

    for name in ("a", "b"):
        table = pq.read_table(f"{url}/{name}.parquet")
        ids = pa.array(["same", "other", "same", "other"])
        pq.write_table(table.set_column(1, table.schema.field("id"), ids), f"{url}/{name}.parquet")
    found = explain(open_scores(url), "same").samples
    assert [(s.shard, s.row, s.scores[0].value) for s in found] == [
        ("a.parquet", 0, 0.0),
        ("a.parquet", 2, 2.0),
        ("b.parquet", 0, 0.0),
        ("b.parquet", 2, 2.0),
    ]
    assert [round(s.scores[0].percentile, 1) for s in found] == [0.0, 57.1, 0.0, 57.1]
    monkeypatch.setattr("assay.curate.explaining._MOST", 3)
    with pytest.raises(CorpusError, match="more than 3 rows have this id; ask for one as <shard>:<row>"):
        explain(open_scores(url), "same")


def test_a_selection_says_which_rule_and_by_how_much(folder, tmp_path):
    url, loss, _ = folder
    out = str(tmp_path / "out")
    curate(url, "loss", RuleOptions(threshold=0.25, by="loss").rule(), out)
    for row in (0, 1, 7, 9):
        fate = explain(open_scores(url), f"a-{row}", out).samples[0].fate
        assert fate.kept == (loss[row] <= 0.25)
        assert fate.distance == pytest.approx(loss[row] - 0.25)
        assert fate.reason.startswith("kept: loss at most" if fate.kept else "dropped: loss above")
    refused = explain(open_scores(url), "a.parquet:5", out).samples[0].fate
    assert (refused.reason, refused.distance) == ("quarantined: bad", None)


def test_the_command_shows_it(folder, tmp_path, capsys):
    pytest.importorskip("duckdb")
    url, loss, _ = folder
    out = str(tmp_path / "out")
    where = f"loss < quantile(loss, 0.5) or row = {int(np.argmax(loss[:30]))}"
    assert main(["select", url, "--where", where, "--by", "loss", "--top", "5", "--out", out]) == 0
    capsys.readouterr()
    worst, best = int(np.argmax(loss[:30])), int(np.argmin(loss[:30]))
    assert main(["explain", url, f"a-{best}", "--selection", out]) == 0
    said = capsys.readouterr().out
    assert said.startswith(f"a-{best}  (a.parquet:{best})\n")
    assert "percentile  better\n" in said
    assert "  low     the control\n" in said
    assert f"{out} (loss, lowest 5, where {where}): kept: among the 5 lowest of loss" in said
    assert " below the threshold " in said
    assert "quantile(loss, 0.5) = " in said
    assert main(["explain", url, f"a-{worst}", "--selection", out, "--json"]) == 0
    (sample,) = json.loads(capsys.readouterr().out)["samples"]
    assert sample["selection"]["kept"] is False
    assert sample["selection"]["distance"] > 0
    assert main(["explain", url, "a-2", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["samples"][0]["scores"]["mimic"]["value"] == "NaN"
    dropped = next(i for i in range(30) if loss[i] >= np.median(loss) and i not in (worst, 5))
    assert main(["explain", url, f"a-{dropped}", "--selection", out]) == 0
    said = capsys.readouterr().out
    assert f"dropped: not: {where}" in said
    assert "threshold" not in said
    assert main(["explain", url, "nobody\x1b[2J"]) == 2
    assert "\x1b" not in capsys.readouterr().err
    os.utime(tmp_path / "data/web/b.parquet")
    assert main(["explain", url, "a-2"]) == 1
    assert "1 shards were not looked at (web/b.parquet: the file has changed" in capsys.readouterr().err


def test_a_selection_of_other_scores_is_refused(folder, tmp_path):
    url, *_ = folder
    out = tmp_path / "out"
    with pytest.raises(CorpusError, match=r"no manifest\.json; expected a folder of `assay select`"):
        explain(open_scores(url), "a-1", str(tmp_path / "data"))
    with pytest.raises(CorpusError, match="not a manifest of `assay select`"):
        explain(open_scores(url), "a-1", url)
    curate(url, "loss", RuleOptions(top="5", by="loss").rule(), str(out))
    path = out / "_selection/a.parquet"
    content = path.read_bytes()
    path.write_bytes(content[:50])
    with pytest.raises(CorpusError, match="cannot be read"):
        explain(open_scores(url), "a-1", str(out))
    path.write_bytes(content)
    manifest = json.loads((out / "manifest.json").read_text())
    manifest["shards"][0]["table_sha256"] = "0" * 64
    (out / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CorpusError, match=r"made of other scores of a\.parquet"):
        explain(open_scores(url), "a-1", str(out))
    (only,) = explain(open_scores(url), "web/b-1", str(out)).samples
    assert only.fate is not None
    manifest["shards"] = []
    (out / "manifest.json").write_text(json.dumps(manifest))
    assert explain(open_scores(url), "a-1", str(out)).samples[0].fate is None


def selected(tmp_path, where, beside=None, **values):
    """Two shards of three rows, and the rows that pass a condition."""
    pytest.importorskip("duckdb")
    shards = {
        "a": {name: own[:3] for name, own in values.items()},
        "b": {name: own[3:] for name, own in values.items()},
    }
    url = make_scores(tmp_path, {s: {n: np.array(v, np.float32) for n, v in own.items()} for s, own in shards.items()})
    curate(url, None, RuleOptions(where=where).rule(), str(tmp_path / "out"), where=where, beside=beside)
    return url, str(tmp_path / "out")


def test_each_comparison_says_how_it_came_out(tmp_path):
    where = "x > 0 and (y < quantile(y, 0.5) or not shard like 'a%') and x between -1 and rank(y) * 2"
    url, out = selected(tmp_path, where, x=[-1, 1, 2, 2, 9, 1], y=[1, 2, 3, 4, 5, np.nan])
    told = {id_: explain(open_scores(url), id_, out).samples[0].fate.where for id_ in ("a-0", "a-2", "b-1", "b-2")}
    shown = ["x > 0", "y < quantile(y, 0.5)", "shard LIKE 'a%'", "x >= -1", "x <= (rank(y) * 2)"]
    assert [one.text.replace("(-1)", "-1") for one in told["a-0"]] == shown  # versions of DuckDB read -1 in two ways
    assert [one.holds for one in told["a-0"]] == [False, True, True, True, True]
    assert [one.distance for one in told["a-0"]] == [-1, -2, None, 0, -3]  # the quantile of 1 … 5 is 3
    assert [one.decides for one in told["a-0"]] == [True, False, False, False, False]
    assert [one.decides for one in told["a-2"]] == [False, True, True, False, False]  # either would let it pass
    assert [one.holds for one in told["b-1"]] == [True, False, False, True, True]
    assert [one.decides for one in told["b-1"]] == [True, False, True, True, True]  # it passes; each would stop it
    assert [one.holds for one in told["b-2"]] == [True, None, False, True, None]
    assert not any(one.decides for one in told["b-2"])  # dropped because y is NaN


def test_two_that_are_not_so_decide_nothing_alone_and_the_command_shows_it(tmp_path, capsys):
    url, out = selected(tmp_path, "x > 1 and x / y >= 2", x=[0, 1, 2, 3, 4, 5], y=[0, 1, 1, 1, 1, 1])
    fate = explain(open_scores(url), "a-0", out).samples[0].fate
    assert [(one.holds, one.decides, one.distance) for one in fate.where] == [(False, False, -1), (None, False, None)]
    assert main(["explain", url, "b-0", "--selection", out]) == 0
    said = capsys.readouterr().out
    assert "    so        x > 1         3 is 2 above 1; this alone decides\n" in said
    assert "    so        (x / y) >= 2  3 is 1 above 2; this alone decides\n" in said
    assert main(["explain", url, "a-0", "--selection", out, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)["samples"][0]["selection"]["where"]
    assert told[0] == {"text": "x > 1", "holds": False, "left": 0, "right": 1, "decides": False, "distance": -1}


def test_what_cannot_be_told_is_said(tmp_path, capsys):
    url, out = selected(tmp_path, "x > mean(x)", x=[0, 1, 2, 3, 4, 5])
    path = tmp_path / "scores/b.parquet"  # shard b is scored anew; a is as it was
    table = pq.read_table(path)
    pq.write_table(table.set_column(2, table.schema.field(2), [pa.array([9, 9, 9], pa.float32())]), path)
    fate = explain(open_scores(url), "a-0", out).samples[0].fate
    assert fate.where == ()
    assert "other scores than they had then" in fate.untold
    assert main(["explain", url, "a-0", "--selection", out]) == 0
    assert "what its condition says cannot be told: other shards" in capsys.readouterr().out


@pytest.mark.parametrize(("where", "reread"), [("rank(x) <= 2", "scores"), ("more.x < x", "more"), ("old.kept", "old")])
def test_a_comparison_is_told_of_the_tables_that_were_asked(tmp_path, where, reread):
    """Not of those that are there now: it would contradict what became of the row."""
    beside = {"more": str(tmp_path / "more"), "old": str(tmp_path / "old")}
    shards = {"a": {"x": np.array([1, 2, 3], np.float32)}, "b": {"x": np.array([4, 5, 6], np.float32)}}
    url = make_scores(tmp_path, shards)
    make_scores(tmp_path, {"a": {"x": shards["a"]["x"] - 1}, "b": shards["b"]}, name="more")
    curate(url, "x", RuleOptions(top="4", by="x", keep="low").rule(), beside["old"], form="indices")
    out, beside = str(tmp_path / "out"), {name: its for name, its in beside.items() if name in where}
    curate(url, None, RuleOptions(where=where).rule(), out, where=where, beside=beside)
    (told,) = explain(open_scores(url), "a-1", out).samples[0].fate.where
    assert told.holds
    if reread == "old":
        curate(url, "x", RuleOptions(top="2", by="x", keep="high").rule(), str(tmp_path / "old"), form="indices")
    else:
        make_scores(tmp_path, {"a": shards["a"], "b": {"x": np.array([0, 0, 0], np.float32)}}, name=reread)
    fate = explain(open_scores(url), "a-1", out).samples[0].fate
    assert (fate.kept, fate.where) == (True, ())
    assert "than they had then" in fate.untold or "than it had then" in fate.untold
