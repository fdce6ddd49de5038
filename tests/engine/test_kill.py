"""SIGKILL at random moments: what is finished afterwards is what an undisturbed run writes."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import time

import pyarrow.parquet as pq
import pytest

from assay.corpus.storage import Store
from tests.small_project import make_rows

SHARDS, ROWS = 70, 12


def start(recipe: str):
    """`assay score` in a process of its own, forked from one that has imported everything already."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["assay.cli", "assay.engine.local"])
    process = context.Process(target=_score, args=(recipe,))
    process.start()
    return process


def _score(recipe: str) -> None:
    import torch

    from assay.cli import main

    torch.set_num_threads(1)
    raise SystemExit(main(["score", recipe, "--quiet"]))


def finish(recipe: str) -> None:
    process = start(recipe)
    process.join(120)
    assert process.exitcode == 0


@pytest.mark.parametrize("kills", [5, pytest.param(20, marks=pytest.mark.slow)])
def test_kills_change_nothing(project, kills):
    for i in range(SHARDS):
        suffix = "jsonl" if i % 2 else "parquet"
        project.write_shard(f"part{i % 3}/{i:03}.{suffix}", make_rows(ROWS, 100 + i))
    finish(str(project.write_recipe(output="undisturbed")))
    project.write_recipe()
    rng = random.Random(0)
    moments = []
    for _ in range(kills):
        before = len(project.tables())
        process = start(str(project.path))
        wanted = before + rng.randint(0, 3)
        deadline = time.monotonic() + 60
        while len(list(project.scores.rglob("[!.]*.parquet"))) < wanted and time.monotonic() < deadline:
            time.sleep(0.001)
        time.sleep(rng.random() * 0.02)
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        moments.append(len(project.tables()))
        assert all(pq.read_metadata(project.scores / path) for path in project.tables())  # never half a table
    assert len(set(moments)) > kills // 2, f"the kills fell on too few moments: {moments}"
    assert moments[-1] < SHARDS + 2, "the run was over before the kills were"
    finish(str(project.path))

    Store.at(str(project.scores)).sweep(older_than=0)
    undisturbed = {
        str(p.relative_to(project.root / "undisturbed")): p.read_bytes()
        for p in (project.root / "undisturbed").rglob("*.*")
        if p.name not in ("manifest.json", "recipe.resolved.yaml")
    }
    found = {
        str(p.relative_to(project.scores)): p.read_bytes()
        for p in project.scores.rglob("*.*")
        if p.name not in ("manifest.json", "recipe.resolved.yaml")
    }
    assert found == undisturbed  # the same tables, byte for byte, and nothing besides
    ids = [id_ for path in project.tables() for id_ in pq.read_table(project.scores / path)["id"].to_pylist()]
    assert len(ids) == len(set(ids)) == SHARDS * ROWS + 80
