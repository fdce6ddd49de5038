"""Rows that are there more than once."""

from __future__ import annotations

import json

import numpy as np
import pytest

from assay.corpus.footer import Identity
from assay.corpus.scores_folder import open_scores
from assay.corpus.shards import find_shards
from assay.corpus.storage import Store
from assay.report import NOTHING, find_duplicates
from assay.report.duplicates import Repeated, normalised
from tests.report.small_report import make_scores
from tests.small_scores import Column, write_manifest, write_table
from tests.small_scores import make_scores as make_shards


def find(root, rows, columns, labels=None, **more):
    count = len(next(iter(rows.values())))
    folder = make_scores(root, rows, {"x": range(count)}, **more)
    return find_duplicates(open_scores(str(folder)), columns, labels)


def test_the_same_text_but_for_case_and_spaces(tmp_path):
    texts = ["A  b\n", "a b", "ab", "", None, "ﬁne", "FINE", "a\tB", "ab", "", "x", "ab"]
    found = find(tmp_path, {"text": texts}, ["text"], quarantined=[(8, "bad")])
    assert (found.rows, found.all_rows, found.groups, found.repeated, found.apart) == (11, True, 3, 7, None)
    assert found.largest == [Repeated(3, (0, 1)), Repeated(2, (2, 10)), Repeated(2, (5, 6))]


def test_against_all_pairs(tmp_path):
    rng = np.random.default_rng(0)
    words = ["a", "b", " A", "Ｂ", "\u00e9", "e\u0301"]
    texts = ["".join(rng.choice(words, 2)) for _ in range(60)]
    labels = rng.integers(-1, 3, 60).astype(np.int16)
    found = find(tmp_path, {"text": texts}, ["text"], labels)
    clean = [normalised(text) for text in texts]
    groups = {text: [i for i in range(60) if clean[i] == text] for text in clean}
    groups = {text: places for text, places in groups.items() if len(places) > 1}
    assert (found.groups, found.repeated) == (len(groups), sum(map(len, groups.values())))
    apart = [len({labels[i] for i in places} - {NOTHING}) > 1 for places in groups.values()]
    assert 0 < found.apart == sum(apart)


@pytest.mark.parametrize(
    ("columns", "repeated"),
    [
        (["image"], 3), (["messages"], 2), (["numbers"], 2), (["a", "b"], 2), (["a"], 3), (["gone"], None),
        (["a", "gone"], 3), (["n"], 2),
    ],
)  # fmt: skip
def test_every_kind_of_content(tmp_path, columns, repeated):
    rows = {
        "image": [{"bytes": b"A", "path": "x"}, {"bytes": b"A", "path": "y"}, {"bytes": b"a", "path": "x"},
                  {"bytes": b"A", "path": None}],
        "messages": [[{"role": "user", "content": text}] for text in ("Hi", "hi ", "hi there", "h i")],
        "numbers": [[1.0, 2.0], [1.0, 2.5], [1.0, 2.0], []],
        "a": ["x", "x", "xy", "X"],
        "b": ["yz", "yz", "z", "y z"],
        "n": [0, 1, 0, 2],
    }  # fmt: skip
    found = find(tmp_path, rows, columns)
    assert (found and found.repeated) == repeated


def test_over_shards_and_within_limits(tmp_path, monkeypatch):
    folder = make_shards(tmp_path, {"a": {"x": np.arange(4.0)}, "b": {"x": np.arange(4.0)}})
    import pyarrow as pa
    import pyarrow.parquet as pq

    scores = open_scores(folder)
    for name, texts in {"a": "pqrs", "b": "sttt"}.items():
        pq.write_table(pa.table({"text": list(texts)}), tmp_path / f"data/{name}.parquet")
    found = find_duplicates(scores, ["text"])
    assert found.largest == [Repeated(3, (5, 6)), Repeated(2, (3, 4))]
    monkeypatch.setattr("assay.report.duplicates.MOST_BYTES", 1)
    few = find_duplicates(scores, ["text"])
    assert (few.rows, few.all_rows) == (2, False)
    monkeypatch.undo()
    monkeypatch.setattr("assay.report.duplicates.MOST_ROWS", 5)
    few = find_duplicates(scores, ["text"])
    assert (few.rows, few.all_rows) == (5, False)
    monkeypatch.undo()
    (tmp_path / "data/a.parquet").unlink()
    left = find_duplicates(scores, ["text"])
    assert (left.rows, left.all_rows, left.largest) == (4, False, [Repeated(3, (5, 6))])


def test_a_path_is_the_picture_that_it_names(tmp_path):
    """Which lies beside the table: in another folder the same path names another one."""
    names = [{"bytes": None, "path": "0.png"}, "1.png", "A.png", "a.png", "gone.png"]
    pictures = {"x": ["p", "q", "r", "s"], "y": ["t", "q", "u", "s"]}
    for folder, contents in pictures.items():
        (tmp_path / "data" / folder).mkdir(parents=True)
        for name, content in zip(("0.png", "1.png", "A.png", "a.png"), contents, strict=True):
            (tmp_path / "data" / folder / name).write_text(content)
        (tmp_path / f"data/{folder}/t.jsonl").write_text("".join(json.dumps({"image": n}) + "\n" for n in names))
    store, identity = Store.at(str(tmp_path / "scores")), Identity(recipe={"seed": 0}, models={})
    for shard in find_shards(str(tmp_path / "data")).shards:
        write_table(store, shard, identity, list("abcde"), {"s": np.arange(5)}, [Column("s")])
    write_manifest(store, identity, tmp_path / "data", ["s"])
    scores = open_scores(store.url)
    found = find_duplicates(scores, ["image"], images={"image"})
    assert (found.rows, found.all_rows, found.groups, found.repeated) == (10, True, 2, 4)
    assert found.largest == [Repeated(2, (1, 6)), Repeated(2, (3, 8))]
    assert find_duplicates(scores, ["image"]).repeated == 10  # as texts, which they are elsewhere


def test_it_stops_where_it_has_read_enough(tmp_path, monkeypatch):
    monkeypatch.setattr("assay.report.duplicates.MOST_BYTES", 10)
    found = find(tmp_path, {"text": ["1234"] * 9}, ["text"])
    assert (found.rows, found.all_rows, found.repeated) == (3, False, 3)
