"""The samples at both ends of a score: the same as of the whole table at once, NaN aside, from shards as they are."""

from __future__ import annotations

import json
import os
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from assay.corpus import score_files
from assay.corpus.errors import CorpusError
from assay.corpus.footer import Identity
from assay.corpus.scores_folder import open_scores
from assay.corpus.shards import find_shards
from assay.corpus.storage import Store
from assay.curate import rank, read_samples
from assay.curate.ranking import _End
from assay.engine import run
from assay.recipe import load_recipe
from tests.small_project import make_project
from tests.small_scores import Column, write_manifest, write_table


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """Two scored shards in small row groups; ``mimic`` has equal scores, infinities and NaN."""
    made = make_project(tmp_path_factory.mktemp("ranking"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(score_files, "ROW_GROUP_ROWS", 7)
        run(load_recipe(str(made.path)))
    rng = np.random.default_rng(0)
    for path in sorted(made.scores.rglob("*.parquet")):
        table = pq.read_table(path)
        values = np.round(rng.normal(size=len(table)), 1).astype(np.float32)
        values[[3, 8]] = np.nan
        values[[5, 6]] = np.inf, -np.inf
        place = table.schema.get_field_index("mimic")
        table = table.set_column(place, table.schema.field("mimic"), pa.array(values, from_pandas=False))
        pq.write_table(table, path, row_group_size=7)
    return made


def everything(project):
    """(shard, row, id, mimic) of all rows, in order."""
    rows = []
    for shard, path in (("a.parquet", "a.parquet"), ("deep/b.jsonl", "deep/b.parquet")):
        table = pq.read_table(project.scores / path)
        columns = (table[name].to_pylist() for name in ("row", "id", "mimic"))
        rows += [(shard, *values) for values in zip(*columns, strict=True)]
    return rows


def names(ranked):
    return [(sample.shard.path, sample.row, sample.id, sample.scores["mimic"]) for sample in ranked]


@pytest.mark.parametrize("keep", [None, "low"])
def test_both_ends_are_those_of_the_whole_table(project, keep, monkeypatch):
    monkeypatch.setattr(score_files, "ROW_GROUP_ROWS", 4)
    ranking = rank(open_scores(str(project.scores)), "mimic", best=9, worst=9, without=3, keep=keep)
    rows = [row for row in everything(project) if row[3] == row[3]]
    up, down = sorted(rows, key=lambda row: row[3]), sorted(rows, key=lambda row: -row[3])
    best, worst = (up, down) if keep == "low" else (down, up)
    assert names(ranking.best) == best[:9]
    assert names(ranking.worst) == worst[:9]
    assert (ranking.keep, ranking.rows, ranking.nan) == (keep or "high", 80, 4)
    assert [(s.shard.path, s.row) for s in ranking.without] == [("a.parquet", 3), ("a.parquet", 8), ("deep/b.jsonl", 3)]
    assert ranking.best[0].scores.keys() >= {"ensemble_nll", "loss"}
    assert not ranking.left_out


def test_a_table_with_several_numbers_per_row_is_refused_wherever_it_stands(project, tmp_path):
    folder = shutil.copytree(project.scores, tmp_path / "scores")
    table = pq.read_table(folder / "deep/b.parquet")
    place = table.schema.get_field_index("mimic")
    lists = pa.array([[0.5]] * len(table), pa.list_(pa.float32()))
    field = table.schema.field("mimic").with_type(lists.type)
    pq.write_table(table.set_column(place, field, lists), folder / "deep/b.parquet")
    with pytest.raises(CorpusError, match=r"^mimic: .*b\.parquet holds list<.*> per row; expected one number"):
        rank(open_scores(str(folder)), "mimic")


@pytest.mark.parametrize("count", [0, 1, 5, 200])
def test_an_end_holds_no_more_than_it_is_asked_for(count):
    rng = np.random.default_rng(count)
    values = rng.integers(0, 9, 100).astype(np.float32)
    values[rng.random(100) < 0.2] = np.nan
    end = _End(count, -1.0)
    for start in range(0, 100, 13):
        end.see(0, start, values[start : start + 13])
        assert len(end.values) <= count
    expected = [i for i in np.argsort(values, kind="stable") if values[i] == values[i]][:count]
    assert end.places[:, 1].tolist() == expected


def test_samples_are_the_corpus_own_rows(project):
    ranking = rank(open_scores(str(project.scores)), "mimic", best=5, worst=5)
    ranked = [*ranking.best, *ranking.worst]
    samples = read_samples(ranked, ["id", "label"])
    assert {sample.shard.path for sample in ranked} == {"a.parquet", "deep/b.jsonl"}
    assert [samples[s.shard.path, s.row]["id"] for s in ranked] == [s.id for s in ranked]
    absent = read_samples(ranked[:1], ["pixel"])
    assert "has no column 'pixel'" in absent[ranked[0].shard.path, ranked[0].row]


def test_a_row_is_shown_without_a_key_that_it_may_lack(tmp_path):
    """As a conversation without tools, which has its scores."""
    rows = [{"messages": "a", "tools": "t"}, {"messages": "b"}]
    (tmp_path / "data").mkdir()
    (tmp_path / "data/a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (shard,) = find_shards(str(tmp_path / "data")).shards
    identity, store = Identity(recipe={"seed": 0}, models={}), Store.at(str(tmp_path / "scores"))
    write_table(store, shard, identity, ["0", "1"], {"s": np.arange(2, dtype=np.float32)}, [Column("s")])
    write_manifest(store, identity, tmp_path / "data", ["s"])
    ranked = rank(open_scores(store.url), "s", best=2).best
    shown = read_samples(ranked, ["messages", "tools"])
    assert shown == {("a.jsonl", 0): rows[0], ("a.jsonl", 1): rows[1] | {"tools": None}}


def test_what_is_not_scored_as_it_is_now_is_left_out_and_named(tmp_path):
    project = make_project(tmp_path)
    run(load_recipe(str(project.path)))
    os.utime(project.root / "data/a.parquet")
    project.write_shard("new.jsonl", [{"id": "x", "pixels": [0.0] * 6, "label": 0}])
    ranking = rank(open_scores(str(project.scores)), "mimic")
    assert {sample.shard.path for sample in (*ranking.best, *ranking.worst)} == {"deep/b.jsonl"}
    assert dict(ranking.left_out) == {
        "a.parquet": "the file has changed since it was scored",
        "new.jsonl": "missing",
    }
    os.utime(project.root / "data/deep/b.jsonl")
    with pytest.raises(CorpusError, match=r"no shard of .* is scored as it is now \(a.parquet: the file has changed"):
        rank(open_scores(str(project.scores)), "mimic")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"by": "mimics"}, "--by mimics: .* has no such score; did you mean mimic"),
        ({"by": "zzzzz"}, "--by zzzzz: .* has no such score, only ensemble_nll"),
        ({"by": "ensemble_entropy"}, "stands for neither end; say which is better with --keep high or low"),
        ({"by": "mimic", "keep": "up"}, "--keep up: expected high or low"),
        ({"by": "mimic", "best": -1}, "--best -1: expected 0 or more"),
    ],
)
def test_misuse_is_named(project, options, message):
    with pytest.raises(CorpusError, match=message):
        rank(open_scores(str(project.scores)), **options)
