"""The files that a shard's rows name: kept, and compared with what they are."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from assay.corpus.errors import BadRow, CorpusError, ShardError
from assay.corpus.images import Beside
from assay.corpus.named_files import changed_file, files_named, save_files
from assay.corpus.shards import Shard, find_shards
from assay.corpus.storage import Store


def corpus(url: str) -> tuple[Store, Shard]:
    store = Store.at(url)
    for name in ("a.png", "b.png"):
        store.write_text(f"part/{name}", name)
    store.write_text("part/t.jsonl", "{}")
    (shard,) = find_shards(url).shards
    return store, shard


@pytest.mark.parametrize("where", ["local", "memory"])
def test_a_changed_file_is_named(tmp_path: Path, where: str) -> None:
    url = f"{tmp_path}/data" if where == "local" else f"memory://{tmp_path.name}/data"
    store, shard = corpus(url)
    output = Store.at(url.replace("data", "scores"))
    beside = Beside(store, "part")
    for path in ("a.png", "b.png", "./a.png"):
        assert beside.read("x", path, 100) == path[-5:].encode()
    with pytest.raises(BadRow):
        beside.read("x", "none.png", 100)
    assert list(beside.files) == ["part/a.png", "part/b.png", "part/none.png"]
    facts = save_files(output, shard, beside.files)
    assert facts is not None
    assert facts.count == 3
    assert changed_file(output, shard, facts) is None
    store.write_text("part/none.png", "now it is there")
    assert changed_file(output, shard, facts) == "'part/none.png', which it names, has changed since it was scored"
    store.write_text("part/b.png", "other")
    said = "'part/b.png' and 1 more, which it names, has changed since it was scored"
    assert changed_file(output, shard, facts) == said
    store.remove("part/b.png")
    assert changed_file(output, shard, facts) == said
    output.write_text("files/part/t.jsonl", "")
    assert "files/part/t.jsonl, the list of the files" in str(changed_file(output, shard, facts))
    output.write_text("files/part/t.jsonl", "a stranger's")
    with pytest.raises(CorpusError, match="not a list of a shard's files"):
        save_files(output, shard, {})
    output.remove("files/part/t.jsonl")
    assert "the list of the files" in str(changed_file(output, shard, facts))
    save_files(output, shard, beside.files)
    assert save_files(output, shard, {}) is None
    assert not output.exists("files/part/t.jsonl")


def test_a_file_that_changes_between_two_rows_is_the_shards_trouble(tmp_path: Path) -> None:
    store, _ = corpus(str(tmp_path))
    beside = Beside(store, "part")
    beside.read("x", "a.png", 100)
    os.utime(tmp_path / "part/a.png", ns=(1, 1))
    with pytest.raises(ShardError, match=r"'part/a\.png', which it names, changed while it was being scored"):
        beside.read("x", "a.png", 100)


def test_which_files_rows_name(tmp_path: Path) -> None:
    data = tmp_path / "data"
    (data / "deep").mkdir(parents=True)
    texts = ["1.png", "../2.png", None, "../../out.png", "https://x/y.png", "/etc/x.png", ""]
    structs = [{"bytes": None, "path": "1.png"}, {"bytes": b"x", "path": "3.png"}, None]
    (data / "deep/a.jsonl").write_text(
        "\n".join(json.dumps({"image": text}) for text in texts) + '\n{"image": {"path": "4.png"}}\n{}\nno JSON\n'
    )
    pq.write_table(pa.table({"image": structs}), data / "b.parquet")
    pq.write_table(pa.table({"image": texts}), data / "c.parquet")
    pq.write_table(pa.table({"image": [b"1.png", b"2.png"]}), data / "d.parquet")
    pq.write_table(pa.table({"other": texts}), data / "z.parquet")
    *shards, other = find_shards(str(data)).shards
    with pytest.raises(ShardError, match="has no column 'image', only 'other'"):
        list(files_named(other, "image"))
    assert {shard.stem: sorted(files_named(shard, "image")) for shard in shards} == {
        "b": ["1.png", "3.png"],  # a name in vain costs a look; to read the bytes would cost the file
        "c": ["1.png"],
        "d": [],
        "deep/a": ["2.png", "deep/1.png", "deep/4.png"],
    }
