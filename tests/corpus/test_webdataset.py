"""WebDataset archives: members of one name are a row; nothing is extracted, and no header is believed."""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import lzma
import tarfile
from pathlib import Path

import fsspec
import numpy as np
import pytest
import zstandard

from assay.corpus import tar
from assay.corpus.compression import unpacked
from assay.corpus.copying import copy_rows
from assay.corpus.errors import ShardError
from assay.corpus.format import CHUNK_ROWS
from assay.corpus.formats import webdataset
from assay.corpus.readers import columns_of, read
from assay.corpus.shards import Shard, find_shards
from assay.corpus.storage import Store

ROWS = 40


def member(name: str, data: bytes = b"", kind: bytes = tarfile.REGTYPE, **facts) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.type, info.size = kind, len(data)
    for key, value in facts.items():
        setattr(info, key, value)
    return info, data


def archive(members: list[tuple[tarfile.TarInfo, bytes]], form: int = tarfile.PAX_FORMAT) -> bytes:
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w", format=form) as out:
        for info, data in members:
            out.addfile(info, io.BytesIO(data))
    return sink.getvalue()


def sample(i: int) -> list[tuple[tarfile.TarInfo, bytes]]:
    caption = json.dumps({"caption": f"picture {i}", "meta": {"n": i}}).encode()
    # Sizes around those of blocks, and a name that needs an extended header.
    name = f"set.a/{i:04}" + "x" * (150 if i % 7 == 0 else 0)
    return [
        member(f"{name}.JPG", bytes([i]) * (510 + i % 5)),
        member(f"{name}.seg.png", b"png"),
        member(f"{name}.json", caption),
        member(f"{name}.cls", b"%d\n" % (i % 3)),
        member(f"{name}.txt", f"täxt {i}".encode()),
    ]


def whole(form: int = tarfile.PAX_FORMAT) -> bytes:
    folder = member("set.a", kind=tarfile.DIRTYPE)
    return archive([folder, member("README", b"no row"), *(m for i in range(ROWS) for m in sample(i))], form)


def shard_of(folder, content: bytes, name: str = "a.tar") -> Shard:
    (folder / name).write_bytes(content)
    (shard,) = find_shards(str(folder / name)).shards
    return shard


def rows_of(shard: Shard, *columns: str) -> list:
    rows = []
    for chunk in read(shard, columns):
        assert chunk.first == len(rows)
        rows += [chunk.faults.get(i) or tuple(chunk.columns[name][i] for name in columns) for i in range(chunk.length)]
    return rows


PACKED = {"a.tar": bytes, "a.tar.gz": gzip.compress, "a.tar.zst": zstandard.compress}


