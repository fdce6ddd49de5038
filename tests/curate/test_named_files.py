"""Rows that name files: a curated corpus has these too, and no others."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from assay.corpus.errors import CorpusError
from assay.corpus.footer import Identity
from assay.corpus.named_files import files_named, save_files
from assay.corpus.shards import find_shards
from assay.corpus.storage import Store
from assay.curate import RuleOptions, curate, find_duplicates
from assay.curate.mixes import Mix
from tests.small_scores import Column, write_manifest, write_table

ROWS = 6


@pytest.fixture
def scores(tmp_path: Path) -> str:
    return make(tmp_path, {"image_column": "image"})


def make(root: Path, task: dict) -> str:
    """Row i of the one shard names `pictures/<i>.png`, by a path or in a struct, and has the score i."""
    for i in range(ROWS):
        path = root / f"data/pictures/{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"picture {i}")
    named = [f"../pictures/{i}.png" if i % 2 else {"bytes": None, "path": f"../pictures/{i}.png"} for i in range(ROWS)]
    (root / "data/deep").mkdir()
    (root / "data/deep/a.jsonl").write_text("".join(json.dumps({"image": name}) + "\n" for name in named))
    recipe = {"seed": 0, "task": task, "methods": [{"method": "minhash", "name": "minhash", "rows": 8}]}
    store, identity = Store.at(str(root / "scores")), Identity(recipe=recipe, models={})
    (shard,) = find_shards(str(root / "data")).shards
    facts = save_files(store, shard, shard.store.fingerprints(files_named(shard, "image")))
    columns = [Column("s"), Column("minhash_text", width=3), Column("minhash_signature", width=8)]
    values = {its.name: np.ones((ROWS, its.width), np.float32) for its in columns} | {"s": np.arange(ROWS)}
    write_table(store, shard, identity, [f"deep/a.jsonl:{i}" for i in range(ROWS)], values, columns, files=facts)
    write_manifest(store, identity, root / "data", [its.name for its in columns])
    return store.url


def files(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): path.read_text() for path in sorted(folder.rglob("*.png"))}


def named(rows: range, below: str = "") -> dict[str, str]:
    return {f"{below}pictures/{i}.png": f"picture {i}" for i in rows}


def test_the_files_of_kept_rows_come_with_them(scores, tmp_path):
    out = tmp_path / "out"
    curate(scores, "s", RuleOptions(top="4", by="s").rule(), str(out))
    assert files(out) == named(range(2, 6))
    (shard,) = find_shards(str(out)).shards
    assert all((out / path).exists() for path in files_named(shard, "image"))
    curate(scores, "s", RuleOptions(top="1", by="s", keep="low").rule(), str(out))
    assert files(out) == named(range(1))  # of an earlier selection none is left
    (out / "mine.png").write_text("a stranger's")
    with pytest.raises(CorpusError, match=r"holds 1 files that this selection would not write \(mine\.png\)"):
        curate(scores, "s", RuleOptions(top="1", by="s").rule(), str(out))
    assert files(out) == {"mine.png": "a stranger's", **named(range(1))}


def test_rows_that_are_there_twice_find_them_too(scores, tmp_path):
    mix = Mix((0.0, 50.0, 100.0), (1.0, 2.0))
    curate(scores, "s", RuleOptions(mix=mix, by="s").rule(), str(tmp_path / "out"), mix=mix)
    assert files(tmp_path / "out") == named(range(6)) | named(range(3, 6), "repeat-2/")
    curate(scores, "s", RuleOptions(top="1", by="s").rule(), str(tmp_path / "out"))
    assert files(tmp_path / "out") == named(range(5, 6))


def test_a_form_that_has_no_place_for_them_is_refused(scores, tmp_path):
    rule = RuleOptions(top="4", by="s").rule()
    with pytest.raises(CorpusError, match=r"deep/a\.jsonl: its rows name files, which `datasets` would take for data"):
        curate(scores, "s", rule, str(tmp_path / "out"), form="datasets")
    other = make(tmp_path / "other", {})
    with pytest.raises(CorpusError, match=r"deep/a\.jsonl: its rows name files, and no recipe says in which column"):
        curate(other, "s", rule, str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()
    curate(other, "s", rule, str(tmp_path / "out"), form="indices")
    assert files(tmp_path / "out") == {}


def test_duplicates_are_a_scores_folder_of_them(scores, tmp_path):
    found = find_duplicates(scores, str(tmp_path / "found"))
    assert found.copies == ROWS - 1
    curate(str(tmp_path / "found"), "copies", RuleOptions(threshold=0, by="copies").rule(), str(tmp_path / "out"))
    assert files(tmp_path / "out") == named(range(1))
