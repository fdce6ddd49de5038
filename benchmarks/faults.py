"""What is lost when something breaks: ``python -m benchmarks.faults [--times 50] [--ray 20]``.

A small corpus is scored undisturbed, then again and again while processes are killed, writes fail, shards are cut or
change, two runners meet, or a recipe is edited half-way. After each fault the run is repeated as a user would, and its
tables are compared with the undisturbed ones, row by row and bit by bit: rows that are in neither table nor quarantine
are *lost*, rows that are there twice *doubled*, rows with other scores *changed*. All three must be 0.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import yaml
from rich.console import Console
from rich.table import Table as Printed
from safetensors.torch import save_file
from torch import nn

from assay._json import dumps
from benchmarks import timing

SHARDS, ROWS, SIZE, CLASSES = 60, 200, 16, 3
Scores = dict[tuple[str, int], tuple[Any, ...]]


@dataclass
class Found:
    """What a fault did, and to how many rows."""

    fault: str
    times: int = 0
    lost: int = 0
    doubled: int = 0
    changed: int = 0
    quarantined: int = 0
    note: str = ""


class World:
    """A corpus, a recipe, and what an undisturbed run makes of them."""

    def __init__(self, root: Path) -> None:
        self.root, self.rng = root, random.Random(0)
        self.corpus = root / "corpus"
        self.corpus.mkdir()
        numbers = np.random.default_rng(0)
        for i in range(SHARDS):
            self.write_shard(i, numbers.normal(size=(ROWS, SIZE)), numbers.integers(0, CLASSES, ROWS))
        torch.manual_seed(0)
        save_file(nn.Sequential(nn.Linear(SIZE, CLASSES)).state_dict(), root / "model.safetensors")
        self.recipe = self.write_recipe("recipe", [{"method": "ensemble", "models": ["m"]}])
        self.expect(self.score("undisturbed") == 0, "the undisturbed run failed")
        self.undisturbed, _ = self.scores("undisturbed")

    def write_shard(self, i: int, vectors: Any, labels: Any) -> Path:
        rows = [
            {"id": f"s{i}-{j}", "x": x, "y": y}
            for j, (x, y) in enumerate(zip(vectors.tolist(), labels.tolist(), strict=True))
        ]
        if i % 2:
            path = self.corpus / f"{i:03}.jsonl"
            path.write_text("".join(dumps(row) + "\n" for row in rows))
        else:
            path = self.corpus / f"{i:03}.parquet"
            pq.write_table(pa.Table.from_pylist(rows), path)
        return path

    def write_recipe(self, name: str, methods: list[dict[str, Any]], model: str = "model") -> Path:
        path = self.root / f"{name}.yaml"
        task = {"kind": "classification", "input_column": "x", "label_column": "y", "classes": CLASSES}
        models = {"m": {"kind": "mlp", "path": str(self.root / f"{model}.safetensors")}}
        recipe = {"corpus": {"path": str(self.corpus), "id_column": "id"}, "task": task, "models": models}
        path.write_text(yaml.safe_dump({"version": 1, **recipe, "methods": methods, "output": "scores"}))
        return path

    def start(self, output: str, *more: str, recipe: Path | None = None, **options: Any) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "assay", "score", str(recipe or self.recipe), "--quiet", *more]
        command += ["--set", f"output={self.root / output}"]
        return subprocess.Popen(command, start_new_session=True, stderr=subprocess.DEVNULL, **options)

    def score(self, output: str, *more: str, **options: Any) -> int:
        return self.start(output, *more, **options).wait()

    def tables(self, output: str) -> list[Path]:
        return sorted(p for p in (self.root / output).rglob("*.parquet") if not p.name.startswith("."))

    def scores(self, output: str) -> tuple[Scores, int]:
        """Every row's id and scores, and how many are there twice."""
        found: Scores = {}
        doubled = 0
        for path in self.tables(output):
            table = pq.read_table(path)
            shard = str(path.relative_to(self.root / output))
            for row in zip(*(column.to_pylist() for column in table.columns), strict=True):
                doubled += (shard, row[0]) in found
                found[shard, row[0]] = row[1:]
        return found, doubled

    def quarantine(self, output: str) -> list[dict[str, Any]]:
        lists = (self.root / output / "quarantine").rglob("*.jsonl")
        return [json.loads(line) for path in lists for line in path.read_text().splitlines()]

    def compare(self, fault: Found, output: str) -> Found:
        """Against the undisturbed run; a shard or row in quarantine is accounted for."""
        found, doubled = self.scores(output)
        listed = self.quarantine(output)
        whole = Counter(entry["shard"].rpartition(".")[0] for entry in listed if entry["row"] is None)
        rows = {(entry["shard"].rpartition(".")[0], entry["row"]) for entry in listed}
        fault.doubled += doubled
        for (shard, row), scores in self.undisturbed.items():
            stem = shard.removesuffix(".parquet")
            if (shard, row) in found:
                fault.changed += str(found[shard, row]) != str(scores)
            elif stem in whole or (stem, row) in rows:
                fault.quarantined += 1
            else:
                fault.lost += 1
        return fault

    @contextlib.contextmanager
    def output(self, name: str) -> Iterator[str]:
        yield name
        shutil.rmtree(self.root / name, ignore_errors=True)

    def expect(self, holds: bool, what: str) -> None:
        if not holds:
            raise RuntimeError(f"benchmarks.faults: {what}")


