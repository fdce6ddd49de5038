"""Rows that are encoded together, without an object for each: the same bytes come of them as one by one."""

from __future__ import annotations

import math
from functools import partial
from unittest import mock

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from assay.corpus import format as limits
from assay.engine import rows, shard
from assay.engine.local import run
from assay.engine.rows import StackedSamples
from assay.recipe.recipe import load_recipe
from assay.recipe.tasks import Stacked
from assay.recipe.tasks.labelled import LabelledEncoder
from assay.recipe.tasks.labels import ClassLabels
from assay.recipe.tasks.numbers import NumberInputs
from tests.small_project import CLASSES, make_rows

WRONG = {
    "nothing": {},
    "a number": {3: {"pixels": [math.nan] * 6}},
    "a label": {29: {"label": CLASSES}},
    "an id": {30: {"id": "s0-2"}},
    "some of each": {0: {"id": None}, 17: {"label": None}, 63: {"pixels": None}, 64: {"pixels": [0.0] * 5}},
}


def files(project, output, *overrides):
    """The bytes of all that a run writes."""
    recipe = load_recipe(str(project.path), [f"output={project.root / output}", *overrides])
    run(recipe)
    found = sorted(path for path in (project.root / output).rglob("*") if path.suffix in (".parquet", ".jsonl"))
    return {str(path.relative_to(project.root / output)): path.read_bytes() for path in found}


@pytest.fixture
def corpus(project, monkeypatch):
    """Of one shard, whose chunks, windows and blocks of rows end apart from one another."""
    (project.root / "data/deep/b.jsonl").unlink()
    monkeypatch.setattr(limits, "CHUNK_ROWS", 7)
    monkeypatch.setattr(shard, "WINDOW_ROWS", 10)
    monkeypatch.setattr(shard, "BLOCK_WINDOWS", 3)
    return project


def write(project, wrong):
    project.write_shard("a.parquet", [row | wrong.get(i, {}) for i, row in enumerate(make_rows(100))])


@pytest.mark.parametrize(
    ("wrong", "limit"),
    [*((wrong, "batch.samples=4") for wrong in WRONG), ("nothing", "batch.tokens=3"), ("nothing", "batch.samples=64")],
)
def test_the_same_files_as_one_by_one(corpus, wrong, limit):
    write(corpus, WRONG[wrong])
    together = files(corpus, "together", limit)
    with mock.patch.object(LabelledEncoder, "stack", return_value=None):
        assert files(corpus, "apart", limit) == together
    assert len(together) == 1 + bool(WRONG[wrong])


@pytest.mark.parametrize("left_out", [range(7, 14), range(14, 28), range(30, 51), [0, 50, 99]], ids=str)
def test_rows_that_are_not_wanted_leave_the_others_their_numbers(corpus, left_out):
    write(corpus, {})
    wanted = partial(shard.score_windows, wanted=lambda row: row not in left_out)
    with mock.patch.object(shard, "score_windows", wanted):
        together = files(corpus, "together")
        with mock.patch.object(LabelledEncoder, "stack", return_value=None):
            assert files(corpus, "apart") == together
    table = pq.read_table(pa.BufferReader(together["a.parquet"]))
    assert table["row"].to_pylist() == [row for row in range(100) if row not in left_out]
    assert table["id"].to_pylist() == [f"s0-{row}" for row in range(100) if row not in left_out]


@pytest.mark.parametrize("nbytes", [1, 100, 500])
def test_windows_are_those_of_single_rows_also_where_bytes_end_them(corpus, monkeypatch, nbytes):
    monkeypatch.setattr(shard, "WINDOW_BYTES", nbytes)
    write(corpus, {})
    windows: dict[str, list] = {}
    for name, stack in (("together", LabelledEncoder.stack), ("apart", lambda *_: None)):
        seen = windows[name] = []
        scored = shard._scored

        def noted(window, *rest, seen=seen, scored=scored):
            seen.append(([sample.row for sample in window.rows], window.nbytes))
            return scored(window, *rest)

        with mock.patch.object(LabelledEncoder, "stack", stack), mock.patch.object(shard, "_scored", noted):
            files(corpus, name)
    assert windows["together"] == windows["apart"]
    assert len(windows["apart"]) >= 10


def test_rows_without_a_fault_are_no_objects(corpus, monkeypatch):
    write(corpus, {})
    whole = files(corpus, "whole")
    monkeypatch.setattr(rows, "Sample", None)
    assert files(corpus, "again") == whole


def test_a_batch_that_runs_out_of_memory_is_halved_and_a_row_of_its_own_is_named(corpus):
    write(corpus, {})
    collate = LabelledEncoder.collate_stacked
    whole = pq.read_table(pa.BufferReader(files(corpus, "whole")["a.parquet"]))

    def cramped(self, stacked):
        x = make_rows(100)[42]["pixels"]
        if len(stacked) > 3 or (stacked.data[0] == np.float32(x)).all(1).any():
            raise MemoryError
        return collate(self, stacked)

    with mock.patch.object(LabelledEncoder, "collate_stacked", cramped):
        made = files(corpus, "cramped")
    assert b'"row": 42' in made["quarantine/a.jsonl"]
    table = pq.read_table(pa.BufferReader(made["a.parquet"]))
    assert table["row"].to_pylist() == [row for row in range(100) if row != 42]
    assert table["id"].to_pylist() == [f"s0-{row}" for row in range(100) if row != 42]
    np.testing.assert_allclose(table["loss"], whole["loss"].take(table["row"]), rtol=1e-5)


def test_stacked_samples_are_a_sequence():
    data = (np.arange(12.0).reshape(6, 2), list("abcdef"))
    whole = StackedSamples(10, [f"id-{i}" for i in range(6)], Stacked(data, 16))
    parts = [whole.part(0, 2), whole.part(2, 5), whole.part(5, 6)]
    for one in (whole, StackedSamples.joined(parts)):
        assert len(one) == 6
        assert [(s.row, s.id, s.encoded.data[1], s.encoded.length, s.encoded.nbytes) for s in one] == [
            (10 + i, f"id-{i}", "abcdef"[i], 1, 16) for i in range(6)
        ]
        assert list(one.rows) == list(range(10, 16))
        assert one[-1].encoded.data[0].tolist() == [10.0, 11.0]
        assert [sample.row for sample in one[1:4:2]] == [11, 13]
        with pytest.raises(IndexError):
            one[6]


def test_what_is_collated_is_the_same():
    encoder = LabelledEncoder(NumberInputs("x", (2, 3)), ClassLabels("y", 4))
    values = [np.arange(6.0).reshape(2, 3) + i for i in range(5)]
    stacked = encoder.stack([values, [0, 1, 2, 3, 0]])
    x, y = encoder.collate_stacked(stacked.part(1, 4))
    own = [encoded.data for encoded in encoder.encode(list(zip(values, [0, 1, 2, 3, 0], strict=True)))]
    x_apart, y_apart = encoder.collate(own[1:4])
    assert x.shape == (3, 2, 3)
    assert torch.equal(x, x_apart)
    assert torch.equal(y, y_apart)
