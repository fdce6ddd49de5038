"""Whatever a remote file system's client raises, an OSError arrives."""

from __future__ import annotations

import io
import pickle

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from assay.corpus.remote import RemoteFileSystem, os_errors
from assay.corpus.storage import Store, may_pass


class ClientError(Exception):
    """As botocore's and aiohttp's are: no OSError."""


class Flaky(MemoryFileSystem):
    """It lists and opens, and fails at what comes then."""

    protocol = "flaky"
    cachable = False

    def info(self, path, **options):
        raise ClientError("the connection\nis gone")

    def open(self, path, mode="rb", **options):
        class File(io.BytesIO):
            def read(self, size=-1):
                raise ClientError("cut")

        return File(b"123")


@pytest.fixture
def flaky():
    return Store(RemoteFileSystem(Flaky()), "/folder")


def test_a_clients_error_is_one_of_the_system_that_names_the_file_and_may_pass(flaky):
    with pytest.raises(OSError, match="ClientError: the connection is gone") as caught:
        flaky.fingerprint("a")
    assert caught.value.filename == "/folder/a"
    assert may_pass(caught.value)


def test_a_file_that_nobody_can_ask_for_is_not_taken_for_one_that_is_not_there(flaky):
    for look in (lambda: flaky.exists("a"), lambda: flaky.fingerprints(["a"])):
        with pytest.raises(OSError, match="is gone"):
            look()


@pytest.mark.parametrize("read", [lambda f: f.read(), lambda f: f.read(1), lambda f: f.readline(), list])
def test_a_clients_error_amid_a_file_is_one_of_the_system(flaky, read):
    with flaky.open("a") as file, pytest.raises(OSError, match="ClientError: cut"):
        read(file)


def test_faults_of_the_program_stay_what_they_are():
    for error in (TypeError("a"), ValueError("b"), KeyError("c")):
        with pytest.raises(type(error)), os_errors("a"):
            raise error


def test_an_error_that_names_no_file_names_the_one_that_was_asked_for():
    with pytest.raises(OSError, match="busy: 'a'"), os_errors("a"):
        raise OSError(16, "busy")
    with pytest.raises(OSError, match="busy: 'its own'"), os_errors("a"):
        raise OSError(16, "busy", "its own")


def test_errors_that_may_pass_are_not_those_of_a_file():
    assert all(map(may_pass, (TimeoutError(), ConnectionResetError(), OSError(5, "I/O"), OSError(24, "too many"))))
    never = (FileNotFoundError("a"), PermissionError(13, "no"), OSError("not Parquet"), ValueError("x"))
    assert not any(map(may_pass, never))


def test_a_file_reads_as_the_file_systems_own():
    content = bytes(range(256)) * 1000 + b"\nlast"
    fsspec.filesystem("memory").pipe("/remote/a", content)
    store = pickle.loads(pickle.dumps(Store.at("memory://remote")))
    with store.open("a") as file:
        assert file.read(3) == content[:3]
        assert file.seek(-9, 2) == file.tell() == len(content) - 9
        assert file.read() == content[-9:]
        assert file.seek(1) == 1
        assert file.read(200_000) == content[1:200_001]
        file.seek(0)
        assert list(file) == list(io.BytesIO(content))


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (PermissionError("Access Denied"), r"\[Errno 13\] Access Denied: 'a'"),
        (FileNotFoundError("a"), r"\[Errno 2\] No such file or directory: 'a'"),
        (TimeoutError(), r"timed out: 'a'"),
        (OSError("no number"), "^no number$"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_a_client_says_without_a_number_is_not_lost(error, said):
    before = may_pass(error)
    with pytest.raises(type(error), match=said) as caught, os_errors("a"):
        raise error
    assert may_pass(caught.value) is before


def test_the_same_folder_is_the_same_in_another_process_too():
    """Shards are keys of what workers have made of them."""
    store = Store.at("memory://folder")
    again = pickle.loads(pickle.dumps(store))
    assert again == store == Store.at("memory://folder")
    assert len({again, store}) == 1
    assert store != Store.at("memory://other")


class Lengthless(MemoryFileSystem):
    """As a web server is that answers in chunks."""

    protocol = "lengthless"
    cachable = False

    def info(self, path, **options):
        return {"name": path, "size": None, "type": "file", **({"ETag": "1"} if "etag" in path else {})}


@pytest.mark.parametrize("name", ["plain", "etag"])
def test_a_file_whose_length_nobody_says_is_named(name):
    store = Store(RemoteFileSystem(Lengthless()), "/folder")
    with pytest.raises(OSError, match="does not say how long the file is") as caught:
        store.fingerprint(name)
    assert caught.value.filename == f"/folder/{name}"
    assert not may_pass(caught.value)
