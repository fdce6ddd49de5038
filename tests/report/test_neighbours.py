"""Rows that are near by kept features, against all pairs."""

from __future__ import annotations

import io
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

from assay.corpus.features import FeatureSpec, FeatureWriter
from assay.corpus.layout import features_path
from assay.corpus.scores_folder import State, open_scores
from assay.report import Shown, find_neighbours
from assay.report.twins import twins_section
from tests.small_scores import make_scores

ROWS = {"a": 90, "b": 60, "c": 30}


def keep(folder, name, values, dtype="float32", **its):
    """Features of the shards' scored rows."""
    scores, start = open_scores(folder), 0
    for status in scores.of(State.DONE):
        shard, rows = status.shard, status.table.scored
        spec = FeatureSpec(name, values.shape[1], dtype, {})
        writer = FeatureWriter(spec, io.BytesIO())
        own = torch.from_numpy(values[start : start + rows])
        writer.add(np.arange(rows), [str(i) for i in range(rows)], own)
        facts = {"path": shard.path, "size": shard.fingerprint().size, **its}
        writer.save(scores.store, features_path(name, 0, shard), {"input": facts})
        start += rows
    return scores


@pytest.fixture
def folder(tmp_path):
    return make_scores(
        tmp_path, {name: {"x": np.arange(float(rows))} for name, rows in ROWS.items()}, without={"b": [3]}
    )


@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_the_nearest_of_each_row(folder, dtype, monkeypatch):
    rng = np.random.default_rng(0)
    values = rng.normal(size=(179, 6)).astype(np.float32)
    values[100] = 3 * values[5]
    values[170] = values[20] + 0.01
    values[7], values[8] = 0, np.nan
    scores = keep(folder, "trak", values, dtype)
    monkeypatch.setattr("assay.report.neighbours._ROWS", 32)
    (found,) = find_neighbours(scores)
    assert (found.method, found.rows, found.all_rows, found.drawn) == ("trak", 179, True, 179)
    wide = values.astype(np.float64)
    lengths = np.linalg.norm(wide, axis=1)
    lengths[lengths == 0] = np.nan
    cosines = np.nan_to_num((wide @ wide.T) / (lengths[:, None] * lengths), nan=-1)
    np.fill_diagonal(cosines, -1)
    nearest = cosines.max(axis=1)
    slack = 1e-6 if dtype == "float32" else 0.02
    for level, count in found.near.items():
        assert (nearest >= level + slack).sum() <= count <= (nearest >= level - slack).sum()
    assert [pair for _, *pair in found.closest][:2] == [[5, 100], [20, 170]]
    assert found.closest[0][0] == pytest.approx(1, abs=slack)


def test_a_drawn_sample_and_features_that_do_not_belong(folder, monkeypatch):
    rng = np.random.default_rng(1)
    values = np.repeat(rng.normal(size=(90, 8)).astype(np.float32), 2, axis=0)[:179]
    scores = keep(folder, "logra", values)
    monkeypatch.setattr("assay.report.neighbours.QUERIES", 40)
    (found,) = find_neighbours(scores)
    assert (found.drawn, found.near[0.99]) == (40, 40 - (178 in drawn(179, 40)))
    Path(folder, features_path("logra", 0, scores.shards[0].shard)).unlink()
    (found,) = find_neighbours(scores)
    assert (found.rows, found.all_rows) == (89, False)
    assert min(place for _, *pair in found.closest for place in pair) >= 90
    for wrong in ({"size": 1}, {"mtime_ns": 1}):
        keep(folder, "logra", values, **wrong)
        assert find_neighbours(scores) == []


def drawn(rows, count):
    return np.random.default_rng(0).choice(rows, count, replace=False)


def test_no_features_or_none_of_ours(folder):
    scores = open_scores(folder)
    assert find_neighbours(scores) == []
    path = Path(folder, "features/x/0/a.arrow")
    path.parent.mkdir(parents=True)
    path.write_bytes(b"ARROW1")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert find_neighbours(scores) == []


def test_rows_of_several_pairs(folder):
    values = np.random.default_rng(0).normal(size=(179, 4)).astype(np.float32)
    values[[0, 1, 2, 120]] = values[0]
    near = find_neighbours(keep(folder, "trak", values))
    assert [pair for cosine, *pair in near[0].closest if cosine > 0.9999] == [[0, 1], [0, 2], [0, 120]]
    shown = {place: Shown(f"r{place}", "a:1", {}, {"text": f"t{place % 3}"}) for place in range(179)}
    page = twins_section(None, near, shown, 179)
    assert page.count("<h4>cosine 1.0000</h4>") == 2, "those of 0 and 120 are the same"
    assert "179 rows were drawn, and each was compared with all 179 rows" in page
