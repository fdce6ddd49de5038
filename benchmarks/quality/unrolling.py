"""What following a training is worth beside looking at its end: ``python -m benchmarks.quality.unrolling``.

The two smooth settings of ``benchmarks.quality.magic`` and all of its methods, with 16 queries instead of 50.
"""

from __future__ import annotations

import time
from dataclasses import replace

from rich.console import Console

from assay._json import dumps
from benchmarks.quality.magic import SETTINGS, one, show
from benchmarks.timing import RESULTS, machine


def main() -> None:
    begun, cases = time.perf_counter(), []
    for setting in SETTINGS[:2]:
        cases.append(one(replace(setting, queries=16)))
        show(Console(width=120), cases[-1])
    result = {"machine": machine(), "seconds": round(time.perf_counter() - begun, 1), "cases": cases}
    (RESULTS / "quality-unrolling.json").write_text(dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
