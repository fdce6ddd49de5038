"""`--audit`: labels find their rows, and the cut is in the manifest."""

from __future__ import annotations

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from assay.cli import main
from assay.corpus.errors import CorpusError
from assay.curate import RuleOptions, curate, read_labels
from tests.small_scores import make_scores


@pytest.fixture(scope="module")
def scores(tmp_path_factory):
    rng = np.random.default_rng(0)
    values = {stem: {"s": rng.normal(size=rows).astype(np.float32)} for stem, rows in (("a", 60), ("deep/b", 40))}
    values["a"]["s"][3] = np.nan
    return make_scores(tmp_path_factory.mktemp("audit"), values, without={"a": [0, 10], "deep/b": [1]})


def audit(scores, tmp_path):
    rule = RuleOptions(by="s", audit=read_labels(str(tmp_path / "labels.csv"))).rule()
    return curate(scores, "s", rule, str(tmp_path / "o"))


def score(scores, stem, row):
    table = pq.read_table(f"{scores}/{stem}.parquet")
    found = np.flatnonzero(table["row"].to_numpy() == row)
    return table["s"][int(found[0])].as_py() if len(found) else float("nan")


ROWS = [("a", row) for row in range(0, 30)] + [("deep/b", row) for row in range(12)]


def write(tmp_path, scores, by):
    """Of 42 rows, good is what scores above 0.2; and so are a NaN and two in quarantine, which no cut keeps."""
    good = {(stem, row): not score(scores, stem, row) <= 0.2 for stem, row in ROWS}
    lines = [f'"{stem}-{row}",{int(good[stem, row])}' for stem, row in ROWS]
    if by == "row":
        lines = [
            f"keep,{row},{stem}.parquet" if good[stem, row] else f"drop,{row},{stem}.parquet" for stem, row in ROWS
        ]
    header = "id,label" if by == "id" else "label,row,shard"
    path = tmp_path / "labels.csv"
    path.write_text("\ufeff" + "\r\n".join([header, *lines]) + "\r\n")
    return str(path), good


@pytest.mark.parametrize("by", ["id", "row"])
def test_labels_find_their_rows_and_cut_the_score(scores, tmp_path, by):
    if by == "id":  # quarantined rows have no id in these lists
        scores = make_scores(
            tmp_path, {"a": {"s": np.r_[np.nan, np.linspace(-1, 1, 59)]}, "deep/b": {"s": np.ones(40)}}
        )
    path, good = write(tmp_path, scores, by)
    rule = RuleOptions(by="s", audit=read_labels(path), seed=4).rule()
    curated = curate(scores, "s", rule, str(tmp_path / "out"))
    values = np.array([score(scores, *key) for key in good])
    worth = np.array(list(good.values()))
    unscored = int(np.isnan(values).sum())
    assert curated.cut.threshold == values[worth & ~np.isnan(values)].min()
    assert curated.cut.precision == 1
    assert curated.cut.recall == pytest.approx(1 - unscored / worth.sum())
    assert (curated.cut.rows, curated.cut.unscored) == (42, unscored)
    assert unscored == (4 if by == "row" else 1)
    manifest = json.loads((tmp_path / "out/manifest.json").read_text())
    told = manifest["audit"]
    assert (told["labels"], len(told["labels_sha256"]), told["beta"], told["seed"]) == (path, 64, 1.0, 4)
    assert told["threshold"] == manifest["threshold"] == curated.cut.threshold
    assert told["threshold_interval"][0] <= told["threshold"] <= told["threshold_interval"][1]
    fates = pq.read_table(tmp_path / "out/_selection/a.parquet").to_pylist()
    assert all(row["kept"] == (row["s"] is not None and row["s"] >= told["threshold"]) for row in fates)


def test_rows_that_a_condition_drops_are_missed_by_every_cut(scores, tmp_path):
    pytest.importorskip("duckdb")
    path, good = write(tmp_path, scores, "row")
    where = "shard = 'a.parquet'"
    rule = RuleOptions(by="s", audit=read_labels(path), where=where).rule()
    cut = curate(scores, "s", rule, str(tmp_path / "out"), where=where).cut
    found = sum(good[key] for key in good if key[0] == "a" and not np.isnan(score(scores, *key)))
    assert cut.recall == pytest.approx(found / sum(good.values()))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "has the columns none; expected label and id, or label, shard, row"),
        ("id,verdict\na-1,1\n", "has the columns id, verdict"),
        ("id,label\n", "has no labels"),
        ("id,label\na-1,1\na-2,maybe\n", "line 3: label 'maybe': expected one of 1, true"),
        ("id,label\na-1,1\na-2,0\na-1,0\n", "line 4: id 'a-1' has a label in line 2 already"),
        ("id,label\na-1\n", "line 2: has 1 cells; expected 2"),
        ("shard,row,label\na.parquet,-1,1\n", "line 2: row '-1': expected a number"),
        ('id,label\n"a-1,1\n', "unexpected end of data"),
        ("id,label\na-1,1\nx-1,0\nx-2,0\n", r"line 3: id 'x-1': no row has it; 2 of 3 labels match no row"),
        ("shard,row,label\na.parquet,60,1\n", "line 2: a.parquet:60: the shard has 60 rows, counted from 0"),
        ("shard,row,label\nc.parquet,0,1\n", "line 2: c.parquet:0: no such shard has scores"),
        ("id,label\na-1,1\na-2,1\n", "all 2 are 1; expected both 1"),
    ],
)
def test_labels_that_are_refused(scores, tmp_path, text, message):
    (tmp_path / "labels.csv").write_text(text)
    with pytest.raises(CorpusError, match=rf"--audit .*labels\.csv: .*{message}"):
        curate(
            scores,
            "s",
            RuleOptions(by="s", audit=read_labels(str(tmp_path / "labels.csv"))).rule(),
            str(tmp_path / "o"),
        )
    assert not (tmp_path / "o").exists()


