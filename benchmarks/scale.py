"""Rows a second and memory as a corpus grows, and with Ray: ``python -m benchmarks.scale [--rows 10000 …] [--ray]``.

A small MLP scores vectors of 64 numbers, so that what is timed is the engine: reading, batches, tables. Every run is a
process of its own; its peak memory is the system's count, and its time the run's own, without imports and the loading
of the model. Ray's actors
score the same corpus, one and two of them in turn, beside ``ray.data.map_batches`` with the same model written by hand.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
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

from benchmarks import timing

SIZE, CLASSES, SHARD_ROWS = 64, 10, 100_000
RUN = """
import json, sys, time
from assay.engine import run
from assay.recipe import load_recipe
recipe = load_recipe(sys.argv[1], json.loads(sys.argv[2]))
began = time.perf_counter()
summary = run(recipe, engine=sys.argv[3])
seconds = time.perf_counter() - began
print(json.dumps({"seconds": seconds, "load": summary.times.load, "rows": summary.rows_scored}))
"""


def make(root: Path, rows: int) -> Path:
    """A corpus of so many rows in shards, a model, and the recipe."""
    rng, corpus = np.random.default_rng(0), root / f"corpus-{rows}"
    corpus.mkdir()
    for i, start in enumerate(range(0, rows, SHARD_ROWS)):
        count = min(SHARD_ROWS, rows - start)
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
        "batch": {"samples": 1024},
        "output": str(root / "scores"),
    }
    path = root / f"recipe-{rows}.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


def model() -> nn.Module:
    return nn.Sequential(nn.Linear(SIZE, 128), nn.ReLU(), nn.Linear(128, CLASSES))


def run(recipe: Path, output: Path, engine: str = "local", **settings: Any) -> dict[str, float]:
    """Seconds, rows and the peak of the process' memory in MiB; of Ray the driver's."""
    overrides = [f"output={output}", "run.devices=cpu", *(f"{key}={value}" for key, value in settings.items())]
    command = [sys.executable, "-c", RUN, str(recipe), json.dumps(overrides), engine]
    with tempfile.TemporaryFile("w+") as printed:
        process = subprocess.Popen(command, stdout=printed)
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            raise RuntimeError(f"exit status {process.returncode} of {' '.join(command[3:])}")
        printed.seek(0)
        found = json.loads(printed.read().splitlines()[-1])
    return {**found, "peak_mib": used.ru_maxrss / 1024}


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


def by_hand(root: Path, rows: int, actors: int, output: Path) -> dict[str, float]:
    import ray

    began = time.perf_counter()
    scored = ray.data.read_parquet(str(root / f"corpus-{rows}")).map_batches(
        ByHand,
        fn_constructor_args=(str(root / "model.safetensors"),),
        batch_size=1024,
        compute=ray.data.ActorPoolStrategy(size=actors),
    )
    scored.write_parquet(str(output))
    return {"seconds": time.perf_counter() - began, "rows": float(rows)}


def growing(root: Path, sizes: list[int]) -> list[dict[str, Any]]:
    cases = []
    for rows in sizes:
        recipe = make(root, rows)
        found = [run(recipe, root / f"scores-{rows}-{i}") for i in range(3 if rows < 5_000_000 else 1)]
        seconds = statistics.median(one["seconds"] - one["load"] for one in found)
        peak = max(one["peak_mib"] for one in found)
        cases.append({"rows": rows, "seconds": seconds, "rows_per_second": rows / seconds, "peak_mib": peak})
    return cases


def with_ray(root: Path, rows: int) -> list[dict[str, Any]]:
    """Each way in turn, in one cluster of two cores; the seconds of every round."""
    import ray

    recipe = make(root, rows)
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    address = ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR").address_info
    settings = {"run.ray.address": address["address"]}
    ways: dict[str, Callable[[Path], dict[str, float]]] = {
        f"assay, {n} actors": lambda out, n=n: run(recipe, out, "ray", **settings, **{"run.ray.workers": n})
        for n in (1, 2)
    } | {f"by hand, {n} actors": lambda out, n=n: by_hand(root, rows, n, out) for n in (1, 2)}
    rounds: dict[str, list[float]] = {name: [] for name in ways}
    for i in range(3):
        for name, way in ways.items():
            rounds[name].append(way(root / f"{name}-{i}".replace(", ", "-").replace(" ", "-"))["seconds"])
    ray.shutdown()
    return [
        {"way": name, "rows": rows, "seconds": statistics.median(each), "rounds": each} for name, each in rounds.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, nargs="*", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--ray", type=int, metavar="ROWS", help="score so many rows with Ray, too")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        cases = growing(Path(folder), options.rows)
        actors = with_ray(Path(folder), options.ray) if options.ray else []
    table = Table("rows", "rows / s", "peak MiB", title="one process")
    for case in cases:
        table.add_row(f"{case['rows']:,}", f"{case['rows_per_second']:,.0f}", f"{case['peak_mib']:,.0f}")
    Console().print(table)
    for case in actors:
        print(f"{case['way']}: {case['seconds']:.1f} s for {case['rows']:,} rows, with what it takes to start them")
    print("written to", timing.write("scale", [*cases, *actors]).relative_to(timing.RESULTS.parent.parent))


if __name__ == "__main__":
    main()
