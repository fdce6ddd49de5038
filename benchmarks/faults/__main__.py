from __future__ import annotations

import argparse
import json
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table as Printed

from benchmarks import faults, timing
from benchmarks.faults import inputs, processes, storage
from benchmarks.faults.world import SHARDS, Fault, Found, World

RESULT = "faults"


def faults_and_times(most: int, ray: int) -> dict[str, tuple[Fault, int]]:
    """Every fault by its name, and how often it is made to happen."""
    few = min(max(2, most // 5), SHARDS // 2) if most else 0  # a shard of a kind for each
    return {
        "SIGKILL of the process tree": (processes.kill_trees, most),
        "SIGKILL of a worker": (processes.kill_workers, few),
        "SIGKILL of an actor of Ray": (processes.kill_actors, ray),
        "SIGKILL of the raylet": (processes.kill_raylets, ray),
        "writes that fail": (storage.failing_writes, few),
        "a full disk": (storage.full_disk, few),
        "an object store that is slow": (storage.object_store("slow"), few),
        "an object store that throttles": (storage.object_store("throttled"), few),
        "an object store that answers 500": (storage.object_store("error"), few),
        "an object store that cuts connections": (storage.object_store("cut"), few),
        "shards that are cut": (inputs.cut_shards, few),
        "shards that change while they are read": (inputs.changing_shards, few),
        "shards of 0 rows and of 1 row": (inputs.few_rows, few),
        "ids that are there twice": (inputs.repeated_ids, few),
        "huge rows": (inputs.huge_rows, few),
        "models that give NaN": (inputs.broken_models, few),
        "two runners on one output": (processes.two_runners, few),
        "a recipe changed half-way": (processes.edited_recipe, few),
        "clocks that are wrong": (processes.clocks, few),
    }


def write(found: dict[str, Found], order: list[str]) -> Path:
    """The results: these, and as they are there those of other faults."""
    path = timing.path(RESULT)
    rows = {row["fault"]: row for row in json.loads(path.read_text())["cases"]} if path.exists() else {}
    rows |= {name: asdict(one) for name, one in found.items()}
    return timing.write(RESULT, [rows[name] for name in order if name in rows])


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.faults", description=faults.__doc__)
    parser.add_argument(
        "--times", type=int, default=50, help="SIGKILLs of the process tree; a fifth of the others, 30 at most; 0: none"
    )
    parser.add_argument("--ray", type=int, default=0, metavar="TIMES", help="SIGKILLs of Ray's actors, and of raylets")
    parser.add_argument("--only", nargs="+", default=[""], metavar="WORDS", help="faults with one of these in the name")
    options = parser.parse_args()
    known = faults_and_times(options.times, options.ray)
    wanted = {name: fault for name, fault in known.items() if fault[1] and any(words in name for words in options.only)}
    if not wanted:
        parser.error("nothing to do: expected --times or --ray above 0, and --only with words of a fault's name")
    table = Printed("fault", "times", "rows lost", "doubled", "changed", "quarantined", "note")
    found: dict[str, Found] = {}
    with tempfile.TemporaryDirectory() as folder:
        world = World(Path(folder))
        commit: Any = timing.machine()["commit"]
        for name, (make, times) in wanted.items():
            one = found[name] = Found(name, commit=commit)
            make(world, one, times)
            print(one, flush=True)
            table.add_row(*map(str, list(asdict(one).values())[:-1]))
            path = write(found, list(known))
    Console().print(table)
    print("written to", path.relative_to(timing.RESULTS.parent.parent))
    if any(one.lost or one.doubled or one.changed for one in found.values()):
        sys.exit(1)


if __name__ == "__main__":
    main()
