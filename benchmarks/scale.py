"""Rows a second and memory as a corpus grows, with Ray, and what planning takes:
``python -m benchmarks.scale [--rows 10000 …] [--ray ROWS] [--shards 200000]``.

A small MLP scores vectors of 64 numbers, so that what is timed is the engine: reading, batches, tables. Every run is a
process of its own, and its peak memory the system's count. What does not grow with the rows is timed apart: a process
scores a single batch first, which is its start (imports, the model, what is made when it is first used), then that
again, three times, which is what any run costs (a plan, models' files read and hashed, folders, a first table), and
then the corpus; less than a shard five times.

Ray's actors score a corpus, one and two of them in turn, beside ``ray.data.map_batches`` with the same model written by
hand. Each way also does a tenth of the rows, and what the others take beyond that tells its rate, without its start.

Planning is of shards of a line each, a thousand to a folder of this machine's disk, of which none is scored: a process
for each round lists them and makes the plan.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import yaml
from rich.console import Console
from rich.table import Table
from safetensors.torch import save_file
from torch import Tensor, nn

from assay._json import dumps
from benchmarks import timing

SIZE, CLASSES, SHARD_ROWS, BATCH = 64, 10, 100_000, 1024
AGAIN = 3  # runs of a batch, after the first
# Not getrusage(), which after an exec() has the parent's peak.
PEAK = """
def peak_mib():
    return int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0]) / 1024
"""
RUN = """
import time
began = time.perf_counter()
import json, sys
from assay._json import dumps
from assay.engine import run
from assay.recipe import load_recipe
seconds = []
for recipe, overrides in json.loads(sys.argv[1]):
    summary = run(load_recipe(recipe, overrides), engine=sys.argv[2])
    seconds.append(time.perf_counter() - began)
    began += seconds[-1]
