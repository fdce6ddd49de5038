"""One writer at a time, or several of the same work."""

from __future__ import annotations

import multiprocessing
import os
import signal

import pytest

from assay.corpus import claim as module
from assay.corpus.claim import CLAIM, claim
from assay.corpus.errors import CorpusError
from assay.corpus.storage import Store


@pytest.fixture(autouse=True)
def _impatient(monkeypatch):
    monkeypatch.setattr(module, "_PATIENCE_SECONDS", 0.2)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (("a", False), ("a", False)),
        (("a", True), ("b", True)),
        (("a", True), ("a", False)),
        (("a", False), ("a", True)),
    ],
)
def test_others_are_refused_until_it_ends(tmp_path, first, second):
    store = Store.at(str(tmp_path / "out"))
    refused = pytest.raises(CorpusError, match="out: another run or selection is writing")
    with claim(store, first[0], shared=first[1]), refused, claim(store, second[0], shared=second[1]):
        pass
    with claim(store, second[0], shared=second[1]):
        pass
    assert not (tmp_path / "out").exists()


def test_runners_of_one_work_share_it(tmp_path):
    store = Store.at(str(tmp_path))
    with claim(store, "a", shared=True):
        with claim(store, "a", shared=True):
            pass
        assert os.listdir(tmp_path) == [CLAIM]  # the first still holds it
        with pytest.raises(CorpusError), claim(store, "b", shared=True):
            pass
    assert os.listdir(tmp_path) == []


def _hold(folder, ready):
    with claim(Store.at(folder), "a"):
        ready.set()
        signal.pause()


def test_a_killed_process_holds_nothing(tmp_path):
    context = multiprocessing.get_context("spawn")
    ready = context.Event()
    process = context.Process(target=_hold, args=(str(tmp_path), ready))
    process.start()
    assert ready.wait(60)
    with pytest.raises(CorpusError), claim(Store.at(str(tmp_path)), "a"):
        pass
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    with claim(Store.at(str(tmp_path)), "b"):
        pass
