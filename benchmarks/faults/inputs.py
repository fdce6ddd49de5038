"""What is read: shards that are cut, change or hold odd rows, and models that are broken."""

from __future__ import annotations

import contextlib
import math
import os
import random
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from safetensors.torch import save_file

from assay.corpus.compression import MAX_LINE_BYTES
from benchmarks.faults.runs import Run
from benchmarks.faults.world import ROWS, SHARDS, SIZE, Found, Place, Row, World, make_rows, write_shard


def cut_shards(world: World, fault: Found, times: int) -> None:
    """Shards that end in the middle, and are whole again afterwards. (Of JSON lines, nobody can tell.)"""
    with world.output("cut") as out:
        for path in world.rng.sample(sorted(world.corpus.glob("*.parquet")), times):
            whole = path.read_bytes()
            with _restored(path):
                path.write_bytes(whole[: len(whole) // 2])
                world.expect(world.score(out) != 0, "a cut shard passed")
                fault.times += 1
                half = world.so_far(out)
                world.expect(half.lost == 0, f"{path.name}: rows of a cut shard are nowhere")
        world.expect(world.score(out) == 0, "whole shards failed")
        world.compare(fault, out)


@contextlib.contextmanager
def _restored(path: Path) -> Iterator[None]:
    """The same bytes and the same time afterwards."""
    content, status = path.read_bytes(), os.stat(path)
    try:
        yield
    finally:
        path.write_bytes(content)
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def changing_shards(world: World, fault: Found, times: int) -> None:
    """Shards that get other rows while a run has them open, in place or by another file of their name."""
    with world.output("changing") as out:
        for number in world.attempts(fault, times):
            world.forget_half(out)
            run = world.start(out)
            shard = _stopped_at(run, world.corpus, world.rng)
            if shard is None:
                run.wait()
                continue
            with _restored(shard):
                other = write_shard(shard.with_stem("other") if fault.times % 2 else shard, make_rows(SHARDS + number))
                other.replace(shard)
                run.resume()
                status = run.wait()
            fault.times += 1
            half = world.so_far(out)
            named = status == 1 and half.quarantined == ROWS
            world.expect(named, f"{shard.name} changed, and the run ended with {status}: {half}")
            world.expect(not (half.lost or half.doubled or half.changed), f"{shard.name} changed: {half}")
        world.expect(world.score(out) == 0, "shards as they were failed")
        world.compare(fault, out)


def _stopped_at(run: Run, corpus: Path, rng: random.Random) -> Path | None:
    """A shard that the run, which is stopped now, has open; None if it has ended before.

    Not the first that it opens: to see what columns there are, it opens one before it scores.
    """
    wanted, seen = rng.randint(2, 20), set[Path]()
    with contextlib.suppress(psutil.Error, ProcessLookupError):
        watched = psutil.Process(run.pid)
        while run.goes_on:
            run.stop()
            held = [path for file in watched.open_files() if (path := Path(file.path)).parent == corpus]
            seen.update(held)
            if held and len(seen) >= wanted:
                return held[0]
            run.resume()
            time.sleep(0.001)
    return None


@dataclass(frozen=True)
class Planted:
    """A shard of odd rows: of those with scores, the ids and scores; of the others, what their reasons say."""

    name: str
    rows: list[Row]
    scored: dict[int, tuple[Any, ...]]
    listed: dict[int, str]


def few_rows(world: World, fault: Found, times: int) -> None:
    """Shards without a row, and with one."""

    def make(i: int) -> Planted:
        row = world.rng.randrange(ROWS)
        rows = world.rows[i][row : row + i // 2 % 2]
        return Planted(_name(i), rows, {j: world.scored(i, row) for j in range(len(rows))}, {})

    _planted(world, fault, make, times)


def repeated_ids(world: World, fault: Found, times: int) -> None:
    """Ids that a shard has twice, of which the first counts, and the same ids in two shards."""

    def make(i: int) -> Planted:
        again = sorted(world.rng.sample(range(1, ROWS), 20))
        first = world.rng.randrange(again[0])
        rows = [row | {"id": world.rows[i][first]["id"]} if j in again else row for j, row in enumerate(world.rows[i])]
        own = {j: world.scored(i, j) for j in range(ROWS) if j not in again}
        return Planted(_name(i), rows, own, dict.fromkeys(again, "repeats that of an earlier row"))

    _planted(world, fault, make, times)


def huge_rows(world: World, fault: Found, times: int) -> None:
    """Rows of 64 MiB beside what is read, rows longer than a line may be, and vectors of a million numbers."""

    def make(i: int) -> Planted:
        rows = [row | {"text": "short"} for row in world.rows[i][:5]]
        rows[1]["text"] = "x" * (64 << 20)
        rows[3]["x"] = [0.5] * 1_000_000
        listed = {3: "1000000"}
        if i % 2:
            rows[2]["text"] = "x" * MAX_LINE_BYTES
            listed[2] = "line is longer than"
        own = {j: world.scored(i, j) for j in range(5) if j not in listed}
        return Planted(_name(i), rows, own, listed)

    _planted(world, fault, make, times)


def _name(i: int) -> str:
    return f"odd-{i:03}.{'jsonl' if i % 2 else 'parquet'}"


def _table(shard: Path) -> str:
    return f"{shard.stem}.parquet"


def _planted(world: World, fault: Found, make: Callable[[int], Planted], times: int) -> None:
    """A run over the corpus and so many shards more."""
    corpus = world.copied("odd")
    scored: dict[Place, tuple[Any, ...]] = {}
    listed: dict[tuple[str, int | None], str] = {}
    for i in range(times):
        planted = make(i)
        table = _table(write_shard(corpus / planted.name, planted.rows))
        scored |= {(table, row): own for row, own in planted.scored.items()}
        listed |= {(table, row): reason for row, reason in planted.listed.items()}
    with world.output("odd-scores") as out:
        status = world.score(out, corpus=corpus)
        world.expect(status == bool(listed), f"{fault.fault}: ended with {status}")
        fault.times = times
        found = world.quarantine(out)
        world.expect(found.keys() == listed.keys(), f"{fault.fault}: in quarantine are {sorted(found)}")
        for place, reason in listed.items():
            world.expect(reason in found[place], f"{fault.fault}: {place}: {found[place]}, expected {reason}")
        names = {path.name for path in world.tables(out)}
        world.expect(names >= {_table(path) for path in corpus.iterdir()}, f"{fault.fault}: a shard has no table")
        world.compare(fault, out, scored)
    fault.quarantined += len(listed)
    shutil.rmtree(corpus)


def broken_models(world: World, fault: Found, times: int) -> None:
    """A model with a NaN among its weights, then the sound one in its place; and rows on which that one overflows."""
    corpus, planted = world.copied("overflowing"), dict[Place, tuple[Any, ...]]()
    weight = world.weights["0.weight"]
    for i in world.rng.sample(range(SHARDS), times):
        row, path = world.rng.randrange(ROWS), world.shard(i)
        rows = list(world.rows[i])
        rows[row] = rows[row] | {"x": (3e38 * torch.sign(weight[0])).tolist()}
        write_shard(corpus / path.name, rows)
        id_, *scores = world.scored(i, row)
        planted[_table(path), row] = (id_, *[math.nan] * len(scores))
    with world.output("broken") as out:
        for _ in range(times):
            broken = weight.clone()
            broken[world.rng.randrange(len(broken)), world.rng.randrange(SIZE)] = math.nan
            save_file({**world.weights, "0.weight": broken}, world.root / "broken.safetensors")
            recipe = world.write_recipe("broken", [{"method": "ensemble", "models": ["m"]}], "broken")
            shutil.rmtree(world.root / out, ignore_errors=True)
            world.expect(world.score(out, recipe=recipe, corpus=corpus) == 0, "a model that gives NaN ended the run")
            found, _ = world.scores(out)
            numbers = [number for _, *scores in found.values() for number in scores]
            world.expect(all(map(math.isnan, numbers)), "a model with a NaN among its weights gave a number")
            world.expect(len(found) == len(world.undisturbed), "rows of a model that gives NaN are nowhere")
            world.expect(world.score(out, corpus=corpus) != 0, "the sound model went on with the broken one's tables")
            world.expect(world.score(out, "--rescore", corpus=corpus) == 0, "the sound model failed")
            fault.times += 1
            world.compare(fault, out, planted)
    fault.note = f"{len(planted)} rows on which the sound one overflows are NaN, and theirs alone"
