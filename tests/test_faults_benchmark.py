"""The table of faults: its judge sees what is lost, doubled and changed, and the page that quotes it tells the same."""

from __future__ import annotations

import json
import math
from pathlib import Path
from random import Random
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from benchmarks.faults import processes
from benchmarks.faults.__main__ import faults_and_times
from benchmarks.faults.world import SHARDS, Found, World, count

ROOT = Path(__file__).parent.parent


def test_what_became_of_each_row_is_counted() -> None:
    undisturbed = {("a.parquet", i): (f"a-{i}", i / 3, math.nan) for i in range(7)} | {("b.parquet", 0): ("b-0", 0.5)}
    found = {place: scores for place, scores in undisturbed.items() if place[0] == "a.parquet" and place[1] > 1}
    found[("a.parquet", 3)] = ("a-3", 1.0000001, math.nan)
    found[("a.parquet", 4)] = ("a-4", 4 / 3 + 1e-9, math.nan)
    found[("a.parquet", 7)] = ("a-7", 0.0, math.nan)
    listed = {("a.parquet", 1): "why", ("a.parquet", 2): "both", ("b.parquet", None): "whole"}
    fault = Found("planted")
    count(fault, undisturbed, found, listed, {("a.parquet", 4): undisturbed["a.parquet", 4]})
    assert (fault.lost, fault.doubled, fault.changed, fault.quarantined) == (1, 2, 1, 2)


@pytest.mark.parametrize("lost", [0, 1])
def test_an_undisturbed_run_that_loses_a_row_is_no_measure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lost: int
) -> None:
    def score(world: World, output: str, *_: Any, **__: Any) -> int:
        (world.root / output).mkdir()
        for i, rows in world.rows.items():
            own = rows[: len(rows) - lost] if i == 7 else rows
            table = pa.table({"row": range(len(own)), "id": [row["id"] for row in own], "score": [0.5] * len(own)})
            pq.write_table(table, world.root / output / f"{world.shard(i).stem}.parquet")
        return 0

    monkeypatch.setattr(World, "score", score)
    if not lost:
        assert len(World(tmp_path).undisturbed) == SHARDS * 200
        return
    with pytest.raises(RuntimeError, match="has other rows than the corpus"):
        World(tmp_path)


class _Running:
    """A run that writes a table whenever somebody looks."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.written = folder, 0

    @property
    def goes_on(self) -> bool:
        (self.folder / f"new-{self.written}.parquet").touch()
        self.written += 1
        return self.written < SHARDS

    def kill(self) -> None:
        pass

    wait = kill


def test_runs_among_wrong_clocks_have_something_to_do_and_are_killed_at_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    world, runs = World.__new__(World), list[_Running]()
    world.root, world.rng = tmp_path, Random(0)
    (tmp_path / "clocks").mkdir()

    def start(output: str) -> _Running:
        runs.append(_Running(tmp_path / output))
        return runs[-1]

    monkeypatch.setattr(world, "start", start)
    monkeypatch.setattr(world, "score", lambda output: 0)
    monkeypatch.setattr(world, "compare", lambda fault, output: None)
    for i in range(10):
        (tmp_path / "clocks" / f"{i}.parquet").touch()
    processes.clocks(world, Found("clocks"), 4)
    assert [3 <= run.written < 10 for run in runs] == [True] * 4


def test_a_fault_of_a_shard_meets_no_more_than_there_are() -> None:
    times = {name: count for name, (_, count) in faults_and_times(1000, 0).items()}
    assert times["SIGKILL of the process tree"] == 1000
    assert times["shards that are cut"] == SHARDS // 2


def test_the_page_has_the_results() -> None:
    page = (ROOT / "docs/pages/score-on-a-cluster.md").read_text(encoding="utf-8")
    results = json.loads((ROOT / "benchmarks/results/amd-epyc-2-threads-faults.json").read_text(encoding="utf-8"))
    for row in results["cases"]:
        counts = " | ".join(str(row[name]) for name in ("times", "lost", "doubled", "changed", "quarantined"))
        assert f"| {row['fault']} | {counts} |" in page