print(json.dumps({"seconds": seconds, "rows": summary.rows_scored, "peak_mib": peak_mib()}))
"""


def make(root: Path, rows: int, shard_rows: int = SHARD_ROWS) -> Path:
    """A corpus of so many rows in shards, a model, and the recipe."""
    rng, corpus = np.random.default_rng(0), root / f"corpus-{rows}"
    corpus.mkdir()
    for i, start in enumerate(range(0, rows, shard_rows)):
        count = min(shard_rows, rows - start)
        values = pa.array(rng.normal(size=count * SIZE).astype(np.float32))
        vectors = pa.FixedSizeListArray.from_arrays(values, SIZE)
        table = pa.table({"x": vectors, "y": rng.integers(0, CLASSES, count)})
        pq.write_table(table, corpus / f"{i:05}.parquet", row_group_size=10_000)
    torch.manual_seed(0)
    save_file(model().state_dict(), root / "model.safetensors")
    recipe = {
        "version": 1,
        "corpus": {"path": str(corpus)},
        "task": {"kind": "classification", "input_column": "x", "label_column": "y", "classes": CLASSES},
        "models": {"m": {"kind": "mlp", "path": str(root / "model.safetensors")}},
        "methods": [{"method": "ensemble", "models": ["m"]}],
        "batch": {"samples": BATCH},
        "output": str(root / "scores"),
    }
    path = root / f"recipe-{rows}.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


def model() -> nn.Module:
    return nn.Sequential(nn.Linear(SIZE, 128), nn.ReLU(), nn.Linear(128, CLASSES))


def run(recipes: Sequence[Path], output: Path, engine: str = "local", **settings: Any) -> dict[str, Any]:
    """Recipes one after another in one process -> seconds of each, the first with all imports; the rows of the last;
    the peak of the process' memory in MiB, of Ray the driver's."""
    options = ["run.devices=cpu", *(f"{key}={value}" for key, value in settings.items())]
    work = [(str(recipe), [f"output={output}-{i}", *options]) for i, recipe in enumerate(recipes)]
    with tempfile.TemporaryFile("w+") as printed:
        process = subprocess.run([sys.executable, "-c", PEAK + RUN, dumps(work), engine], stdout=printed, check=False)
        if process.returncode:
            raise RuntimeError(f"exit status {process.returncode} of {work}")
        printed.seek(0)
        found: dict[str, Any] = json.loads(printed.read().splitlines()[-1])
    return found


PLAN = """
import json, sys, time
from assay.engine.plan import find_corpora, make_plan
from assay.recipe import load_recipe
recipe = load_recipe(sys.argv[1], sys.argv[2:])
began = time.perf_counter()
corpora = find_corpora(recipe)
listed = time.perf_counter()
shards = len(make_plan(recipe, corpora=corpora).todo)
seconds = {"list": listed - began, "plan": time.perf_counter() - listed}
print(json.dumps({"shards": shards, **seconds, "peak_mib": peak_mib()}))
"""


def planning(root: Path, shards: int) -> dict[str, Any]:
    """Medians of three rounds."""
    recipe, corpus = make(root, 1), root / "many"
    line = dumps({"x": [0.0] * SIZE, "y": 0}) + "\n"
    for i in range(shards):
        folder = corpus / f"{i // 1000:04}"
        if i % 1000 == 0:
            folder.mkdir(parents=True)
        (folder / f"{i % 1000:03}.jsonl").write_text(line)
    command = [sys.executable, "-c", PEAK + PLAN, str(recipe), f"corpus.path={corpus}"]
    rounds = [json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout) for _ in range(3)]
    shutil.rmtree(corpus)
    return {key: statistics.median(one[key] for one in rounds) for key in rounds[0]}


class ByHand:
    """What somebody writes for the same scores: one of them."""

    def __init__(self, path: str) -> None:
        from safetensors.torch import load_file

        torch.set_num_threads(1)
        self.model = model()
        self.model.load_state_dict(load_file(path))

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        with torch.no_grad():
            logits: Tensor = self.model(torch.from_numpy(np.stack(batch["x"])))
            losses = nn.functional.cross_entropy(logits, torch.from_numpy(batch["y"].copy()), reduction="none")
        return {"loss": losses.numpy()}


def by_hand(root: Path, rows: int, actors: int, output: Path) -> float:
    """The seconds that it takes."""
    import ray

    began = time.perf_counter()
    read = ray.data.read_parquet(str(root / f"corpus-{rows}"))
    blocks = read.repartition(target_num_rows_per_block=rows // 20)  # all of it is one block, for one actor, without
    scored = blocks.map_batches(
        ByHand,
        fn_constructor_args=(str(root / "model.safetensors"),),
        batch_size=BATCH,
        compute=ray.data.ActorPoolStrategy(size=actors),
    )
    scored.write_parquet(str(output))
    return time.perf_counter() - began


def growing(root: Path, sizes: list[int], rounds: int) -> list[dict[str, Any]]:
    """All sizes in every round, in an order of its own: medians, and a rate ÷ the largest size's in the same round."""
    first, recipes = make(root, BATCH), {rows: make(root, rows) for rows in sizes}
    runs: dict[int, list[dict[str, Any]]] = {rows: [] for rows in sizes}
    for i in range(rounds):
        for rows in random.Random(i).sample(sizes, len(sizes)):
            output = root / f"scores-{rows}-{i}"
            corpora = [recipes[rows]] * _times(rows)
            runs[rows].append(run([*[first] * (1 + AGAIN), *corpora], output))
            if runs[rows][-1]["rows"] != rows:
                raise RuntimeError(f"{runs[rows][-1]['rows']} of {rows} rows were scored")
    rates = {rows: [_rate(rows, r["seconds"]) for r in turns] for rows, turns in runs.items()}
    cases = []
    for rows, turns in runs.items():
        start = statistics.median(r["seconds"][0] for r in turns)
        fixed = statistics.median(second for r in turns for second in r["seconds"][1 : 1 + AGAIN])
        seconds = statistics.median(second for r in turns for second in r["seconds"][1 + AGAIN :])
        cases.append(
            {
                "rows": rows,
                "start": start,
                "fixed": fixed,
                "seconds": seconds,
                "rows_per_second": statistics.median(rates[rows]),
                "rows_per_second_with_fixed": rows / seconds,
                "beside_the_largest": asdict(timing.ratio(rates[rows], rates[max(sizes)])),
                "peak_mib": max(r["peak_mib"] for r in turns),
                "rounds": rates[rows],
            }
        )
    return cases


def _rate(rows: int, seconds: Sequence[float]) -> float:
    """Of one process: the rows beyond a batch, by what they take beyond it."""
    batch, corpus = seconds[1 : 1 + AGAIN], seconds[1 + AGAIN :]
    return (rows - BATCH) / (statistics.median(corpus) - statistics.median(batch))


