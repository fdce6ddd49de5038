"""Folders of images: the class is the folder's name, a row is a file, and other corpora are what they were."""

from __future__ import annotations

import errno
import os

import fsspec
import numpy as np
import pytest

from assay.corpus import compression
from assay.corpus.copying import copy_rows
from assay.corpus.errors import CorpusError, ShardError
from assay.corpus.format import ColumnFacts
from assay.corpus.formats import images
from assay.corpus.layout import table_path
from assay.corpus.readers import columns_of, read
from assay.corpus.shards import find_shards, refuse_overlap
from assay.corpus.storage import Store

NAMES = ["cat/1.png", "cat/10.JPG", "cat/2.png", "dog v1.2/a.webp"]


def fill(folder, names=NAMES) -> None:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(name.encode())


def rows_of(shard, *columns: str) -> list:
    rows: list = []
    for chunk in read(shard, columns):
        assert chunk.first == len(rows)
        rows += [chunk.faults.get(i) or tuple(chunk.columns[name][i] for name in columns) for i in range(chunk.length)]
    return rows


def left_out(url) -> dict[str, str]:
    return {entry.path: entry.reason for entry in find_shards(str(url)).left_out}


def test_a_folder_of_classes_is_a_shard(tmp_path):
    fill(tmp_path / "pets.v1", [*NAMES, "cat/.hidden.png", "_cache/x.png", "cat/README.md"])
    corpus = find_shards(str(tmp_path / "pets.v1"))
    (shard,) = corpus.shards
    assert (shard.path, table_path(shard), corpus.left_out) == ("pets.v1", "pets.v1.parquet", ())
    assert rows_of(shard, "path", "label", "image") == [
        (name, name.split("/")[0], {"bytes": name.encode(), "path": name}) for name in NAMES
    ]
    assert rows_of(shard, "image.bytes") == [(name.encode(),) for name in NAMES]
    assert columns_of(shard) == {
        "image": ColumnFacts("image"),
        "image.bytes": ColumnFacts("binary"),
        "image.path": ColumnFacts("string"),
        "label": ColumnFacts("string", ("cat", "dog v1.2"), in_order=True),
        "path": ColumnFacts("string"),
    }
    with pytest.raises(ShardError, match=r"no column 'labels'.*did you mean 'label'"):
        rows_of(shard, "labels")
    assert max(chunk.progress for chunk in read(shard, ["label"])) == 1.0


def test_parts_are_shards_of_their_own(tmp_path):
    fill(tmp_path, ["test/cat/1.png", "train/cat/2.png", "train/dog/3.png"])
    corpus = find_shards(str(tmp_path))
    assert [shard.path for shard in corpus.shards] == ["test", "train"]
    assert rows_of(corpus.shards[1], "path", "label") == [("cat/2.png", "cat"), ("dog/3.png", "dog")]
    assert [columns_of(shard)["label"].classes for shard in corpus.shards] == [("cat", "dog")] * 2
    (alone,) = find_shards(str(tmp_path / "train")).shards
    assert (alone.path, rows_of(alone, "path")) == ("train", rows_of(corpus.shards[1], "path"))


def test_another_file_system():
    fs = fsspec.filesystem("memory")
    for name in NAMES:
        fs.pipe_file(f"/imagefolder/{name}", name.encode())
    (shard,) = find_shards("memory://imagefolder").shards
    assert rows_of(shard, "path", "image.bytes") == [(name, name.encode()) for name in NAMES]
    before = shard.fingerprint()
    fs.pipe_file("/imagefolder/cat/3.png", b"new")
    assert shard.fingerprint() != before


def test_beside_tables_images_are_no_data(tmp_path):
    fill(tmp_path)
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n')
    corpus = find_shards(str(tmp_path))
    assert [shard.path for shard in corpus.shards] == ["a.jsonl"]
    assert corpus.left_out == ()