# What stands in the command line of a worker process, of an actor that scores, and of what keeps a node of Ray's.
WORKERS, ACTORS, RAYLETS = ("assay-worker", "multiprocessing.spawn"), ("ray::Actor",), ("raylet/raylet",)


def killed(world: World, times: int, what: str, *more: str, children: Sequence[str] = ()) -> Found:
    """SIGKILL of the whole tree, or of one of these children, after a random number of tables."""
    fault = Found(f"SIGKILL of {what}")
    runs = 0
    with world.output("killed") as out:
        while fault.times < times:
            runs += 1
            world.expect(runs <= 3 * times + 3, f"{what} was met {fault.times} times in {runs - 1} runs")
            for path in world.rng.sample(world.tables(out), len(world.tables(out)) // 2):
                path.unlink()
            process, before = world.start(out, *more), len(world.tables(out))
            wanted = before + world.rng.randint(0, 4)
            while process.poll() is None and len(world.tables(out)) < wanted:
                time.sleep(0.01)
            while children and process.poll() is None and not _below(process, children):
                time.sleep(0.01)
            fault.times += _kill(process, world.rng, children)
            process.wait()
        while world.score(out, *more) != 0:
            fault.note = "some shards were tried again"
        return world.compare(fault, out)


def _kill(process: subprocess.Popen[bytes], rng: random.Random, children: Sequence[str] = ()) -> int:
    """How many were killed: one of the children, or if none are named, the tree."""
    with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError):
        if not children:
            os.killpg(process.pid, signal.SIGKILL)
            return 1
        if found := _below(process, children):
            rng.choice(found).kill()
            return 1
    return 0


def _below(process: subprocess.Popen[bytes], names: Sequence[str]) -> list[psutil.Process]:
    """The processes below it whose command line has one of these names in it."""
    found = []
    with contextlib.suppress(psutil.NoSuchProcess):
        for child in psutil.Process(process.pid).children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                if any(name in " ".join(child.cmdline()) for name in names):
                    found.append(child)
    return found


def failing_writes(world: World, times: int) -> Found:
    """No file may grow beyond a few kilobytes, as on a full disk; then it may."""
    fault = Found("writes that fail")

    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4_000, resource.RLIM_INFINITY))

    with world.output("full") as out:
        for _ in range(times):
            status = world.score(out, preexec_fn=limited)
            world.expect(status != 0, "a run that could not write ended with 0")
            fault.times += 1
        world.expect(world.score(out) == 0, "the run after failing writes failed")
        return world.compare(fault, out)