def _times(rows: int) -> int:
    """How often a process scores so many: the least take no longer than a sync of the disk may."""
    return 5 if rows < SHARD_ROWS else 1


def with_ray(root: Path, rows: int, turns: int) -> list[dict[str, Any]]:
    """Each way in turn, in one cluster, with all rows and with a tenth of them.

    It thinks that it has four cores: ``ray.data`` reads and writes beside its actors, and two of them on two would wait
    for each other for ever.
    """
    import ray

    # As many shards of either corpus, and enough that two actors have as much to do.
    recipes = {count: make(root, count, -(-count // 20)) for count in (rows // 10, rows)}
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    address = ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False, logging_level="ERROR").address_info
    logging.getLogger("ray.data").setLevel(logging.ERROR)

    def assay(actors: int, count: int, output: Path) -> float:
        settings = {"run.ray.address": address["address"], "run.ray.workers": actors}
        seconds: float = run([recipes[count]], output, "ray", **settings)["seconds"][0]
        return seconds

    ways: dict[str, Callable[[int, Path], float]] = {
        f"assay, {n} actors": lambda count, out, n=n: assay(n, count, out) for n in (1, 2)
    } | {f"by hand, {n} actors": lambda count, out, n=n: by_hand(root, count, n, out) for n in (1, 2)}
    rounds: dict[tuple[str, int], list[float]] = {(name, count): [] for name in ways for count in recipes}
    for i in range(turns):
        for place, (name, count) in enumerate(rounds):
            rounds[name, count].append(ways[name](count, root / f"ray-{place}-{i}"))
    ray.shutdown()
    return [_way(name, *((count, rounds[name, count]) for count in recipes)) for name in ways]


def _way(name: str, few: tuple[int, list[float]], all_: tuple[int, list[float]]) -> dict[str, Any]:
    """Its rate, from what more rows take more; what is left of its seconds is its start. None, where its start varies
    by more than the rows take."""
    (little, fast), (rows, slow) = few, all_
    seconds, rounds = statistics.median(slow), {str(little): fast, str(rows): slow}
    rate, start = None, None
    if min(slow) > max(fast):
        rate = (rows - little) / (seconds - statistics.median(fast))
        start = seconds - rows / rate
    return {
        "way": name,
        "rows": rows,
        "seconds": seconds,
        "rows_per_second": rate,
        "start": start,
        "rounds": rounds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, nargs="*", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--rounds", type=int, default=5, help="of all sizes, and of all ways, in turn")
    parser.add_argument("--ray", type=int, metavar="ROWS", help="score so many rows with Ray, too")
    parser.add_argument("--shards", type=int, help="list and plan so many shards, and do nothing else")
    options = parser.parse_args()
    if options.shards:
        with tempfile.TemporaryDirectory() as folder:
            case = planning(Path(folder), options.shards)
        print(", ".join(f"{key} {value:,.1f}" for key, value in case.items()))
        path = timing.write("planning", [case])
        print("written to", path.relative_to(timing.RESULTS.parent.parent))
        return
    with tempfile.TemporaryDirectory() as folder:
        if options.rows:
            show_and_write("scale", growing(Path(folder), options.rows, options.rounds))
        if options.ray:
            show_and_write("scale-ray", with_ray(Path(folder), options.ray, options.rounds))


def show_and_write(name: str, cases: list[dict[str, Any]]) -> None:
    title = "rows / s beyond what does not grow with the rows: the start and, of one process, a run's own"
    table = Table(
        "", "rows", "rows / s", "÷ largest's", "a run's own, s", "start, s", "all, s", "peak MiB", title=title
    )
    for case in cases:
        all_ = case["seconds"] if "way" in case else case["start"] + case["seconds"]
        beside = case["beside_the_largest"]["median"] if "beside_the_largest" in case else None
        numbers = (case["rows_per_second"], beside, case.get("fixed"), case["start"], all_, case.get("peak_mib"))
        shown = (
            "–" if n is None else f"{n:,.{places}f}" for n, places in zip(numbers, (0, 3, 3, 2, 2, 0), strict=True)
        )
        table.add_row(case.get("way", "one process"), f"{case['rows']:,}", *shown)
    Console().print(table)
    path = timing.write(name, cases)
    print("written to", path.relative_to(timing.RESULTS.parent.parent), flush=True)


if __name__ == "__main__":
    main()
