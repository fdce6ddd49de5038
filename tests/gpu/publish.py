"""A run's outcomes into benchmarks/results, the roofline figure and README's column."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu import report
from benchmarks.timing import RESULTS
from tests.gpu.outcomes import Outcome, last, read
from tests.gpu.settings import ROOT
from tests.gpu.table import ceilings_of, of

README = ROOT / "README.md"
# README's rows, by how they begin, and the case on the card that stands beside each.
ROWS = {
    "`ensemble_stats`, K=4 N=512 C=32000, float32": ("ensemble_stats", "K=5 .* C=32000", "float32"),
    "`ensemble_stats`, K=4 N=512 C=32000, bfloat16": ("ensemble_stats", "K=5 .* C=32000", "bfloat16"),
    "`ensemble_stats`, K=8 N=20000 C=100, float32": ("ensemble_stats", "K=5 .* C=100", "float32"),
    "`ensemble_stats`, K=8 N=20000 C=100, bfloat16": ("ensemble_stats", "K=5 .* C=100", "bfloat16"),
    "`linear_ensemble_stats`,": ("linear_ensemble_stats, one sweep", "K=2 .* D=2048 C=128256", "bfloat16"),
    "`head_scores`": ("head_scores, a direction and a sketch", "K=2 .* D=2048 C=128256", "bfloat16"),
    "`grad_dot`,": ("grad_dot", "B=8 T=1024 4096→14336", "bfloat16"),
    "`grad_sqnorm`,": ("grad_sqnorm", "B=8 T=1024 4096→14336", "bfloat16"),
    "`grad_sketch`,": ("grad_sketch", r"Kronecker\(16, 16\) B=8 T=1024 4096→14336", "bfloat16"),
    "`project`, Sparse": ("project", r"Sparse\(512\) B=16 .*", "float32"),
    "`project`, Rademacher": ("project", r"Rademacher\(512\) B=16 .*", "bfloat16"),
    "`topk_scan`,": ("topk_scan", "N=4000000 .* mean k=100", "float16"),
}
COLUMN = "GPU"
ABSENT = "not measured yet"


def publish(folders: Sequence[Path], results: Path = RESULTS, readme: Path = README) -> None:
    """Of several runs on one device the later one's rows count; another device is an error."""
    runs = [last(read(folder)) for folder in folders]
    facts = [o.facts for run in runs for o in of(run, "machine") if o.facts]
    if not facts:
        raise RuntimeError(f"no run in {', '.join(map(str, folders))} says which device it ran on; nothing to publish")
    devices = {str(f["device"]) for f in facts}
    if len(devices) > 1:
        raise RuntimeError(f"runs on different devices, {' and '.join(sorted(devices))}: publish them one by one")
    if "no measurements" in devices.pop() and results == RESULTS:
        raise RuntimeError("a rehearsal measures nothing: it has no place in benchmarks/results")
    cases: dict[str, dict[str, Any]] = {}
    baseline: dict[str, dict[str, Any]] = {}
    problems: list[str] = []
    for run in runs:
        ceilings = ceilings_of(run) or next((c for c in map(ceilings_of, reversed(runs)) if c), None)
        for phase in ("bench", "tier2"):
            measured = {o.row: o.facts for o in of(run, phase) if "median" in o.facts}
            cases |= {row: report.judged(found, ceilings) for row, found in measured.items()}
        baseline |= {o.row: dict(o.facts) for o in of(run, "baseline") if "median" in o.facts}
        problems += [problem(o) for o in run.values() if o.bad and o.phase in ("bench", "tier2", "baseline")]
    ceilings = next((c for c in map(ceilings_of, reversed(runs)) if c), None)
    machine = {**facts[-1], "commit": os.environ.get("GPU_COMMIT") or facts[-1].get("commit", "unknown")}
    for path in report.write(results, machine, ceilings, list(cases.values()), problems, list(baseline.values())):
        print("written to", path)
    readme.write_text(with_column(readme.read_text(), str(facts[-1]["device"]), list(cases.values())))
    print(f"{readme}: {sum(find(cases.values(), *row) is not None for row in ROWS.values())} of {len(ROWS)} rows")


def problem(outcome: Outcome) -> str:
    return f"{outcome.row} ({outcome.phase}): {outcome.state}, {outcome.detail}"


def find(cases: Any, op: str, shape: str, dtype: str) -> Mapping[str, Any] | None:
    for case in cases:
        if case["op"] == op and case["dtype"] == dtype and re.fullmatch(shape, case["shape"]):
            return case  # type: ignore[no-any-return]
    return None


def with_column(text: str, device: str, cases: Sequence[Mapping[str, Any]]) -> str:
    """README with the last column of the rows that were measured filled in, and the device above it."""
    lines = text.splitlines(keepends=True)
    for i, line in enumerate(lines):
        cells = line.rstrip("\n").split(" | ")
        if line.startswith("| op, on ") and cells[-1].startswith(COLUMN):
            lines[i] = " | ".join([*cells[:-1], f"{COLUMN}: {device} |\n"])
        for begin, row in ROWS.items():
            if line.startswith(f"| {begin}") and (case := find(cases, *row)):
                lines[i] = " | ".join([*cells[:-1], f"{cell(case)} |\n"])
    return "".join(lines)


def cell(case: Mapping[str, Any]) -> str:
    """Shape, share of the ceiling or multiple of the GEMMs, and whether that is the contract."""
    what = f"{case['shape']}, {case['dtype']}"
    share = f"{case['fraction']:.0%} of {'reading' if case['bound'] == 'read' else 'GEMM'}" if case["fraction"] else ""
    if case["bound"] == "gemm" and "gemm" in case["ratios"]:
        share = f"{1 / case['ratios']['gemm']:.2f} × its GEMMs"
    verdict = {True: " (met)", False: " (not met)", None: ""}[case.get("met")]
    return f"{what}: {share or format(case['median'], '.3f') + ' ms'}{verdict}"