def test_images_that_lie_elsewhere(tmp_path):
    fill(tmp_path, ["flat/a.png", "mixed/cat/a.png", "mixed/cat/old/b.png", "stray/cat/a.png", "stray/b.png"])
    with pytest.raises(CorpusError, match=r"no shard found.*images per class; a\.png: an image that lies in"):
        find_shards(str(tmp_path / "flat"))
    with pytest.raises(CorpusError, match=r"different depths \(cat/a\.png and cat/old/b\.png\)"):
        find_shards(str(tmp_path / "mixed"))
    assert left_out(tmp_path / "stray") == {"b.png": "an image that lies in no folder of a class"}
    with pytest.raises(CorpusError, match="no shard found"):
        find_shards(str(tmp_path / "m*"))


def test_what_may_be_data_is_named(tmp_path):
    fill(tmp_path, [*NAMES, "cat/caption.txt"])
    assert list(left_out(tmp_path)) == ["cat/caption.txt"]


def test_the_fingerprint_is_of_all_files(tmp_path):
    fill(tmp_path)
    (shard,) = find_shards(str(tmp_path)).shards
    first = shard.fingerprint()
    assert first == shard.fingerprint()
    assert first.size == sum(map(len, NAMES))
    changes = [
        lambda: os.utime(tmp_path / "cat/2.png", ns=(1, 1)),
        lambda: fill(tmp_path, ["cat/3.png"]),
        lambda: (tmp_path / "cat/3.png").rename(tmp_path / "cat/4.png"),
        lambda: (tmp_path / "cat/4.png").rename(tmp_path / "dog v1.2/4.png"),
        lambda: (tmp_path / "dog v1.2/4.png").unlink(),
    ]
    seen = [first]
    for change in changes:
        change()
        seen.append(shard.fingerprint())
        assert seen[-1] != seen[-2]


def test_one_listing_of_an_object_store_tells_all_fingerprints(monkeypatch):
    fs = fsspec.filesystem("memory")
    fs.pipe({f"/etags/{name}": b"x" for name in NAMES})
    find, asked = fs.find, []

    def listed(root, **options):
        asked.append(root)
        return {path: facts | {"ETag": path} for path, facts in find(root, **options).items()}

    monkeypatch.setattr(fs, "find", listed)
    (shard,) = find_shards("memory://etags").shards
    monkeypatch.setattr(fs, "info", None)
    asked.clear()
    assert shard.fingerprint().size == len(NAMES)
    assert asked == ["/etags"]


def test_chosen_files_are_copied_and_others_of_an_earlier_selection_go(tmp_path):
    fill(tmp_path / "pets")
    (shard,) = find_shards(str(tmp_path / "pets")).shards
    out = Store.at(str(tmp_path / "out"))
    copy_rows(shard, np.array([True, True, False, False]), out)
    assert out.files() == ["pets/cat/1.png", "pets/cat/10.JPG"]
    copy_rows(shard, np.array([False, True, False, True]), out)
    assert out.files() == ["pets/cat/10.JPG", "pets/dog v1.2/a.webp"]
    (copied,) = find_shards(str(tmp_path / "out")).shards
    assert (copied.path, rows_of(copied, "path", "image.bytes")) == (
        "pets",
        [(name, name.encode()) for name in (NAMES[1], NAMES[3])],
    )
    with pytest.raises(ShardError, match="4 rows, but 3"):
        copy_rows(shard, np.ones(3, bool), out)


def test_a_class_of_which_nothing_is_kept_is_named(tmp_path, caplog):
    fill(tmp_path / "pets")
    (shard,) = find_shards(str(tmp_path / "pets")).shards
    for keep, lost in (
        ([True, True, False, False], "dog v1.2"),
        ([True, False, False, True], None),
        ([False] * 4, None),
    ):
        caplog.clear()
        copy_rows(shard, np.array(keep), Store.at(str(tmp_path / "out")))
        said = [message for message in caplog.messages if "ImageFolder" in message]
        assert len(said) == (lost is not None)
        assert all(f"no image of class {lost} is kept" in message for message in said)


