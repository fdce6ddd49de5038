"""Which files are shards, and what a saved data set says about itself."""

from __future__ import annotations

import json

import fsspec
import pytest

from assay.corpus.errors import CorpusError
from assay.corpus.layout import table_path
from assay.corpus.shards import find_shards


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


@pytest.mark.parametrize("url", ["nothing", "nothing/*.parquet", "a.csv", "*.csv", "a.parquet.gz"])
def test_nothing_to_read_is_an_error(tmp_path, url):
    touch(tmp_path, "a.csv", "a.parquet.gz")
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


@pytest.mark.parametrize("name", ["../secret.arrow", "/etc/passwd", "", "..", 5])
def test_a_state_cannot_point_elsewhere(tmp_path, name):
    saved(tmp_path, [name])
    with pytest.raises(CorpusError, match="plain file names"):
        find_shards(str(tmp_path))


def test_a_damaged_state_is_an_error(tmp_path):
    saved(tmp_path, [])
    (tmp_path / "state.json").write_text("{")
    with pytest.raises(CorpusError, match="not the state of a saved data set"):
        find_shards(str(tmp_path))
