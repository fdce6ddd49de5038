"""Columns that say what kind of row each is."""

from __future__ import annotations

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from assay.corpus.errors import CorpusError
from assay.corpus.scores_folder import open_scores
from assay.explore.groupings import by_column, by_shard, counted
from assay.report import NOT_READ, NOTHING, Groups, find_columns, read_groups
from tests.report.small_report import make_scores
from tests.small_scores import make_scores as make_shards


def named(groups):
    names = {**dict(enumerate(groups.names)), NOTHING: None, NOT_READ: "?"}
    return [names[code] for code in groups.codes.tolist()]


def test_usual_names_are_found_and_their_values_read(tmp_path):
    labels = pa.DictionaryArray.from_arrays(pa.array([0, 1, 1, 0, 1], pa.int8()), ["cat", "dog"])
    rows = {
        "text": list("abcde"), "label": labels, "Lang": ["en", "de", None, "", "de"], "my_source": [2, 1, 1, 1, 2],
        "meta": [{"source": 7 if i else None, "domain": [1]} for i in range(5)],
        "split": [True, False, True, True, None], "topic": [0.5] * 5,
    }  # fmt: skip
    folder = make_scores(tmp_path, rows, {"x": range(5)}, quarantined=[(1, "bad")])
    scores = open_scores(str(folder))
    assert find_columns(scores) == ["label", "meta.source", "Lang", "split"]
    assert find_columns(scores, label="my_source") == ["my_source", "label", "meta.source", "Lang"]
    found, refused = read_groups(scores, ["label", "meta.source", "Lang", "split", "my_source"])
    assert refused == {}
    assert [named(its) for its in found] == [
        ["cat", "dog", "cat", "dog"],
        [None, "7", "7", "7"],
        ["en", None, None, "de"],
        ["true", "true", "true", None],
        ["2", "1", "1", "2"],
    ]
    assert found[0].read == 4


def test_columns_that_are_asked_for(tmp_path):
    folder = make_scores(tmp_path, {"text": ["a", "b"], "n": [[1], [2]], "kind": [1, 2]}, {"x": [1, 2]})
    scores = open_scores(str(folder))
    assert find_columns(scores) == []
    assert find_columns(scores, ["kind", "text", "kind"]) == ["kind", "text"]
    with pytest.raises(CorpusError, match="--group nothing: is no column of the corpus; it has text, n, kind"):
        find_columns(scores, ["nothing"])
    with pytest.raises(CorpusError, match="--group n: holds list<int64>; expected"):
        find_columns(scores, ["n"])


def test_ids_and_texts_are_no_groups(tmp_path):
    rows = {"source": [f"u{i}" for i in range(1200)], "label": ["x" * 201] * 1200, "lang": ["en"] * 1200}
    scores = open_scores(str(make_scores(tmp_path, rows, {"x": range(1200)})))
    found, refused = read_groups(scores, ["source", "label", "lang"])
    assert [its.column for its in found] == ["lang"]
    assert refused == {
        "source": "has more than 1,000 different values",
        "label": "has values of more than 200 characters",
    }


def test_shards_of_other_columns_and_of_json_lines(tmp_path):
    folder = make_shards(tmp_path, {"a": {"x": np.arange(3.0)}, "b": {"x": np.arange(2.0)}})
    scores = open_scores(folder)
    pq.write_table(pa.table({"source": ["web", "book", "web"]}), tmp_path / "data/a.parquet")
    found, _ = read_groups(scores, ["source"])
    assert named(found[0]) == ["web", "book", "web", None, None]
    (tmp_path / "data/b.parquet").unlink()
    assert named(read_groups(scores, ["source"])[0][0]) == ["web", "book", "web", "?", "?"]


def test_rows_of_json_lines_without_the_key(tmp_path):
    folder = make_scores(tmp_path, {"text": list("abc")}, {"x": range(3)}, name="a.parquet")
    scores = open_scores(str(folder))
    lines = [{"text": "a", "source": "web"}, {"text": "b"}, {"text": "c", "source": ["web"]}]
    path = tmp_path / "data/a.parquet"
    path.unlink()
    path.with_suffix(".jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (moved,) = open_scores(str(folder)).shards
    status = scores.shards[0]
    object.__setattr__(status, "shard", moved.shard)
    assert named(read_groups(scores, ["source"])[0][0]) == ["web", None, None]


def test_no_more_rows_than_are_allowed(tmp_path, monkeypatch):
    monkeypatch.setattr("assay.report.groups.MOST_ROWS", 5)
    folder = make_shards(tmp_path, {name: {"x": np.arange(3.0)} for name in "abc"})
    scores = open_scores(folder)
    for seed in range(3):
        (found,), _ = read_groups(scores, ["id"], seed)
        assert found.read == 5
        assert [name in ("?", f"{'abc'[i // 3]}-{i % 3}") for i, name in enumerate(named(found))] == [True] * 9
    assert len({tuple(read_groups(scores, ["id"], seed)[0][0].codes) for seed in range(9)}) > 1


def test_entries_of_a_page():
    codes = np.array([0, 1, NOTHING, NOT_READ, 30, 24, 1], np.int16)
    its = by_column(Groups("source", [f"v{i}" for i in range(40)], codes))
    assert its.names == [*(f"v{i}" for i in range(24)), "16 other values", "no value", "not looked at"]
    assert (its.rest, its.rows[:3], its.rows[24:]) == (3, [1, 2, 0], [2, 1, 1])
    assert its.codes.tolist() == [0, 1, 25, 26, 24, 24, 1]
    few = by_column(Groups("source", ["a"], np.array([0, 0, NOT_READ], np.int16)))
    assert (few.names, few.rest, few.rows, few.codes.tolist()) == (["a", "not looked at"], 1, [2, 1], [0, 0, 1])
    shards = by_shard(["a", "b", "c"], [1, 3, 0])
    assert (shards.names, shards.rows, shards.codes.tolist()) == (["b", "a", "c"], [3, 1, 0], [1, 0, 0, 0])
    assert counted(shards.codes, np.array([1, 0, 1, 1], bool), 3).tolist() == [2, 1, 0]
