"""SIGKILL at random moments: what is finished afterwards is what an undisturbed run writes."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from assay.corpus.storage import Store
from assay.corpus.validation import validate_scores
from tests.small_project import make_rows

SHARDS, ROWS = 70, 12


def start(recipe: str, *options: str):
    """`assay score` in a process of its own, forked from one that has imported everything already."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["assay.cli", "assay.engine.local"])
    process = context.Process(target=_score, args=(recipe, *options))
    process.start()
    return process


def _score(recipe: str, *options: str) -> None:
    import torch

    from assay.cli import main

    torch.set_num_threads(1)
    raise SystemExit(main(["score", recipe, "--quiet", *options]))


def finish(recipe: str) -> None:
    process = start(recipe)
    process.join(120)
    assert process.exitcode == 0


def written(folder: Path) -> dict[str, bytes]:
    """Every file but those that say where it lies, and what was left by a kill."""
    Store.at(str(folder)).sweep(older_than=0)
    own = ("manifest.json", "recipe.resolved.yaml")
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*.*") if p.name not in own}


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

    assert written(project.scores) == written(project.root / "undisturbed")  # the same bytes, and nothing besides
    ids = [id_ for path in project.tables() for id_ in pq.read_table(project.scores / path)["id"].to_pylist()]
    assert len(ids) == len(set(ids)) == SHARDS * ROWS + 80


@pytest.mark.slow
def test_two_parts_at_once_one_of_them_preempted(project):
    """As a scheduler's array has it: what both write is what one run writes, and every row of it is found again."""
    for i in range(20):
        project.write_shard(f"{i:02}.jsonl", make_rows(ROWS, 100 + i))
    finish(str(project.write_recipe(output="undisturbed")))
    recipe = str(project.write_recipe())
    first, second = start(recipe, "--shard", "1/2"), start(recipe, "--shard", "2/2")
    while not list(project.scores.rglob("[!.]*.parquet")):
        assert first.is_alive() or second.is_alive()
        time.sleep(0.001)
    os.kill(first.pid, signal.SIGKILL)
    first.join()
    again = start(recipe, "--shard", "1/2")
    for process in (second, again):
        process.join(120)
        assert process.exitcode == 0
    written(project.scores)  # sweeps
    found = validate_scores(str(project.scores), on_problem=lambda problem: pytest.fail(str(problem)))
    assert (found.shards, found.scored) == (22, 20 * ROWS + 80)
    assert written(project.scores) == written(project.root / "undisturbed")
