"""`assay ls` while a run goes: from the files' own times, which may go backwards, and from nothing else."""

from __future__ import annotations

import json
import os
import shutil
import time

import fsspec
import pytest

from assay.cli import main
from assay.corpus.claim import CLAIM, claim
from assay.corpus.pace import Pace, measure_pace
from assay.corpus.scores_folder import open_scores
from assay.corpus.storage import Store
from assay.engine import local
from assay.engine.local import run
from assay.recipe.recipe import load_recipe
from tests.small_project import make_project, make_rows

A, B, MISSING = "a.parquet", "deep/b.parquet", "c.parquet"


@pytest.fixture(scope="module")
def scored(tmp_path_factory):
    """Two shards of three have tables, one of them a row in quarantine."""
    project = make_project(tmp_path_factory.mktemp("scored"))
    rows = make_rows(30, 1)
    rows[2]["label"] = None
    project.write_shard("deep/b.jsonl", rows)
    run(load_recipe(str(project.path)))
    project.write_shard("c.jsonl", make_rows(10, 2))
    return project


def pace(project, tmp_path, claimed=True, **times) -> Pace:
    """With files of these ages in seconds; negative ones lie ahead."""
    folder = tmp_path / "scores"
    shutil.copytree(project.scores, folder, dirs_exist_ok=True)
    store, now = Store.at(str(folder)), time.time()

    def measured() -> Pace:
        for name, path in (("manifest", "manifest.json"), ("claim", CLAIM), ("a", A), ("b", B)):
            if (folder / path).exists():
                os.utime(folder / path, (now - times[name],) * 2)
        return measure_pace(open_scores(str(folder)))

    if not claimed:
        return measured()
    with claim(store, "a run", shared=True):
        return measured()


@pytest.mark.parametrize(
    ("manifest", "first", "second", "rate", "share"),
    [
        (100, 60, 20, 80 / 80, 1.0),
        (40, 60, 20, 30 / 20, None),  # a runner has joined since the first table: what came after is of all runners
        (10, 60, 20, 80 / 100, 1.0),  # one has just joined, so since the first of them began
        (120, 60, -20, 80 / 140, 1.0),  # whoever reads is behind
        (120, 200, 160, None, None),  # the clock went backwards: tables of this run are older than its beginning
        (120, 120, 120, None, None),
        (120, 200, 60, 30 / 60, None),  # of a run before, or of one before the clock went back: not of this one
    ],
)
def test_rate_and_time_left(scored, tmp_path, manifest, first, second, rate, share):
    found = pace(scored, tmp_path, manifest=manifest, claim=120, a=first, b=second)
    assert found.running is True
    assert found.rows_per_second == (None if rate is None else pytest.approx(rate, rel=1e-3))
    assert found.idle_seconds == (None if second < 0 else pytest.approx(min(first, second), abs=5))
    data = scored.root / "data"
    sizes = [(data / name).stat().st_size for name in ("a.parquet", "deep/b.jsonl", "c.jsonl")]
    if rate is None:
        assert found.seconds_left is None
    else:
        rows, size = (80, sizes[0] + sizes[1]) if share else (30, sizes[1])
        assert found.seconds_left == pytest.approx(sizes[2] / size * rows / rate, rel=1e-3)


def test_nobody_and_nothing_that_tells(scored, tmp_path):
    assert pace(scored, tmp_path, claimed=False, manifest=100, a=60, b=20) == Pace(False)
    (tmp_path / "scores" / A).unlink()
    (tmp_path / "scores" / B).unlink()
    with claim(Store.at(str(tmp_path / "scores")), "a run", shared=True):
        assert measure_pace(open_scores(str(tmp_path / "scores"))) == Pace(True)


def test_an_object_store_has_times_and_no_claim(scored):
    fs = fsspec.filesystem("memory")
    fs.put(str(scored.scores), "/paced/scores", recursive=True)
    for path in fs.find("/paced/scores"):
        if not path.endswith("manifest.json"):
            content = fs.cat(path)
            fs.rm(path)
            fs.pipe(path, content)
    found = measure_pace(open_scores("memory://paced/scores"))
    assert found.running is None
    assert found.rows_per_second > 0
    assert found.seconds_left > 0
    assert found.idle_seconds >= 0


def test_in_the_middle_of_a_run(project, monkeypatch, capsys):
    monkeypatch.chdir(project.root)
    project.write_shard("c.jsonl", make_rows(10, 2))
    score, said = local.score_unit, []

    def looked_at(workshop, shard, *arguments):
        for options in ([], ["--json"]):
            capsys.readouterr()
            assert main(["ls", "scores", *options]) == 0
            said.append(capsys.readouterr().out)
        time.sleep(0.02)
        return score(workshop, shard, *arguments)

    monkeypatch.setattr(local, "score_unit", looked_at)
    run(load_recipe(str(project.path)))
    assert "a run is writing into it; rows/s unknown, left unknown, since the last table unknown" in said[0]
    begun, last = json.loads(said[1]), json.loads(said[5])
    assert (begun["running"], begun["rows_per_second"], begun["seconds_left"]) == (True, None, None)
    assert [line["state"] for line in last["shards"]] == ["done", "done", "missing"]
    assert 0 < last["rows_per_second"] < 60 / 0.04
    assert last["seconds_left"] > 0
    assert (last["scored"], last["quarantined"]) == (60, 0)
    assert "a run is writing into it; rows/s " in said[4]
    assert "unknown" not in said[4]
    capsys.readouterr()
    assert main(["ls", "scores"]) == 0
    assert "writing into it" not in capsys.readouterr().out
