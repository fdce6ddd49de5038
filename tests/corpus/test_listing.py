"""What a folder holds: links followed once, nothing left out without a word, one bad name no end of the rest."""

from __future__ import annotations

import json
import os
import socket

import fsspec
import pytest

from assay.corpus.errors import CorpusError, ShardError
from assay.corpus.layout import table_path
from assay.corpus.listing import list_files
from assay.corpus.readers import read
from assay.corpus.shards import find_shards
from assay.corpus.storage import Store

ROW = b'{"text": "a"}\n'


def touch(folder, *names: str) -> None:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(ROW)


def paths(url) -> list[str]:
    return [shard.path for shard in find_shards(str(url)).shards]


def left_out(url) -> dict[str, str]:
    return {entry.path: entry.reason for entry in find_shards(str(url)).left_out}


def test_a_link_to_a_folder_outside_is_followed_once(tmp_path):
    touch(tmp_path, "in/a.jsonl", "elsewhere/b.jsonl", "elsewhere/deep/c.jsonl")
    (tmp_path / "in/link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "in/second").symlink_to(tmp_path / "elsewhere/deep")
    assert paths(tmp_path / "in") == ["a.jsonl", "link/b.jsonl", "link/deep/c.jsonl"]
    assert left_out(tmp_path / "in") == {}
    assert all(list(read(shard, ["text"])) for shard in find_shards(str(tmp_path / "in")).shards)


def test_a_link_inside_adds_nothing_and_loses_nothing(tmp_path):
    touch(tmp_path, "z/a.jsonl", "b.jsonl")
    (tmp_path / "a").symlink_to("z")
    (tmp_path / "z/again").symlink_to("../z")
    assert paths(tmp_path) == ["b.jsonl", "z/a.jsonl"]
    assert left_out(tmp_path) == {}


def test_links_in_circles_end(tmp_path):
    touch(tmp_path, "in/a.jsonl", "one/b.jsonl", "two/c.jsonl")
    (tmp_path / "in/one").symlink_to(tmp_path / "one")
    (tmp_path / "one/two").symlink_to(tmp_path / "two")
    (tmp_path / "two/one").symlink_to(tmp_path / "one")
    (tmp_path / "in/self").symlink_to("self")
    assert paths(tmp_path / "in") == ["a.jsonl", "one/b.jsonl", "one/two/c.jsonl"]
    assert list(left_out(tmp_path / "in")) == ["self"]


@pytest.mark.parametrize("target", [".", "..", "../.."])
def test_a_link_to_a_folder_that_holds_the_corpus_is_named(tmp_path, target):
    touch(tmp_path, "mine/in/a.jsonl", "mine/other.jsonl")
    (tmp_path / "mine/in/up").symlink_to(target)
    assert paths(tmp_path / "mine/in") == ["a.jsonl"]
    assert left_out(tmp_path / "mine/in") == {"up": "is a link to a folder that holds the corpus"}


def test_a_glob_follows_links_too(tmp_path):
    touch(tmp_path, "in/x/a.jsonl", "elsewhere/b.jsonl")
    (tmp_path / "in/link").symlink_to(tmp_path / "elsewhere")
    for pattern in ("**/*.jsonl", "*/*.jsonl", "*"):
        assert paths(tmp_path / "in" / pattern) == ["link/b.jsonl", "x/a.jsonl"]


@pytest.mark.parametrize("at", ["local", "memory"])
def test_a_globs_wildcards_stand_for_no_hidden_name(tmp_path, at):
    """An editor's copy of a shard under a dot, or a selection's table of reasons, is nobody's data."""
    names = ["a.jsonl", "_b.jsonl", "._a.jsonl", ".ipynb_checkpoints/a-checkpoint.jsonl", "_selection/a.jsonl"]
    names += ["x/c.jsonl", "x/.y/d.jsonl"]
    root = str(tmp_path)
    if at == "local":
        touch(tmp_path, *names)
    else:
        root = "memory://globbed"
        fsspec.filesystem("memory").pipe({f"/globbed/{name}": ROW for name in names})
    assert paths(f"{root}/*.jsonl") == ["_b.jsonl", "a.jsonl"]
    assert paths(f"{root}/*/*.jsonl") == ["x/c.jsonl"]
    assert paths(f"{root}/*") == paths(f"{root}/**/*.jsonl") == ["_b.jsonl", "a.jsonl", "x/c.jsonl"]
    assert paths(f"{root}/.*/*.jsonl") == [".ipynb_checkpoints/a-checkpoint.jsonl"]
    assert paths(f"{root}/**/.y/*.jsonl") == ["x/.y/d.jsonl"]
    assert paths(f"{root}/_sel*/*.jsonl") == ["_selection/a.jsonl"]
    assert paths(f"{root}/_selection/*.jsonl") == ["a.jsonl"]
    if at == "local":  # nor is one named that is not read
        (tmp_path / ".up").symlink_to("..")
        assert left_out(f"{root}/**/*.jsonl") == {}
        assert list(left_out(f"{root}/**/.*/*.jsonl")) == [".up"]


def test_a_linked_corpus_and_a_linked_file(tmp_path):
    touch(tmp_path, "real/a.jsonl", "elsewhere/b.jsonl")
    (tmp_path / "real/b.jsonl").symlink_to(tmp_path / "elsewhere/b.jsonl")
    (tmp_path / "corpus").symlink_to(tmp_path / "real")
    assert paths(tmp_path / "corpus") == ["a.jsonl", "b.jsonl"]


@pytest.mark.parametrize(
    "name", ["a.odt.gz", "a.parquet.gz", "a.jsonl.lz4", "a.tgz", "a.avro", "a.txt", "part-00000", "a.jsonl~", "a.zip"]
)
def test_a_file_that_may_be_data_is_named(tmp_path, name):
    touch(tmp_path, "b.jsonl", f"deep/{name}")
    assert paths(tmp_path) == ["b.jsonl"]
    (entry,) = left_out(tmp_path).items()
    assert entry[0] == f"deep/{name}"
    assert "not a known format; expected .parquet" in entry[1]


def test_notes_media_and_hidden_files_are_no_loss(tmp_path):
    notes = ["README.md", "LICENSE", "LICENSE.txt", "dataset.yaml", "a.jsonl.sha256", "SHA256SUMS", "x.png", "fix.py"]
    touch(tmp_path, "b.jsonl", "manifest.json", ".cache/a.csv", "_SUCCESS", ".gitattributes", *notes)
    assert left_out(tmp_path) == {}
    assert paths(tmp_path) == ["b.jsonl"]


def test_rows_in_a_file_that_is_called_as_a_selections_manifest_are_named(tmp_path):
    touch(tmp_path, "b.jsonl", "ours/manifest.json", "one/manifest.json", "rows/manifest.json")
    (tmp_path / "ours/manifest.json").write_text(json.dumps({"rule": "x", "shards": [{}]}, indent=2))
    (tmp_path / "rows/manifest.json").write_bytes(2 * ROW)
    assert list(left_out(tmp_path)) == ["rows/manifest.json"]
    assert paths(tmp_path) == ["b.jsonl"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every folder")
def test_a_folder_that_cannot_be_listed_is_named(tmp_path):
    touch(tmp_path, "a.jsonl", "closed/b.jsonl")
    (tmp_path / "closed").chmod(0)
    try:
        assert left_out(tmp_path) == {"closed": "cannot be listed: Permission denied"}
    finally:
        (tmp_path / "closed").chmod(0o700)


def test_a_name_that_is_not_utf8_is_named_and_the_rest_is_found(tmp_path):
    touch(tmp_path, "a.jsonl", "deep/c.jsonl")
    for name in (b"b\xff.jsonl", b"\xfe/d.jsonl"):
        full = os.path.join(os.fsencode(tmp_path), name)
        os.makedirs(os.path.dirname(full), exist_ok=True)
        with open(full, "wb") as file:
            file.write(ROW)
    assert paths(tmp_path) == ["a.jsonl", "deep/c.jsonl"]
    assert left_out(tmp_path) == {
        r"b\xff.jsonl": "its name is not UTF-8; rename it",
        r"\xfe/d.jsonl": "its name is not UTF-8; rename it",
    }


def test_long_names(tmp_path):
    fits, too_long = "é" * 123 + "a.jsonl", "x" * 249 + ".jsonl"
    assert len(fits.encode()) == 253
    touch(tmp_path, fits, too_long)
    assert paths(tmp_path) == [fits]
    assert left_out(tmp_path) == {too_long: "its score table's name would be longer than 255 bytes; rename it"}
    store = Store.at(str(tmp_path / "out"))
    (shard,) = find_shards(str(tmp_path)).shards
    store.write_text(table_path(shard), "a name of 255 bytes has room for its temporary")
    assert store.files() == [table_path(shard)]


def test_only_regular_files_are_opened(tmp_path):
    touch(tmp_path, "a.jsonl")
    os.mkfifo(tmp_path / "fifo.jsonl")
    (tmp_path / "zero.jsonl").symlink_to("/dev/zero")
    (tmp_path / "gone.jsonl").symlink_to("nowhere")
    (tmp_path / "state.json").symlink_to("/dev/zero")
    with socket.socket(socket.AF_UNIX) as server:
        here = os.getcwd()
        os.chdir(tmp_path)  # the path of a socket may have 107 bytes
        try:
            server.bind("socket.jsonl")
        finally:
            os.chdir(here)
        corpus = find_shards(str(tmp_path))
        assert [entry.path for entry in corpus.left_out] == ["state.json"]
        for shard in corpus.shards:
            if shard.path == "a.jsonl":
                assert sum(chunk.length for chunk in read(shard, ["text"])) == 1
            else:
                with pytest.raises(ShardError, match=r"not a regular file|No such"):
                    list(read(shard, ["text"]))
    assert len(corpus.shards) == 5


def test_a_table_that_would_be_a_folder_is_an_error_that_names_both(tmp_path):
    touch(tmp_path, "a.jsonl", "a.parquet/part.jsonl")
    with pytest.raises(CorpusError, match=r"a\.jsonl: its score table a\.parquet would be the folder of a\.parq"):
        find_shards(str(tmp_path))


def test_an_object_stores_listing_gives_fingerprints():
    fs = fsspec.filesystem("memory")
    fs.pipe({"/listing/x/a.jsonl": ROW, "/listing/.hidden/b.jsonl": ROW, "/listing/_x.jsonl": ROW})
    listing = list_files(Store(fs, "/listing"))
    assert list(listing.files) == ["x/a.jsonl"]


def test_listing_asks_for_no_file(tmp_path, monkeypatch):
    touch(tmp_path, *(f"{i % 7}/{i}.jsonl" for i in range(200)))
    asked = []
    stat = os.stat
    monkeypatch.setattr(os, "stat", lambda path, *args, **options: asked.append(path) or stat(path, *args, **options))
    assert len(paths(tmp_path)) == 200
    assert len(asked) < 40