def test_an_id_of_several_rows_is_refused(tmp_path):
    scores = make_scores(tmp_path, {"a": {"s": np.ones(3)}, "b": {"s": np.ones(3)}})
    table = pq.read_table(tmp_path / "scores/b.parquet")
    pq.write_table(table.set_column(1, table.schema.field(1), [["a-1", "b-1", "b-2"]]), tmp_path / "scores/b.parquet")
    (tmp_path / "labels.csv").write_text("id,label\na-1,1\nb-2,0\n")
    with pytest.raises(CorpusError, match="line 2: id 'a-1': is the id of several rows; label them by shard and row"):
        curate(
            scores,
            "s",
            RuleOptions(by="s", audit=read_labels(str(tmp_path / "labels.csv"))).rule(),
            str(tmp_path / "o"),
        )


def test_the_command_says_it_in_one_line(scores, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write(tmp_path, scores, "row")
    audited = ["select", scores, "--by", "s", "--audit", "labels.csv", "--out", "out"]
    assert main([*audited, "--beta", "2"]) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("audit: ")]
    assert "audit: s cut at 0." in line
    assert "42 labels, 4 of them on rows that no cut keeps" in line
    assert main(["select", scores, "--by", "s", "--top", "1", "--beta", "2", "--out", "o"]) == 2
    assert "--beta 2.0: has no effect with --top" in capsys.readouterr().err
    assert main([*audited, "--group", "shard"]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("audit: ")]
    assert lines[0].startswith("audit: shard a.parquet: s cut at 0.")
    assert lines[1].startswith("audit: shard without a cut of its own, as all labels together: s cut at 0.")
    assert lines[2:] == ["audit: fewer than 20 labels, or of one kind: deep/b.parquet (11)"]
    assert main(["explain", scores, "deep/b-5", "--selection", "out"]) == 0
    assert "the cut of its shard" in capsys.readouterr().out
    assert main([*audited[:-1], "weighed", "--format", "weights", "--temperature", "1"]) == 0
    weights = pq.read_table(tmp_path / "weighed/weights/a.parquet")["weight"].to_numpy()
    assert len(weights)
    assert (weights > 0).all()


def test_each_group_is_cut_by_its_own_labels(tmp_path):
    """What is good in one source is not in the other; the labels of quarantined rows count in no group."""
    rng = np.random.default_rng(1)
    values, source = rng.normal(size=(2, 80)).astype(np.float32), np.array([["wiki", "web"] * 40, ["web", "wiki"] * 40])
    shards = {name: {"s": values[i]} for i, name in enumerate("ab")}
    (tmp_path / "data").mkdir()
    for i, name in enumerate("ab"):
        columns = {"id": [f"{name}-{row}" for row in range(80)], "source": source[i].tolist()}
        pq.write_table(pa.table(columns), tmp_path / f"data/{name}.parquet")
    scores = make_scores(tmp_path, shards, without={"a": [3]})
    good = values > np.where(source == "wiki", 0.5, -0.5)
    rows = [(i, row) for i in range(2) for row in range(80) if row % 4 != 1]
    lines = [f"{'ab'[i]}.parquet,{row},{int(good[i, row])}" for i, row in rows]
    (tmp_path / "labels.csv").write_text("\n".join(["shard,row,label", *lines]) + "\n")
    labels = read_labels(str(tmp_path / "labels.csv"))
    rule = RuleOptions(by="s", audit=labels, group="source").rule()
    curated = curate(scores, "s", rule, str(tmp_path / "out"), group="source")
    assert {name: cut.f for name, cut in curated.cut.cuts.items()} == {"wiki": 1, "web": 1}
    limits = {
        name: min(values[i, row] for i, row in rows if source[i, row] == name and good[i, row] and (i, row) != (0, 3))
        for name in ("wiki", "web")
    }
    assert {name: cut.threshold for name, cut in curated.cut.cuts.items()} == limits
    assert sum(cut.rows for cut in curated.cut.cuts.values()) == len(rows) - 1 == curated.cut.pooled.rows - 1
    told = json.loads((tmp_path / "out/manifest.json").read_text())["audit"]
    assert {entry["group"]: entry["threshold"] for entry in told["groups"]} == limits
    assert all(len(entry["threshold_interval"]) == 2 for entry in told["groups"])
    assert (told["rows"], told["pooled_for"], told["least"]) == (len(rows), [], 20)
    groups = {entry["group"]: entry for entry in pq.read_table(tmp_path / "out/_groups.parquet").to_pylist()}
    for name, limit in limits.items():
        assert groups[name]["threshold"] == limit
    fates = pq.read_table(tmp_path / "out/_selection/b.parquet").to_pylist()
    assert [fate["kept"] for fate in fates] == [bool(v >= limits[s]) for v, s in zip(values[1], source[1], strict=True)]
