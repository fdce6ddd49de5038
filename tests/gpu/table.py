"""A run's outcomes as a table, from whatever of them is there."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from tests.gpu.outcomes import Outcome

Outcomes = Mapping[tuple[str, str], Outcome]


def render(outcomes: Outcomes) -> str:
    parts = [_machine(outcomes), _phases(outcomes)]
    parts += [_by_op("smoke", outcomes, "op × dtype × shape against float64"), _bench(outcomes), _tests(outcomes)]
    parts += [_by_op("sanitize", outcomes, "paths under compute-sanitizer"), _problems(outcomes)]
    return "\n\n".join(part for part in parts if part) + "\n"


def of(outcomes: Outcomes, phase: str) -> list[Outcome]:
    return [o for (where, _), o in outcomes.items() if where == phase]


def grid(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[i]) for row in rows if i < len(row)) for i in range(max(map(len, rows)))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=False)).rstrip() for row in rows
    )


def tally(outcomes: Iterable[Outcome]) -> str:
    """ "12 ok, 1 died", what is wrong in capitals."""
    counts = Counter(o.state for o in outcomes)
    bad = {o.state for o in outcomes if o.bad}
    return ", ".join(f"{n} {state.upper() if state in bad else state}" for state, n in counts.items()) or "none"


def _machine(outcomes: Outcomes) -> str:
    (found, *_) = [o for o in of(outcomes, "machine") if o.facts] or [None]
    if found is None:
        return "no machine: the run was stopped before it said what it runs on"
    facts = found.facts
    return (
        f"{facts['device']}: torch {facts['torch']}, triton {facts['triton']}, driver {facts.get('driver', 'none')}, "
        f"assay at {facts['commit']}"
    )


def _phases(outcomes: Outcomes) -> str:
    rows = [["phase", "seconds", "", ""]]
    rows += [[o.row, "" if o.seconds is None else f"{o.seconds:.0f}", o.state, o.detail] for o in of(outcomes, "run")]
    rows += [["build", o.row, o.state, ""] for o in of(outcomes, "build")]
    return grid(rows)


def _by_op(phase: str, outcomes: Outcomes, what: str) -> str:
    """Rows are named "<word> <word> …": a line for each first word, a column for each second, counts of the rest."""
    cells: dict[str, dict[str, list[Outcome]]] = {}
    for o in of(outcomes, phase):
        first, _, rest = o.row.partition(" ")
        cells.setdefault(first, {}).setdefault(rest.partition(" ")[0], []).append(o)
    if not cells:
        return ""
    columns = list(dict.fromkeys(column for line in cells.values() for column in line))
    rows = [[f"{phase}: {what}", *columns]]
    rows += [[first, *(tally(line[c]) if c in line else "" for c in columns)] for first, line in cells.items()]
    return grid(rows)


def _bench(outcomes: Outcomes) -> str:
    measured = {phase: of(outcomes, phase) for phase in ("bench", "tier2", "baseline")}
    if not any(measured.values()):
        return ""
    from benchmarks.gpu import report

    ceilings = ceilings_of(outcomes)
    old = {o.row: o.facts for o in measured["baseline"] if "median" in o.facts}
    rows = [
        [
            "bench: " + report.roofs(ceilings),
            "ms",
            "achieved",
            "÷ ceiling",
            "contract",
            "",
            "÷ baseline",
            "rivals ÷ assay",
        ]
    ]
    for o in (o for phase in ("bench", "tier2") for o in measured[phase] if o.row != "ceilings"):
        if "median" not in o.facts:
            rows.append([o.row, o.state.upper() if o.bad else o.state])
            continue
        case = report.judged(o.facts, ceilings)
        before = old.get(o.row) if o.phase == "bench" else None
        rows.append(
            [
                o.row,
                f"{case['median']:.3f}",
                next(f"{case[unit]:,.1f} {unit}" for unit in ("GB/s", "TFLOP/s") if unit in case),
                f"{case['fraction']:.1%}" if case["fraction"] else "",
                case.get("target", ""),
                {True: "met", False: "NOT MET", None: ""}[case.get("met")],
                f"{case['median'] / before['median']:.2f}" if before else "",
                ", ".join(f"{name} {ratio:.2f}" for name, ratio in case["ratios"].items()),
            ]
        )
    decided = [report.judged(o.facts, ceilings).get("met") for o in measured["bench"] if "median" in o.facts]
    met = f"contract: {decided.count(True)} met, {decided.count(False)} not met, of {len(decided)} measured"
    return grid(rows) + "\n" + met


def ceilings_of(outcomes: Outcomes) -> Any:
    """What was measured beside the cases; None if it was not."""
    from benchmarks.gpu.ceilings import Ceilings

    found = outcomes.get(("bench", "ceilings"))
    return Ceilings(**found.facts) if found and found.state == "ok" else None


def _tests(outcomes: Outcomes) -> str:
    files: dict[str, list[Outcome]] = {}
    for o in of(outcomes, "test"):
        files.setdefault(o.row.partition("::")[0], []).append(o)
    return grid([["tests", ""], *([file, tally(found)] for file, found in files.items())]) if files else ""


def _problems(outcomes: Outcomes) -> str:
    bad = [o for o in outcomes.values() if o.phase != "run" and (o.bad or o.state == "unfinished")]
    bad += [o for o in of(outcomes, "run") if o.bad and "Error" in o.detail]  # of the phase itself
    if not bad:
        return "nothing is wrong among what ran"
    return "\n".join(
        ["what is wrong", *(f"{o.state.upper():<10} {o.phase}: {o.row}\n           {o.detail}" for o in bad)]
    )
