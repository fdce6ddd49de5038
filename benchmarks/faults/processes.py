"""Processes that are killed, meet, are told something else half-way, or do not agree on the time."""

from __future__ import annotations

import contextlib
import os
import random
import time
from collections.abc import Sequence

import psutil

from benchmarks.faults.runs import Run
from benchmarks.faults.world import SHARDS, Found, World

# What stands in the command line of a worker process, of an actor that scores, and of what keeps a node of Ray's.
WORKERS, ACTORS, RAYLETS = ("assay-worker", "multiprocessing.spawn"), ("ray::Actor",), ("raylet/raylet",)
ON_RAY = ("--engine", "ray", "--set", "run.ray.workers=2")


def kill_trees(world: World, fault: Found, times: int) -> None:
    _killed(world, fault, times)


def kill_workers(world: World, fault: Found, times: int) -> None:
    _killed(world, fault, times, "--devices", "cpu,cpu", children=WORKERS)


def kill_actors(world: World, fault: Found, times: int) -> None:
    _killed(world, fault, times, *ON_RAY, children=ACTORS)


def kill_raylets(world: World, fault: Found, times: int) -> None:
    _killed(world, fault, times, *ON_RAY, children=RAYLETS)


def _killed(world: World, fault: Found, times: int, *more: str, children: Sequence[str] = ()) -> None:
    """SIGKILL of the whole tree, or of one of these children, after a random number of tables."""
    with world.output("killed") as out:
        for _ in world.attempts(fault, times):
            world.forget_half(out)
            run, before = world.start(out, *more), len(world.tables(out))
            world.wait_for_tables(run, out, before + world.rng.randint(0, 4))
            while children and run.goes_on and not _below(run, children):
                time.sleep(0.01)
            fault.times += _kill_one(run, world.rng, children) if children else run.kill()
            run.wait()
        while world.score(out, *more) != 0:
            fault.note = "some shards were tried again"
        world.compare(fault, out)


def _kill_one(run: Run, rng: random.Random, names: Sequence[str]) -> bool:
    """Whether one of these children was there to be killed."""
    with contextlib.suppress(psutil.NoSuchProcess):
        if found := _below(run, names):
            rng.choice(found).kill()
            return True
    return False


def _below(run: Run, names: Sequence[str]) -> list[psutil.Process]:
    """The processes below it whose command line has one of these names in it."""
    found = []
    with contextlib.suppress(psutil.NoSuchProcess):
        for child in psutil.Process(run.pid).children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                if any(name in " ".join(child.cmdline()) for name in names):
                    found.append(child)
    return found


def two_runners(world: World, fault: Found, times: int) -> None:
    """Two runs of one recipe on one output at once."""
    for _ in range(times):
        with world.output("two") as out:
            both = [world.start(out), world.start(out)]
            ends = [run.wait() for run in both]
            world.expect(0 in ends, f"both of two runners failed: {ends}")
            fault.times += 1
            world.compare(fault, out)


def edited_recipe(world: World, fault: Found, times: int) -> None:
    """A recipe that is changed half-way is refused, and the old one goes on."""
    other = world.write_recipe("other", [{"method": "ensemble", "models": ["m", "m"]}])
    for _ in range(times):
        with world.output("edited") as out:
            _half_way(world, out)
            if len(world.tables(out)) < SHARDS:
                world.expect(world.score(out, recipe=other) != 0, "another recipe went on with the tables of one")
                fault.times += 1
            world.expect(world.score(out) == 0, "the old recipe did not go on")
            world.compare(fault, out)


def clocks(world: World, fault: Found, times: int) -> None:
    """Files from the future, and from long ago."""
    with world.output("clocks") as out:
        for days in (400, -400) * (times // 2):
            world.forget_half(out)
            _half_way(world, out)
            for path in [p for p in (world.root / out).rglob("*") if p.is_file()]:
                os.utime(path, (time.time() + 86_400 * days,) * 2)
            fault.times += 1
        world.expect(world.score(out) == 0, "a run among files of other days failed")
        world.compare(fault, out)


def _half_way(world: World, out: str) -> None:
    """A run that is killed when it has written a few tables."""
    run, before = world.start(out), len(world.tables(out))
    world.wait_for_tables(run, out, before + 3)
    run.kill()
    run.wait()
