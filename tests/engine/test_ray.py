"""Actors of a Ray cluster: the bytes of one worker, whatever dies."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import threading

import pytest

from assay.corpus.storage import Store
from assay.engine import ray_actors, shard, units
from assay.engine.crew import DIED_TWICE
from assay.engine.local import run
from assay.engine.ray_actors import RayActors
from assay.recipe.errors import EngineError
from assay.recipe.recipe import RaySpec, load_recipe
from tests.engine import odd_actors, odd_workers
from tests.engine.test_crew import BLOCK, Counts, alive, written
from tests.small_project import make_rows

ray = pytest.importorskip("ray")


@pytest.fixture(scope="module", autouse=True)
def cluster():
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    yield
    ray.shutdown()


def score(project, *overrides, engine="ray", **options):
    return run(load_recipe(str(project.path), ["run.ray.workers=2", *overrides]), engine=engine, **options)


def odd(monkeypatch, actor) -> None:
    monkeypatch.setattr(ray_actors, "Actor", actor)
    monkeypatch.setattr(shard, "WINDOW_ROWS", odd_workers.SMALL_WINDOW)


def test_an_actor_writes_the_bytes_of_a_process(project):
    summary = score(project, "run.ray.workers=1")
    assert (summary.workers, summary.scored, summary.clean) == (1, 2, True)
    score(project, "output=alone", engine="local")
    assert written(project.scores) == written(project.root / "alone")


@pytest.mark.slow
def test_two_actors_write_the_bytes_of_one_whatever_dies_once(project, monkeypatch, caplog):
    """A large shard in parts, an unreadable one, one that ends an actor once, and one that ends every actor."""
    odd(monkeypatch, odd_actors.Mortal)
    project.write_shard("large.parquet", make_rows(3 * BLOCK + 10, 7))
    project.write_shard("once.jsonl", make_rows(9, 8))
    (project.root / "data/broken.parquet").write_bytes(b"PAR1 no more")
    score(project, "output=alone", engine="local")
    project.write_shard("deadly.jsonl", make_rows(20, 3))
    monkeypatch.setattr(units, "SPLIT_BYTES", 10_000)
    progress = Counts()
    summary = score(project, progress=progress)
    assert "once.jsonl: a worker died on it" in caplog.text
    assert summary.workers == 2
    assert summary.unreadable.keys() == {"broken.parquet", "deadly.jsonl"}
    assert summary.unreadable["deadly.jsonl"].startswith(DIED_TWICE)
    assert (summary.scored, progress.rows) == (4, 80 + 3 * BLOCK + 10 + 9)
    assert progress.finished == progress.shards == 6
    alone, found = written(project.root / "alone"), written(project.scores)
    tables = [path for path in alone if path.endswith(".parquet") and "quarantine" not in path]
    assert len(tables) == 4
    assert {path: found[path] for path in tables} == {path: alone[path] for path in tables}
    assert [path for path in found if path.endswith(".tmp")] == []
    odd(monkeypatch, odd_actors.SmallWindows)
    again = score(project)
    assert (again.done_before, again.scored) == (4, 1)  # that of which it is known that it cannot be read stays so


@pytest.mark.slow
def test_two_actors_fit_the_bits_of_one(project):
    project.write_shard("more.parquet", make_rows(600, 4))  # three parts
    methods = "methods=[{method: ekfac, model: a, self_influence: true}, {method: leverage, model: b}]"
    summary = score(project, methods)
    assert (summary.workers, summary.clean) == (2, True)
    score(project, methods, "output=alone", "run.devices=cpu", engine="local")
    assert written(project.scores) == written(project.root / "alone")


@pytest.mark.slow
def test_a_table_that_only_a_worker_sees_is_an_error(project, monkeypatch):
    odd(monkeypatch, odd_actors.Elsewhere)
    with pytest.raises(EngineError, match=r": a worker wrote its table to .* and here there is none"):
        score(project)


@pytest.mark.slow
def test_an_actor_whose_call_failed_makes_room_for_another(project, monkeypatch, caplog):
    monkeypatch.setattr(ray_actors, "Actor", odd_actors.Failing)
    summary = score(project, "run.ray.workers=1", "run.ray.cpus=2")
    assert (summary.scored, summary.clean) == (2, True)
    assert "a worker died on it (KeyError: 'no such thing'); another one tries again" in caplog.text


def test_a_cluster_that_a_run_starts_does_not_outlive_it(monkeypatch):
    ended = []
    monkeypatch.setattr(ray_actors, "_connect", lambda *_: True)
    monkeypatch.setattr(ray, "shutdown", lambda: ended.append(True))
    staff = RayActors(RaySpec(cpus=64))
    staff.end()
    staff.end()
    assert ended == [True]


def test_an_address_beside_the_connection_that_is_there_is_refused():
    with pytest.raises(EngineError, match=r"10\.9\.9\.9:1, and this process is connected to .* already"):
        RayActors(RaySpec(address="10.9.9.9:1"))


@pytest.mark.slow
def test_what_does_not_fit_together_is_said_as_by_one(project, monkeypatch):
    with pytest.raises(EngineError, match=r"^task\.classes is 4, but models\.a has 3 outputs$"):
        score(project, "task.classes=4")


def test_no_room_and_no_such_engine(project):
    with pytest.raises(EngineError, match="no room for a worker of 64 CPUs and 0 GPUs"):
        RayActors(RaySpec(cpus=64)).places()
    assert len(RayActors(RaySpec(cpus=0.5)).places()) == 4
    with pytest.raises(EngineError, match="--engine spark: expected local or ray"):
        score(project, engine="spark")


def test_a_worker_for_whom_there_is_no_room_is_waited_for_aloud(monkeypatch, caplog):
    monkeypatch.setattr(ray_actors, "_QUIET_SECONDS", 0.2)
    staff = RayActors(RaySpec(cpus=3, workers=1))
    hired = staff.hire(staff.places()[0])
    hired.call = hired.actor.work.remote(None)
    assert staff.wait([hired], 600.0) == []
    staff.end()
    assert "no worker has started yet, each wants 3 CPUs and 0 GPUs; free in the cluster: {" in caplog.text


def test_older_versions_are_refused(monkeypatch):
    monkeypatch.setattr(ray, "__version__", "2.54.1")
    with pytest.raises(EngineError, match=r"ray 2\.54\.1 is installed; expected 2\.57 or newer"):
        RayActors(RaySpec())


@pytest.mark.slow
@pytest.mark.parametrize("kills", [20])
def test_kills_at_random_moments_lose_nothing_and_double_nothing(project, monkeypatch, kills):
    odd(monkeypatch, odd_actors.Known)
    for i in range(3 * kills):
        project.write_shard(f"part{i % 3}/{i:03}.jsonl", make_rows(30, 100 + i))
    score(project, "output=alone", engine="local")
    rng, stopped, killed = random.Random(0), threading.Event(), []

    def kill() -> None:
        while len(killed) < kills and not stopped.wait(rng.random()):
            pids = list(alive(int(path.name) for path in (project.root / "pids").glob("*")))
            if pids:
                killed.append(rng.choice(pids))
                with contextlib.suppress(ProcessLookupError):
                    os.kill(killed[-1], signal.SIGKILL)

    threading.Thread(target=kill, daemon=True).start()
    runs = 0
    while len(killed) < kills or runs == 0:
        runs += 1
        summary = odd_actors.until_it_starts(lambda: score(project))
        assert all(reason.startswith(DIED_TWICE) for reason in summary.unreadable.values())
        if len(killed) < kills:
            for path in random.Random(runs).sample(sorted(project.tables()), 2 * len(project.tables()) // 3):
                (project.scores / path).unlink()
    stopped.set()
    while not odd_actors.until_it_starts(lambda: score(project)).clean:
        pass
    Store.at(str(project.scores)).sweep(older_than=0)
    found, alone = written(project.scores), written(project.root / "alone")
    assert found == alone