def full_disk(world: World, times: int) -> Found:
    """A disk of a few hundred kilobytes in memory, in which ever more of the tables fit, and in the end all."""
    fault = Found("a full disk")
    disk = world.root / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=100k", "tmpfs", str(disk)]
    if subprocess.run(mount, stderr=subprocess.DEVNULL).returncode:
        return replace(fault, note="not tried: only root may mount one")
    try:
        for kilobytes in range(100, 100 + 40 * times, 40):
            subprocess.run(["mount", "-o", f"remount,size={kilobytes}k", str(disk)], check=True)
            fault.times += world.score("disk/scores") != 0
        subprocess.run(["mount", "-o", "remount,size=100m", str(disk)], check=True)
        world.expect(fault.times > 0, "a full disk was never met")
        world.expect(world.score("disk/scores") == 0, "the run on a larger disk failed")
        return world.compare(fault, "disk/scores")
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def cut_shards(world: World, times: int) -> Found:
    """Shards that end in the middle, and are whole again afterwards. (Of JSON lines, nobody can tell.)"""
    fault = Found("shards that are cut")
    with world.output("cut") as out:
        for path in world.rng.sample(sorted(world.corpus.glob("*.parquet")), times):
            whole = path.read_bytes()
            kept = os.stat(path)
            path.write_bytes(whole[: len(whole) // 2])
            world.expect(world.score(out) != 0, "a cut shard passed")
            fault.times += 1
            half = world.compare(Found(""), out)
            world.expect(half.lost == 0, f"{path.name}: rows of a cut shard are nowhere")
            path.write_bytes(whole)
            os.utime(path, ns=(kept.st_atime_ns, kept.st_mtime_ns))
        world.expect(world.score(out) == 0, "whole shards failed")
        return world.compare(fault, out)


def two_runners(world: World, times: int) -> Found:
    """Two runs of one recipe on one output at once."""
    fault = Found("two runners on one output")
    for _ in range(times):
        with world.output("two") as out:
            both = [world.start(out), world.start(out)]
            ends = [process.wait() for process in both]
            world.expect(0 in ends, f"both of two runners failed: {ends}")
            fault.times += 1
            world.compare(fault, out)
    return fault


def edited_recipe(world: World, times: int) -> Found:
    """A recipe that is changed half-way is refused, and the old one goes on."""
    fault = Found("a recipe changed half-way")
    other = world.write_recipe("other", [{"method": "ensemble", "models": ["m", "m"]}])
    for _ in range(times):
        with world.output("edited") as out:
            process = world.start(out)
            while process.poll() is None and len(world.tables(out)) < 3:
                time.sleep(0.01)
            _kill(process, world.rng)
            process.wait()
            if len(world.tables(out)) < SHARDS:
                world.expect(world.score(out, recipe=other) != 0, "another recipe went on with the tables of one")
                fault.times += 1
            world.expect(world.score(out) == 0, "the old recipe did not go on")
            world.compare(fault, out)
    return fault


def clocks(world: World, times: int) -> Found:
    """Files from the future, and from long ago."""
    fault = Found("clocks that are wrong")
    with world.output("clocks") as out:
        for days in (400, -400) * (times // 2):
            process = world.start(out)
            while process.poll() is None and len(world.tables(out)) < 3:
                time.sleep(0.01)
            _kill(process, world.rng)
            process.wait()
            for path in [p for p in (world.root / out).rglob("*") if p.is_file()]:
                os.utime(path, (time.time() + 86_400 * days,) * 2)
            fault.times += 1
        world.expect(world.score(out) == 0, "a run among files of other days failed")
        return world.compare(fault, out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--times", type=int, default=50, help="SIGKILLs of the process tree; a fifth of the others; 0: none"
    )
    parser.add_argument("--ray", type=int, default=0, metavar="TIMES", help="SIGKILLs of Ray's actors and raylets")
    options = parser.parse_args()
    if not options.times and not options.ray:
        parser.error("nothing to do: expected --times or --ray above 0")
    few = max(2, options.times // 5)
    with tempfile.TemporaryDirectory() as folder:
        world = World(Path(folder))
        faults: list[Callable[[], Found]] = [
            lambda: killed(world, options.times, "the process tree"),
            lambda: killed(world, few, "a worker", "--devices", "cpu,cpu", children=WORKERS),
            lambda: failing_writes(world, few),
            lambda: full_disk(world, few),
            lambda: cut_shards(world, few),
            lambda: two_runners(world, few),
            lambda: edited_recipe(world, few),
            lambda: clocks(world, few),
        ]
        faults = faults if options.times else []
        if options.ray:
            ray = ("--engine", "ray", "--set", "run.ray.workers=2")
            faults += [
                lambda: killed(world, options.ray, "an actor of Ray", *ray, children=ACTORS),
                lambda: killed(world, options.ray, "the raylet", *ray, children=RAYLETS),
            ]
        table = Printed("fault", "times", "rows lost", "doubled", "changed", "quarantined", "note")
        found = []
        for fault in faults:
            found.append(fault())
            table.add_row(*map(str, asdict(found[-1]).values()))
            print(found[-1], flush=True)
            path = timing.write("faults" if options.times else "faults-ray", [asdict(one) for one in found])
    Console().print(table)
    print("written to", path.relative_to(timing.RESULTS.parent.parent))
    if any(one.lost or one.doubled or one.changed for one in found):
        sys.exit(1)


if __name__ == "__main__":
    main()
