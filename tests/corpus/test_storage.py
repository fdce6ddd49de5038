"""Files appear whole or not at all, and what killed runs leave is swept by age."""

from __future__ import annotations

import os
import socket
import threading
import time

import fsspec
import pytest

from assay.corpus.storage import Store, may_pass, temporary_name


@pytest.fixture(params=["local", "memory"])
def store(request, tmp_path) -> Store:
    if request.param == "local":
        return Store.at(str(tmp_path))
    fs = fsspec.filesystem("memory")
    if fs.exists("/storage"):
        fs.rm("/storage", recursive=True)
    return Store.at("memory://storage")


def test_write_read_list_remove(store):
    store.write_text("deep/er/a.txt", "one")
    store.write_text("deep/er/a.txt", "two")
    assert store.read_text("deep/er/a.txt") == "two"
    assert store.files() == ["deep/er/a.txt"]
    assert Store.at(store.url).files() == ["deep/er/a.txt"]
    store.remove("deep/er/a.txt")
    store.remove("deep/er/a.txt")
    assert store.files() == []


def test_a_failed_write_leaves_the_old_file_and_nothing_else(store):
    store.write_text("a.txt", "old")

    def fail() -> None:
        with store.write("a.txt") as file:
            file.write(b"half of the new")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert store.files() == ["a.txt"]
    assert store.read_text("a.txt") == "old"


def test_nothing_is_visible_before_the_end(store):
    with store.write("a.txt") as file:
        file.write(b"half")
        file.flush()
        assert not store.exists("a.txt")
    assert store.exists("a.txt")


def test_the_fingerprint_notices_a_change(store):
    store.write_text("a.txt", "one")
    before = store.fingerprint("a.txt")
    assert store.fingerprint("a.txt") == before
    store.write_text("a.txt", "two")  # as long as before
    assert store.fingerprint("a.txt") != before


def test_etags_come_before_times(monkeypatch):
    store = Store.at("memory://storage-etag")
    store.write_text("a", "x")
    monkeypatch.setattr(store.fs, "info", lambda path: {"size": 1, "ETag": '"abc"'})
    assert store.fingerprint("a").to_json() == {"size": 1, "etag": '"abc"'}


def test_sweeping_goes_by_age_and_spares_live_runs(tmp_path):
    store = Store.at(str(tmp_path))
    old, young = tmp_path / temporary_name(), tmp_path / temporary_name()
    others = [tmp_path / name for name in ("mine.tmp", ".mine.tmp", ".a.parquet.Xy3.tmp", f"{old.name}.tmp")]
    for path in (old, young, *others):
        path.write_bytes(b"")
    for path in (old, *others):
        os.utime(path, (0, 0))
    assert store.sweep() == [old.name]
    assert set(tmp_path.iterdir()) == {young, *others}


def test_sweeping_lists_each_folder_once_and_follows_no_link(tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "scores/deep").mkdir(parents=True)
    (tmp_path / "scores/link").symlink_to(tmp_path / "elsewhere")
    name = temporary_name()
    for path in (f"elsewhere/{name}", f"scores/deep/{name}", *(f"scores/deep/{i}.parquet" for i in range(50))):
        (tmp_path / path).write_bytes(b"")
        os.utime(tmp_path / path, (0, 0))
    asked = []
    stat = os.lstat
    monkeypatch.setattr(os, "lstat", lambda path: asked.append(path) or stat(path))
    assert Store.at(str(tmp_path / "scores")).sweep() == [f"deep/{name}"]
    assert not any(str(path).endswith(".parquet") for path in asked)
    assert (tmp_path / "elsewhere" / name).exists()


def test_only_a_regular_file_is_opened_and_only_a_small_one_is_read_as_text(tmp_path, monkeypatch):
    store = Store.at(str(tmp_path))
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "zero").symlink_to("/dev/zero")
    (tmp_path / "folder").mkdir()
    for name in ("pipe", "zero", "folder"):
        with pytest.raises(OSError, match="not a regular file"):
            store.open(name)
    monkeypatch.chdir(tmp_path)  # a socket's path is short
    with socket.socket(socket.AF_UNIX) as its:
        its.bind("socket")
        with pytest.raises(OSError, match="socket") as caught:
            store.open("socket")
    assert not may_pass(caught.value)
    store.write_text("a.txt", "x" * 11)
    monkeypatch.setattr("assay.corpus.storage.MAX_TEXT_BYTES", 10)
    with pytest.raises(ValueError, match=r"a\.txt: larger than"):
        store.read_text("a.txt")


def test_holds():
    inside, outside = Store.at("/data/scores/x"), Store.at("/data/scores-2")
    root = Store.at("/data/scores")
    assert root.holds(root)
    assert root.holds(inside)
    assert not root.holds(outside)
    assert not root.holds(Store.at("memory://data/scores/x"))


def test_a_tail_is_the_end_of_a_file_or_all_of_it(store):
    store.write_text("a", "0123456789")
    assert [store.read_tail("a", size) for size in (3, 10, 11)] == [b"789", b"0123456789", b"0123456789"]
    with pytest.raises(FileNotFoundError):
        store.read_tail("b", 3)


def test_many_files_are_asked_for_at_once_where_each_costs_a_request(store):
    """In order, no more than a little ahead, and an error where its turn comes."""
    at_once, most, begun = 0, 0, []
    lock = threading.Lock()

    def ask(i: int) -> int:
        nonlocal at_once, most
        with lock:
            begun.append(i)
            at_once += 1
            most = max(most, at_once)
        time.sleep(0.0005)
        with lock:
            at_once -= 1
        if i == 300:
            raise OSError("no answer")
        return i

    answers = store.map(ask, range(10_000))
    assert [next(answers) for _ in range(300)] == list(range(300))
    with pytest.raises(OSError, match="no answer"):
        next(answers)
    assert most > 1
    assert len(begun) < (2000 if store.is_local else 500)


@pytest.mark.parametrize("count", [3, 1000])
def test_an_exception_that_is_the_answer_is_not_raised(store, count):
    answers = list(store.map(lambda i: OSError(i) if i % 7 == 2 else i, range(count)))
    assert [i for i, answer in enumerate(answers) if isinstance(answer, OSError)] == list(range(2, count, 7))
    assert [answer for answer in answers if not isinstance(answer, OSError)] == [i for i in range(count) if i % 7 != 2]
