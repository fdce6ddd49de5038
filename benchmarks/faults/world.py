"""A small corpus, what an undisturbed run makes of it, and how another run's tables differ."""

from __future__ import annotations

import contextlib
import itertools
import json
import random
import shutil
import time
from collections.abc import Callable, Container, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import yaml
from safetensors.torch import save_file
from torch import nn

from assay._json import dumps
from benchmarks.faults.runs import Run

SHARDS, ROWS, SIZE, CLASSES = 60, 200, 16, 3
Row = dict[str, Any]
Place = tuple[str, int]
Scores = dict[Place, tuple[Any, ...]]
"""By the table's path and the row: its id and scores."""


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
    commit: str = ""


class World:
    """A corpus, a recipe, and what an undisturbed run makes of them."""

    def __init__(self, root: Path) -> None:
        self.root, self.rng = root, random.Random(0)
        self.corpus = root / "corpus"
        self.corpus.mkdir()
        self.rows = {i: make_rows(i) for i in range(SHARDS)}
        for i, rows in self.rows.items():
            write_shard(self.shard(i), rows)
        torch.manual_seed(0)
        self.weights = nn.Sequential(nn.Linear(SIZE, CLASSES)).state_dict()
        save_file(self.weights, root / "model.safetensors")
        self.recipe = self.write_recipe("recipe", [{"method": "ensemble", "models": ["m"]}])
        self.expect(self.score("undisturbed") == 0, "the undisturbed run failed")
        self.undisturbed, doubled = self.scores("undisturbed")
        given = {
            (f"{self.shard(i).stem}.parquet", j): row["id"]
            for i, rows in self.rows.items()
            for j, row in enumerate(rows)
        }
        ids = {place: own[0] for place, own in self.undisturbed.items()}
        self.expect(not doubled and ids == given, "the undisturbed run has other rows than the corpus")

    def shard(self, i: int) -> Path:
        """Where the i-th lies: Parquet, or every other one JSON lines."""
        return self.corpus / f"{i:03}.{'jsonl' if i % 2 else 'parquet'}"

    def scored(self, i: int, row: int) -> tuple[Any, ...]:
        """Id and scores that an undisturbed run gives a row of the i-th shard."""
        return self.undisturbed[f"{self.shard(i).stem}.parquet", row]

    def copied(self, name: str) -> Path:
        """The corpus again, for a fault to damage."""
        return Path(shutil.copytree(self.corpus, self.root / name))

    def write_recipe(self, name: str, methods: list[dict[str, Any]], model: str = "model") -> Path:
        path = self.root / f"{name}.yaml"
        task = {"kind": "classification", "input_column": "x", "label_column": "y", "classes": CLASSES}
        models = {"m": {"kind": "mlp", "path": str(self.root / f"{model}.safetensors")}}
        recipe = {"corpus": {"path": str(self.corpus), "id_column": "id"}, "task": task, "models": models}
        path.write_text(yaml.safe_dump({"version": 1, **recipe, "methods": methods, "output": "scores"}))
        return path

    def start(
        self, output: str, *more: str, recipe: Path | None = None, corpus: Path | str | None = None, **options: Any
    ) -> Run:
        """A run into a folder of this world, or any URL; ``options`` are ``Run``'s."""
        command = ["score", str(recipe or self.recipe), "--quiet", *more]
        command += ["--set", f"output={output if '://' in output else self.root / output}"]
        command += [] if corpus is None else ["--set", f"corpus.path={corpus}"]
        return Run(command, **options)

    def score(self, output: str, *more: str, **options: Any) -> int:
        return self.start(output, *more, **options).wait()

    def tables(self, output: str) -> list[Path]:
        return sorted(p for p in (self.root / output).rglob("*.parquet") if not p.name.startswith("."))

    def forget_half(self, output: str) -> None:
        """Half of the tables are gone, so that a run has something to do."""
        tables = self.tables(output)
        for path in self.rng.sample(tables, len(tables) // 2):
            path.unlink()

    def wait_for_tables(self, run: Run, output: str, count: int) -> None:
        """Until there are so many, or the run is over."""
        while run.goes_on and len(self.tables(output)) < count:
            time.sleep(0.001)

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

    def quarantine(self, output: str) -> dict[tuple[str, int | None], str]:
        """Reasons by table and row; of a whole shard the row is None."""
        listed = {}
        for path in (self.root / output / "quarantine").rglob("*.jsonl"):
            for entry in map(json.loads, path.read_text().splitlines()):
                table, first = entry["shard"].rpartition(".")[0] + ".parquet", entry["row"]
                for row in [None] if first is None else range(first, entry.get("last", first) + 1):
                    listed[table, row] = entry["reason"]
        return listed

    def compare(self, fault: Found, output: str, planted: Scores | None = None) -> None:
        """Count what differs from the undisturbed run; a shard or row in quarantine is accounted for.

        Of rows that were ``planted`` in the corpus beside or in place of its own, scores need only be close: their
        batches are none of the undisturbed run's.
        """
        found, doubled = self.scores(output)
        fault.doubled += doubled
        count(fault, self.undisturbed, found, self.quarantine(output), planted or {})

    def so_far(self, output: str) -> Found:
        """What a run that has just been disturbed has left."""
        found = Found("so far")
        self.compare(found, output)
        return found

    @contextlib.contextmanager
    def output(self, name: str) -> Iterator[str]:
        yield name
        shutil.rmtree(self.root / name, ignore_errors=True)

    def attempts(self, fault: Found, times: int) -> Iterator[int]:
        """Runs, by their numbers from 1 on, until the fault has been met so often: some end before it comes."""
        for run in itertools.count(1):
            if fault.times >= times:
                return
            self.expect(run <= 3 * times + 3, f"{fault.fault}: met {fault.times} times in {run - 1} runs")
            yield run

    def expect(self, holds: bool, what: str) -> None:
        if not holds:
            raise RuntimeError(f"benchmarks.faults: {what}")


Fault = Callable[[World, Found, int], None]
"""Makes a fault happen so many times, and counts."""


def make_rows(seed: int, count: int = ROWS) -> list[Row]:
    numbers = np.random.default_rng(seed)
    vectors, labels = numbers.normal(size=(count, SIZE)), numbers.integers(0, CLASSES, count)
    pairs = zip(vectors.tolist(), labels.tolist(), strict=True)
    return [{"id": f"s{seed}-{j}", "x": x, "y": y} for j, (x, y) in enumerate(pairs)]


def write_shard(path: Path, rows: list[Row]) -> Path:
    """JSON lines or Parquet, by the name."""
    if path.suffix == ".jsonl":
        path.write_text("".join(dumps(row) + "\n" for row in rows))
    else:
        schema = [("id", pa.string()), ("x", pa.list_(pa.float64())), ("y", pa.int64())]
        schema += [(name, pa.string()) for name in (rows[0] if rows else {}) if name not in ("id", "x", "y")]
        pq.write_table(pa.Table.from_pylist(rows, pa.schema(schema)), path)
    return path


def count(
    fault: Found, undisturbed: Scores, found: Scores, listed: Container[tuple[str, int | None]], planted: Scores
) -> None:
    """Add up what became of every row: it is among those ``found``, or ``listed`` alone or with its whole shard."""
    expected = undisturbed | planted
    fault.doubled += len(found.keys() - expected.keys())
    for place, scores in expected.items():
        is_listed = place in listed or (place[0], None) in listed
        if place in found:
            fault.doubled += is_listed
            same = _close(found[place], scores) if place in planted else str(found[place]) == str(scores)
            fault.changed += not same
        elif is_listed:
            fault.quarantined += 1
        else:
            fault.lost += 1


def _close(found: tuple[Any, ...], expected: tuple[Any, ...]) -> bool:
    return found[0] == expected[0] and np.allclose(found[1:], expected[1:], 1e-4, 1e-6, equal_nan=True)
