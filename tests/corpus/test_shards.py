"""Which files are shards, and what a saved data set says about itself."""

from __future__ import annotations

import json

import fsspec
import pytest

from assay.corpus.errors import CorpusError
from assay.corpus.layout import table_path
from assay.corpus.shards import find_shards, refuse_overlap
from assay.corpus.storage import Store


def touch(folder, *names: str) -> None:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")


def paths(url) -> list[str]:
    return [shard.path for shard in find_shards(str(url)).shards]


def test_a_folder_is_searched_and_hidden_files_are_not(tmp_path):
    touch(
        tmp_path,
        "b.parquet",
        "sub/a.jsonl.zst",
        "sub/c.json.gz",
        ".hidden.parquet",
        ".cache/x.parquet",
        "README.md",
        "_selection/x.parquet",
        "manifest.json",
    )
    assert paths(tmp_path) == ["b.parquet", "sub/a.jsonl.zst", "sub/c.json.gz"]


def test_a_glob_keeps_paths_relative_to_its_fixed_part(tmp_path):
    touch(tmp_path, "data/2024/a.parquet", "data/2025/a.parquet", "data/2025/b.jsonl")
    assert paths(tmp_path / "data/*/a.parquet") == ["2024/a.parquet", "2025/a.parquet"]
    assert paths(tmp_path / "data/**/*.parquet") == ["2024/a.parquet", "2025/a.parquet"]


def test_one_file_and_a_name_with_brackets(tmp_path):
    touch(tmp_path, "part[1].parquet", "part1.parquet")
    assert paths(tmp_path / "part[1].parquet") == ["part[1].parquet"]


def test_other_file_systems():
    fsspec.filesystem("memory").pipe({"/shards/x/a.jsonl": b"", "/shards/x/b.parquet": b""})
    corpus = find_shards("memory://shards/x/*.jsonl")
    assert [shard.path for shard in corpus.shards] == ["a.jsonl"]
    assert [shard.path for shard in find_shards(corpus.store.url).shards] == ["a.jsonl", "b.parquet"]


@pytest.mark.parametrize(
    ("name", "stem"),
    [("a.b.jsonl.gz", "a.b"), ("x/a.parquet", "x/a"), ("a.JSONL.ZST", "a"), ("a.feather", "a")],
)
def test_stems_lose_every_suffix_but_nothing_else(tmp_path, name, stem):
    touch(tmp_path, name)
    (shard,) = find_shards(str(tmp_path)).shards
    assert (shard.stem, table_path(shard)) == (stem, f"{stem}.parquet")


def test_two_shards_of_one_table_are_an_error_that_names_both(tmp_path):
    touch(tmp_path, "a.jsonl", "a.parquet")
    with pytest.raises(CorpusError, match=r"a\.jsonl and a\.parquet"):
        find_shards(str(tmp_path))


@pytest.mark.parametrize("url", ["nothing", "nothing/*.parquet", "a.odt", "*.odt", "a.parquet.gz"])
def test_nothing_to_read_is_an_error(tmp_path, url):
    touch(tmp_path, "a.odt", "a.parquet.gz")
    with pytest.raises(CorpusError):
        find_shards(str(tmp_path / url))


def saved(folder, names, split="") -> None:
    touch(folder, *[f"{split}{name}" for name in ("old.arrow", "cache-1.arrow", "data-0.arrow", "data-1.arrow")])
    (folder / f"{split}dataset_info.json").write_text("{}")
    (folder / f"{split}state.json").write_text(json.dumps({"_data_files": [{"filename": n} for n in names]}))


def test_a_saved_data_set_lists_its_own_files(tmp_path):
    saved(tmp_path, ["data-0.arrow", "data-1.arrow"])
    corpus = find_shards(str(tmp_path))
    assert [shard.path for shard in corpus.shards] == ["data-0.arrow", "data-1.arrow"]
    assert corpus.sidecars == ("dataset_info.json", "state.json")


def test_saved_splits(tmp_path):
    (tmp_path / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    for split in ("train/", "test/"):
        (tmp_path / split).mkdir()
        saved(tmp_path, ["data-0.arrow"], split)
    corpus = find_shards(str(tmp_path))
    assert [shard.path for shard in corpus.shards] == ["test/data-0.arrow", "train/data-0.arrow"]
    assert len(corpus.sidecars) == 5


BAD_STATES = {
    "elsewhere": '{"_data_files": [{"filename": "../secret.arrow"}]}',
    "absolute": '{"_data_files": [{"filename": "/etc/passwd"}]}',
    "empty name": '{"_data_files": [{"filename": ""}]}',
    "parent": '{"_data_files": [{"filename": ".."}]}',
    "number": '{"_data_files": [{"filename": 5}]}',
    "cut": "{",
    "list": "[]",
    "null": "null",
    "deep": "[" * 100_000,
    "deep in its place": '{"_data_files": ' + "[" * 100_000,
    "files that are none": '{"_data_files": 7}',
    "not UTF-8": b"\xff",
}


@pytest.mark.parametrize("name", BAD_STATES)
def test_a_damaged_state_is_named_and_its_arrow_files_are_not_read(tmp_path, name):
    touch(tmp_path, "a.jsonl", "bad/data-0.arrow", "bad/b.jsonl")
    state = BAD_STATES[name]
    (tmp_path / "bad/state.json").write_bytes(state if isinstance(state, bytes) else state.encode())
    (tmp_path / "good").mkdir()
    saved(tmp_path / "good", ["data-0.arrow"])
    corpus = find_shards(str(tmp_path))
    assert [shard.path for shard in corpus.shards] == ["a.jsonl", "bad/b.jsonl", "good/data-0.arrow"]
    (entry,) = corpus.left_out
    assert entry.path == "bad/state.json"
    assert "no Arrow file beside it is read" in entry.reason
    assert len(entry.reason) < 500
    assert "bad/state.json" not in corpus.sidecars
    (tmp_path / "bad/b.jsonl").unlink()
    with pytest.raises(CorpusError, match=r"no shard found.*state\.json: "):
        find_shards(str(tmp_path / "bad"))


def test_a_listed_file_that_is_missing_is_a_shard_that_cannot_be_read(tmp_path):
    saved(tmp_path, ["data-0.arrow", "data-7.arrow"])
    assert paths(tmp_path) == ["data-0.arrow", "data-7.arrow"]


def test_other_formats_beside_a_saved_data_set_are_read(tmp_path):
    saved(tmp_path, ["data-0.arrow"])
    touch(tmp_path, "more.jsonl")
    assert paths(tmp_path) == ["data-0.arrow", "more.jsonl"]


def test_the_output_is_not_where_a_linked_file_lies(tmp_path):
    for name in ("elsewhere/real.jsonl", "data/own.jsonl"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text("{}\n")
    (tmp_path / "data/linked.jsonl").symlink_to(tmp_path / "elsewhere/real.jsonl")
    corpus = find_shards(str(tmp_path / "data"))
    refuse_overlap(Store.at(str(tmp_path / "scores")), str(tmp_path / "data"), corpus)
    for output in ("elsewhere", "data", "data/deeper", ""):
        with pytest.raises(CorpusError, match="must not lie in each other"):
            refuse_overlap(Store.at(str(tmp_path / output)), str(tmp_path / "data"), corpus)