def test_a_folder_that_is_gone_is_an_error(tmp_path):
    fill(tmp_path / "pets")
    (shard,) = find_shards(str(tmp_path / "pets")).shards
    (tmp_path / "pets").rename(tmp_path / "moved")
    with pytest.raises(ShardError, match="no image"):
        rows_of(shard, "label")
    with pytest.raises(OSError, match="no image"):
        shard.fingerprint()


def test_files_that_cannot_be_read_are_faults_of_their_rows(tmp_path, monkeypatch):
    fill(tmp_path)
    os.mkfifo(tmp_path / "cat/3.png")
    (tmp_path / "cat/4.png").symlink_to("/dev/zero")
    (tmp_path / "cat/5.png").symlink_to("nowhere")
    (tmp_path / "cat/6.png").write_bytes(bytes(101))
    monkeypatch.setattr(images, "MAX_LINE_BYTES", 100)
    (tmp_path / "cat/7.png").symlink_to("7.png")
    (shard,) = find_shards(str(tmp_path)).shards
    rows = rows_of(shard, "image.bytes")
    assert [row for row in rows if isinstance(row, tuple)] == [(name.encode(),) for name in NAMES]
    assert [row for row in rows if isinstance(row, str)] == [
        "cat/3.png cannot be read: not a regular file",
        "cat/4.png cannot be read: not a regular file",
        "cat/5.png cannot be read: No such file or directory",
        "cat/6.png is larger than 0 MiB",
        "cat/7.png cannot be read: Too many levels of symbolic links",
    ]
    before = shard.fingerprint()
    assert before == shard.fingerprint()
    (tmp_path / "cat/nowhere").write_bytes(b"")
    assert before != shard.fingerprint()
    assert compression.MAX_LINE_BYTES == 128 << 20


def test_trouble_that_may_pass_is_no_fault_of_a_row(tmp_path, monkeypatch):
    fill(tmp_path)
    (shard,) = find_shards(str(tmp_path)).shards

    def fail(store, path):
        raise OSError(errno.ESTALE, "Stale file handle")

    monkeypatch.setattr(Store, "open", fail)
    with pytest.raises(ShardError, match="Stale file handle"):
        rows_of(shard, "image.bytes")
    monkeypatch.setattr(Store, "fingerprint", fail)
    with pytest.raises(OSError, match="Stale file handle"):
        shard.fingerprint()


def test_names_that_are_not_utf8_are_no_end_of_the_rest(tmp_path):
    fill(tmp_path)
    os.rename(os.fsencode(tmp_path / "cat/2.png"), os.fsencode(tmp_path / "cat") + b"/\xff.png")
    (shard,) = find_shards(str(tmp_path)).shards
    assert [path.encode("utf-8", "surrogateescape") for (path,) in rows_of(shard, "path")][2] == b"cat/\xff.png"
    shard.fingerprint()


def test_links_to_classes_are_followed_and_guarded(tmp_path):
    fill(tmp_path, ["elsewhere/1.png", "pets/cat/1.png"])
    (tmp_path / "pets/dog").symlink_to(tmp_path / "elsewhere")
    corpus = find_shards(str(tmp_path / "pets"))
    assert rows_of(corpus.shards[0], "path") == [("cat/1.png",), ("dog/1.png",)]
    for inside in ("pets", "pets/cat/out", "elsewhere", "elsewhere/out", "."):
        with pytest.raises(CorpusError, match="must not lie in each other"):
            refuse_overlap(Store.at(str(tmp_path / inside)), str(tmp_path / "pets"), corpus)
    refuse_overlap(Store.at(str(tmp_path / "scores")), str(tmp_path / "pets"), corpus)


def test_chunks_are_of_bounded_size(tmp_path):
    fill(tmp_path, [f"cat/{i}.png" for i in range(30)])
    for path in (tmp_path / "cat").iterdir():
        path.write_bytes(bytes(200_000))
    (shard,) = find_shards(str(tmp_path)).shards
    chunks = list(read(shard, ["image.bytes"]))
    assert max(sum(map(len, chunk.columns["image.bytes"])) for chunk in chunks) < 3 << 20
    assert sum(chunk.length for chunk in chunks) == 30
