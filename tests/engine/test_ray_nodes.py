"""Nodes of a Ray cluster that are lost cost their units' time, and nothing else."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time

import psutil
import pytest

from assay.corpus.storage import Store
from assay.engine import ray_actors
from assay.engine.crew import DIED_TWICE
from assay.engine.local import RunSummary, run
from assay.recipe.recipe import load_recipe
from tests.engine import odd_actors
from tests.engine.test_crew import written
from tests.small_project import make_rows

pytest.importorskip("ray")
pytestmark = pytest.mark.slow


@pytest.mark.parametrize("losses", [4])
def test_a_node_that_is_lost_loses_nothing(project, monkeypatch, losses) -> None:
    """The raylets are killed, one after another, and as many nodes join."""
    from ray.cluster_utils import Cluster

    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    monkeypatch.setattr(ray_actors, "Actor", odd_actors.Slow)
    for i in range(40):
        project.write_shard(f"{i:03}.jsonl", make_rows(20, 100 + i))
    run(load_recipe(str(project.path), ["output=alone"]))
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    nodes = [cluster.add_node(num_cpus=1) for _ in range(2)]
    over = threading.Event()
    summaries: list[RunSummary] = []

    def score() -> None:
        """Until all nodes have been lost that are to be, with half of the tables gone each time."""
        while not over.is_set() or not summaries or not summaries[-1].clean:
            summaries.append(odd_actors.until_it_starts(lambda: run(recipe, engine="ray")))
            for path in sorted(project.tables())[:20] if not over.is_set() else ():
                (project.scores / path).unlink()

    recipe = load_recipe(str(project.path), [f"run.ray.address={cluster.address}", "run.ray.workers=2"])
    scorer = threading.Thread(target=score, daemon=True)
    try:
        scorer.start()
        for _ in range(losses):
            time.sleep(8)
            assert scorer.is_alive()
            cluster.remove_node(nodes.pop(0), allow_graceful=False)
            nodes.append(cluster.add_node(num_cpus=1))
        over.set()
        scorer.join(400)
        assert not scorer.is_alive()
    finally:
        over.set()
        cluster.shutdown()
    assert all(reason.startswith(DIED_TWICE) for each in summaries for reason in each.unreadable.values())
    Store.at(str(project.scores)).sweep(older_than=0)
    assert written(project.scores) == written(project.root / "alone")


def test_a_run_whose_own_node_is_lost_ends_and_goes_on(project) -> None:
    """The raylet of a cluster that the run has started itself is killed: without it nobody would ever be heard."""
    for i in range(30):
        project.write_shard(f"{i:03}.jsonl", make_rows(4000, 100 + i))
    run(load_recipe(str(project.path), ["output=alone"]))
    command = [sys.executable, "-m", "assay", "score", str(project.path), "--engine", "ray", "--quiet"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        while process.poll() is None and not project.tables():
            time.sleep(0.02)
        below = psutil.Process(process.pid).children(recursive=True)
        lost = [child for child in below if child.name() == "raylet" or child.cmdline()[0].startswith("ray::")]
        assert len(lost) >= 2
        for process_of_node in lost:
            process_of_node.kill()
        _, said = process.communicate(timeout=200)
    finally:
        process.kill()
    assert process.returncode == 2
    assert "assay: run.ray: the node that this process runs on has left the cluster" in said
    assert 0 < len(project.tables()) < 32
    assert run(load_recipe(str(project.path)), engine="ray").clean
    assert written(project.scores) == written(project.root / "alone")
