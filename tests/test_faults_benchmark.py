"""The table of faults: its judge sees what is lost, doubled and changed, and the page that quotes it tells the same."""

from __future__ import annotations

import json
import math
from pathlib import Path

from benchmarks.faults.world import Found, count

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


def test_the_page_has_the_results() -> None:
    page = (ROOT / "docs/pages/score-on-a-cluster.md").read_text(encoding="utf-8")
    results = json.loads((ROOT / "benchmarks/results/amd-epyc-2-threads-faults.json").read_text(encoding="utf-8"))
    for row in results["cases"]:
        counts = " | ".join(str(row[name]) for name in ("times", "lost", "doubled", "changed", "quarantined"))
        assert f"| {row['fault']} | {counts} |" in page
