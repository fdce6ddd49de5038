"""Tables of pages that are written by hand have the numbers of the results that they name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CLUSTER, MAGIC = "docs/pages/score-on-a-cluster.md", "docs/methods/magic.md"
HERE = "amd-epyc-2-threads"


@pytest.mark.parametrize(
    ("page", "results", "row"),
    [
        (
            CLUSTER,
            f"{HERE}-scale",
            "| {rows:,} | {rows_per_second:,.0f} | {fixed:.3f} | {start:.1f} | {peak_mib:,.0f} "
            "| {beside_the_largest[median]:.2f} ({beside_the_largest[least]:.2f} to {beside_the_largest[most]:.2f}) |",
        ),
        (CLUSTER, f"{HERE}-scale-ray", "| {way} | {seconds:.1f} |"),
        (
            CLUSTER,
            f"{HERE}-plan",
            "| {model}, {method} | {hours:,.1f} | {requests_per_second:.1f} | {gigabytes_per_second:.3f} "
            "| {gpu_minutes_lost_with_a_node:,.0f} |",
        ),
        (
            MAGIC,
            "quality-kinks",
            "| {board} | {eps_root:g} | {lds[1.0]:.3f} | {lds[0.1]:.3f} | {lds[0.0001]:.3f} | {missed:.2f} "
            "| {metasmoothness[0]:.3f}, {metasmoothness[1]:.3f} | {query_loss:.3f} |",
        ),
    ],
)
def test_a_page_has_the_numbers(page: str, results: str, row: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    cases = json.loads((ROOT / f"benchmarks/results/{results}.json").read_text(encoding="utf-8"))["cases"]
    rows = [row.format_map(case) for case in cases if "assumed" not in case]
    assert rows
    assert [line for line in rows if line not in text] == []


@pytest.mark.parametrize("results", ["multiplier", "multiplier-packages"])
def test_the_readme_has_the_steps_that_selections_save(results: str) -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    (case,) = json.loads((ROOT / f"benchmarks/results/{HERE}-{results}.json").read_text(encoding="utf-8"))["cases"]
    rows = [
        "| {} | {}–{} | {:.1f} | {:.0f} % |".format(
            own["median_steps"], *own["range"], own["multiplier"], 100 * own["domain_share"]
        )
        for own in case["summary"]
        if own["range"]
    ]
    assert len(rows) > 5
    assert [row for row in rows if row not in text] == []
