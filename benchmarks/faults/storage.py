"""Storage that is full, slow, too busy, or gone in the middle of an answer."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from typing import Any, TypeVar

import fsspec
from tests.object_store import BUCKET, ObjectStore, serve

from benchmarks.faults.world import SHARDS, Fault, Found, World

T = TypeVar("T")


def failing_writes(world: World, fault: Found, times: int) -> None:
    """No file may grow beyond a few kilobytes, as on a full disk; then it may."""
    with world.output("full") as out:
        for _ in range(times):
            status = world.score(out, largest_file=4_000)
            world.expect(status != 0, "a run that could not write ended with 0")
            fault.times += 1
        world.expect(world.score(out) == 0, "the run after failing writes failed")
        world.compare(fault, out)


def full_disk(world: World, fault: Found, times: int) -> None:
    """A disk of a few hundred kilobytes in memory, in which ever more of the tables fit, and in the end all."""
    disk = world.root / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=100k", "tmpfs", str(disk)]
    if subprocess.run(mount, stderr=subprocess.DEVNULL).returncode:
        fault.note = "not tried: only root may mount one"
        return
    try:
        for kilobytes in range(100, 100 + 40 * times, 40):
            subprocess.run(["mount", "-o", f"remount,size={kilobytes}k", str(disk)], check=True)
            fault.times += world.score("disk/scores") != 0
        subprocess.run(["mount", "-o", "remount,size=100m", str(disk)], check=True)
        world.expect(fault.times > 0, "a full disk was never met")
        world.expect(world.score("disk/scores") == 0, "the run on a larger disk failed")
        world.compare(fault, "disk/scores")
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def object_store(kind: str) -> Fault:
    """Corpus and scores in an object store on loopback that has a fault of this kind."""

    def make(world: World, fault: Found, times: int) -> None:
        with serve() as (store, options):
            _Bucket(world, store, options).disturb(fault, kind, times)

    return make


class _Bucket:
    """The corpus in an object store, and runs over it."""

    def __init__(self, world: World, store: ObjectStore, options: dict[str, Any]) -> None:
        self.world, self.store = world, store
        self.fs = fsspec.filesystem("s3", **options, skip_instance_cache=True, use_listings_cache=False)
        self.fs.put(str(world.corpus), f"{BUCKET}/corpus", recursive=True)
        self.options = options

    def score(self) -> int:
        return self.world.score(f"s3://{BUCKET}/scores", corpus=f"s3://{BUCKET}/corpus", s3=self.options)

    def disturb(self, fault: Found, kind: str, times: int) -> None:
        """Runs that meet the fault now and then, or whenever they ask for a shard or write a table."""
        world, met, ended = self.world, 0, [0, 0, 0]
        for _ in world.attempts(fault, times):
            self._forget_half()
            method, ending, every = self._which()
            with self.store.misbehaving(method, ending, **{kind: every}):
                status = self.score()
            if not self.store.met[kind]:
                continue
            met, fault.times = met + self.store.met[kind], fault.times + 1
            ended[status] += 1
            half = self._fetched(world.so_far)
            world.expect(not (half.doubled or half.changed), f"{fault.fault}: {half}")
            world.expect(status == 2 or not half.lost, f"{fault.fault}: ended with {status}, and rows are nowhere")
        world.expect(self.score() == 0, "a run over an object store that works failed")
        words = f"{ended[0]} were whole, {ended[1]} had named shards, {ended[2]} stopped"
        fault.note = f"{met:,} answers; of the runs {words}; the next run was whole"
        self._fetched(lambda out: world.compare(fault, out))

    def _which(self) -> tuple[str, str, int]:
        """Method and ending of the requests, and how many of them go well in between: any request now and then, every
        one for a shard, or every one that writes a table."""
        rng, shard = self.world.rng, self.world.shard(self.world.rng.randrange(SHARDS)).name
        few = ("", "", rng.randint(3, 30))
        return rng.choice([few, few, ("GET", f"/corpus/{shard}", 1), ("PUT", f"/{shard[:3]}.parquet", 1)])

    def _forget_half(self) -> None:
        tables = [path for path in self.fs.find(f"{BUCKET}/scores") if path.endswith(".parquet")]
        for path in self.world.rng.sample(tables, len(tables) // 2):
            self.fs.rm_file(path)

    def _fetched(self, look: Callable[[str], T]) -> T:
        """What is seen in a copy of the scores in the world's folder."""
        with self.world.output("fetched") as out:
            for path in self.fs.find(f"{BUCKET}/scores"):
                copy = self.world.root / out / path.removeprefix(f"{BUCKET}/scores/")
                copy.parent.mkdir(parents=True, exist_ok=True)
                copy.write_bytes(self.fs.cat_file(path))
            return look(out)