@pytest.mark.parametrize("form", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
@pytest.mark.parametrize("name", PACKED)
def test_members_of_one_name_are_a_row(tmp_path, name, form):
    shard = shard_of(tmp_path, PACKED[name](whole(form)), name)
    got = rows_of(shard, "jpg", "seg.png", "json.caption", "json.meta.n", "cls", "txt", "__key__")
    assert len(got) == ROWS
    for i, (jpg, png, caption, n, label, text, key) in enumerate(got):
        assert (jpg, png) == (bytes([i]) * (510 + i % 5), b"png")
        assert (caption, n, label, text) == (f"picture {i}", i, i % 3, f"täxt {i}")
        assert key.rstrip("x") == f"set.a/{i:04}"
    assert rows_of(shard, "json")[3] == ({"caption": "picture 3", "meta": {"n": 3}},)
    assert max(chunk.progress for chunk in read(shard, ["cls"])) == 1.0
    assert shard.stem == "a"


def test_facts(tmp_path):
    assert {name: fact.type for name, fact in columns_of(shard_of(tmp_path, whole())).items()} == {
        "__key__": "string",
        "jpg": "image",
        "seg.png": "image",
        "json": "struct<caption: string, meta: struct<n: int64>>",
        "json.caption": "string",
        "json.meta": "struct<n: int64>",
        "json.meta.n": "int64",
        "cls": "int64",
        "txt": "string",
    }


def test_another_file_system():
    fsspec.filesystem("memory").pipe_file("/wds/a.tar", whole())
    (shard,) = find_shards("memory://wds").shards
    assert len(rows_of(shard, "jpg")) == ROWS


@pytest.mark.parametrize("name", PACKED)
def test_chosen_rows_are_copied_byte_for_byte(tmp_path, name):
    content = archive([m for i in range(ROWS) for m in sample(i)])
    shard = shard_of(tmp_path, PACKED[name](content), name)
    keep = np.random.default_rng(0).random(ROWS) < 0.5
    copy_rows(shard, keep, Store.at(str(tmp_path / "out")))
    (copied,) = find_shards(str(tmp_path / "out" / name)).shards
    columns = ("jpg", "json", "cls", "__key__")
    assert rows_of(copied, *columns) == [row for row, kept in zip(rows_of(shard, *columns), keep, strict=True) if kept]
    chosen = archive([m for i in np.flatnonzero(keep).tolist() for m in sample(i)])
    with (tmp_path / "out" / name).open("rb") as file:
        assert unpacked(file, copied.compression).read() == chosen
    with pytest.raises(ShardError, match="40 rows, but 39"):
        copy_rows(shard, keep[:-1], Store.at(str(tmp_path / "other")))
    assert not (tmp_path / "other" / name).exists()


def test_a_name_that_comes_again_later_is_another_row(tmp_path):
    shard = shard_of(tmp_path, archive([member(f"{key}.cls", b"1") for key in "aba"]))
    assert rows_of(shard, "__key__", "cls") == [("a", 1), ("b", 1), ("a", 1)]


BAD = {
    "link": ([member("a.jpg", kind=tarfile.SYMTYPE, linkname="/etc/passwd")], "a.jpg is a link"),
    "hard link": ([member("a.jpg", kind=tarfile.LNKTYPE, linkname="good.jpg")], "a.jpg is a link"),
    "device": ([member("a.jpg", kind=tarfile.CHRTYPE)], "a.jpg is a device"),
    "pipe": ([member("a.jpg", kind=tarfile.FIFOTYPE)], "a.jpg is a device"),
    "unknown": ([member("a.jpg", b"data", kind=b"M")], "a.jpg is of an unknown kind"),
    "absolute": ([member("/a.jpg", b"x")], "/a.jpg leads out"),
    "parent": ([member("b/../../a.jpg", b"x")], "a.jpg leads out"),
    "twice": ([member("a.jpg", b"x"), member("a.JPG", b"y")], "two members 'jpg'"),
    "other column": ([member("a.png", b"x")], "row has no 'jpg'"),
    "no number": ([member("a.jpg", b"x"), member("a.cls", b"one")], "cls is not a whole number"),
    "a number of Python's": ([member("a.jpg", b"x"), member("a.cls", b"1_0")], "cls is not a whole number"),
    "other digits": ([member("a.jpg", b"x"), member("a.cls", "٣".encode())], "cls is not a whole number"),
    "no text": ([member("a.jpg", b"x"), member("a.cls", b"\xff")], "cls is not valid UTF-8"),
    "beside": ([member("a.jpg", b"x"), member("a.txt", kind=tarfile.SYMTYPE, linkname="b")], "a.txt is a link"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_no_plain_member_is_a_fault_of_its_row(tmp_path, name):
    bad, reason = BAD[name]
    good = [member("good.jpg", b"x"), member("good.cls", b"1")]
    last = [member("last.jpg", b"y"), member("last.cls", b"2")]
    first, fault, end = rows_of(shard_of(tmp_path, archive([*good, *bad, *last])), "jpg", "cls")
    assert (first, end) == ((b"x", 1), (b"y", 2))
    assert reason in fault


@pytest.mark.parametrize("text", [b"{", b"[" * 100_000, b"\xff", b"9" * 5000 + b"x"])
def test_json_that_is_none_is_a_fault(tmp_path, text):
    (fault,) = rows_of(shard_of(tmp_path, archive([member("a.json", text)])), "json")
    assert fault.startswith(("json is not JSON (", "json is not valid UTF-8"))


def test_a_row_may_lack_what_is_optional(tmp_path):
    """As a JSON line may: the key of a member's JSON, or the member."""
    members = [member("a.txt", b"x"), member("a.json", b'{"tools": "t"}'), member("b.txt", b"y")]
    members += [member("b.json", b'{"other": 1}'), member("c.txt", b"z")]
    shard = shard_of(tmp_path, archive(members))
    (chunk,) = read(shard, ["txt", "json.tools"], frozenset(["json.tools"]))
    assert (chunk.columns["txt"], chunk.columns["json.tools"]) == (["x", "y", "z"], ["t", None, None])
    assert not chunk.faults
    (chunk,) = read(shard, ["txt", "json.tools"])
    assert list(chunk.faults) == [1, 2]


def test_members_that_belong_to_no_row(tmp_path):
    names = ["README", ".hidden", "dir/.DS_Store", "v1.2/LICENSE", "._7.jpg", "trailing."]
    link = member("link", kind=tarfile.SYMTYPE, linkname="/etc/passwd")
    shard = shard_of(tmp_path, archive([link, *(member(name, b"x") for name in names), member("a.cls", b"1")]))
    assert rows_of(shard, "__key__", "cls") == [("a", 1)]


@pytest.mark.parametrize("cut", [1, 1023, 10_000, 10_241, 11_000, 20_000])
@pytest.mark.parametrize("name", PACKED)
def test_a_truncated_archive_is_an_error(tmp_path, name, cut):
    # The archive's last 1,024 bytes and the padding before them are zeros: what is cut off there is no loss.
    content = whole().rstrip(b"\0")
    content += bytes(-len(content) % 512 + 512)
    shard = shard_of(tmp_path, PACKED[name](content[:-cut]), name)
    with pytest.raises(ShardError, match="truncated"):
        rows_of(shard, "cls")


@pytest.mark.parametrize("content", [b"", b"not an archive" * 100, bytes(100), gzip.compress(b"x", mtime=0)])
def test_a_file_of_another_kind_is_an_error(tmp_path, content):
    with pytest.raises(ShardError):
        rows_of(shard_of(tmp_path, content), "cls")


def test_an_archive_without_members_has_no_rows(tmp_path):
    assert rows_of(shard_of(tmp_path, archive([])), "cls") == []


def test_what_follows_the_end_is_not_lost_without_a_word(tmp_path):
    with pytest.raises(ShardError, match="goes on after its end mark"):
        rows_of(shard_of(tmp_path, whole() + whole()), "cls")


def forged(name: str, size: bytes, kind: bytes = b"0") -> bytes:
    """A header that says of the size what it likes."""
    block = bytearray(tarfile.TarInfo(name).tobuf(tarfile.USTAR_FORMAT))
    block[124:136], block[156:157], block[148:156] = size.ljust(12, b"\0"), kind, b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


LIES = {
    "larger than the file": forged("a.cls", b"77777777777"),
    "of 2^60 bytes": forged("a.cls", b"\x80" + (1 << 60).to_bytes(11, "big")),
    "negative": forged("a.cls", b"\xff" * 12),
    "no number": forged("a.cls", b"12x"),
    "name of 4 GB": forged("a.cls", b"40000000000", b"L"),
    "note of 4 GB": forged("a.cls", b"40000000000", b"x"),
    "note that is none": forged("a.cls", b"1000", b"x") + b"7" * 512,
    "note that goes on": forged("a.cls", b"1000", b"x") + b"999 path=a" + bytes(502),
    "note of length 0": forged("a.cls", b"1000", b"x") + b"0 path=a\n" + bytes(503),
    "sparse": forged("a.cls", b"0", b"S"),
    "sparse note": forged("a.cls", b"31", b"x") + b"25 GNU.sparse.major=1.00\n" + bytes(487),
    "size for all": forged("a.cls", b"20", b"g") + b"16 size=1000000\n" + bytes(496),
    "notes without end": (forged("a.cls", b"1000", b"x") + b"512 comment=" + b"x" * 499 + b"\n") * 500,
    "names without end": (forged("a.cls", b"1000", b"L") + b"x" * 512) * 500,
}


def peak() -> int:
    """KiB."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM:"))


@pytest.mark.parametrize("name", LIES)
def test_headers_that_lie_are_errors_and_cost_no_memory(tmp_path, name):
    Path("/proc/self/clear_refs").write_text("5")  # forgets the peak
    before = peak()
    shard = shard_of(tmp_path, archive([member("good.cls", b"1")]).rstrip(b"\0").ljust(1024, b"\0") + LIES[name])
    with pytest.raises(ShardError):
        rows_of(shard, "cls")
    assert peak() - before < 64 << 10


def test_a_changed_byte_in_a_header_is_found(tmp_path):
    content = bytearray(whole())
    content[100] ^= 1
    with pytest.raises(ShardError, match="bad checksum"):
        rows_of(shard_of(tmp_path, bytes(content)), "cls")


def test_a_row_has_limits(tmp_path, monkeypatch):
    monkeypatch.setattr(webdataset, "MAX_LINE_BYTES", 3000)
    monkeypatch.setattr(webdataset, "MOST_MEMBERS", 5)
    big = [member("a.jpg", bytes(3000)), member("a.cls", b"1")]
    many = [member(f"b.{i}", b"x") for i in range(6)] + [member("b.cls", b"1")]
    shard = shard_of(tmp_path, archive([*big, *many, member("c.cls", b"2"), member("c.jpg", b"x")]))
    large, crowded, fine = rows_of(shard, "jpg", "cls")
    assert "row is larger than" in large
    assert "row has more than 5 members" in crowded
    assert fine == (b"x", 2)
    long = [member(f"d.{i}{'n' * 2000}", b"x") for i in range(2)] + [member("d.cls", b"1")]
    (fault,) = rows_of(shard_of(tmp_path, archive(long), "b.tar"), "cls")
    assert "row is larger than" in fault
    # What is not wanted may be of any size.
    assert rows_of(shard, "cls")[0] == (1,)


def test_archives_that_unfold_without_measure_end(tmp_path, monkeypatch):
    monkeypatch.setattr("assay.corpus.readers.MOST_EMPTY_ROWS", 2000)
    empty = b"".join(tarfile.TarInfo(f"{name}.jpg").tobuf(tarfile.USTAR_FORMAT) for name in "ab") * 2500
    with pytest.raises(ShardError, match="rows after one another without a value"):
        rows_of(shard_of(tmp_path, lzma.compress(empty + bytes(1024)), "a.tar.xz"), "cls")


def test_chunks_are_of_bounded_size(tmp_path):
    images = [member(f"{i:05}.jpg", bytes(100_000)) for i in range(60)]
    labels = [member(f"{i:05}.cls", b"1") for i in range(2500)]
    chunks = list(read(shard_of(tmp_path, archive(images)), ["jpg"]))
    assert max(sum(map(len, chunk.columns["jpg"])) for chunk in chunks) < 3 << 20
    assert sum(chunk.length for chunk in chunks) == 60
    names = [member(f"{i}.{j}{'n' * 50_000}", b"x") for i in range(4) for j in range(30)]
    chunks = list(read(shard_of(tmp_path, archive(names), "b.tar"), ["__key__"]))
    assert max(chunk.length for chunk in chunks) <= 2
    assert max(chunk.length for chunk in read(shard_of(tmp_path, archive(labels)), ["cls"])) <= CHUNK_ROWS


def test_what_is_not_wanted_is_not_read(tmp_path, monkeypatch):
    wanted: list[int] = []
    data = tar.Archive.data
    monkeypatch.setattr(tar.Archive, "data", lambda self: wanted.append(self._size) or data(self))
    rows_of(shard_of(tmp_path, whole()), "cls")
    assert len(wanted) == ROWS
    assert max(wanted) == 2


def test_flipped_bytes_never_raise_anything_else(tmp_path):
    rng = np.random.default_rng(0)
    content = archive([m for i in range(3) for m in sample(7 * i)])
    for _ in range(100):
        damaged = bytearray(content)
        damaged[rng.integers(0, len(content))] = rng.integers(0, 256)
        shard = shard_of(tmp_path, bytes(damaged))
        with contextlib.suppress(ShardError):
            rows_of(shard, "jpg", "json.caption", "cls", "txt")
        with contextlib.suppress(ShardError):
            columns_of(shard)
