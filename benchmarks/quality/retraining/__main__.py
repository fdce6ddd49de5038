"""Methods that train models to know: ``python -m benchmarks.quality.retraining [NAME ...] [--quick]``.

The names are forgetting, merging, subsampling, choosing, clusters; all of them if none is given. Each takes minutes of
one core and writes ``results/quality-retraining-NAME.json``; ``--quick`` is small and writes nothing.
"""

from __future__ import annotations

import argparse
import importlib
import re
import time

from rich.console import Console

from assay._json import dumps
from benchmarks.timing import RESULTS, machine

NAMES = ("forgetting", "merging", "subsampling", "choosing", "clusters")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(NAMES))
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    if unknown := sorted(set(options.names) - set(NAMES)):
        parser.error(f"{', '.join(unknown)}: expected {', '.join(NAMES)}")
    for name in options.names or NAMES:
        experiment = importlib.import_module(f"benchmarks.quality.retraining.{name}")
        began = time.perf_counter()
        found = experiment.run(options.quick)
        seconds = time.perf_counter() - began
        console = Console(width=110)
        console.print(experiment.table(found))
        console.print(f"{seconds:.0f} s")
        if not options.quick:
            facts = {**machine(), "seconds": round(seconds, 1), **found}
            path = RESULTS / f"quality-retraining-{name}.json"
            path.write_text(_rows_on_a_line(dumps(facts, indent=1)) + "\n", encoding="utf-8")


def _rows_on_a_line(text: str) -> str:
    """Lists of plain values without their line breaks."""
    return re.sub(r"\[[^\[\]{}]*\]", lambda found: " ".join(found[0].split()), text)


if __name__ == "__main__":
    main()
