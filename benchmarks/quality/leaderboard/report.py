"""The board as tables in the terminal, as a figure, as JSON."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from assay._json import dumps
from benchmarks.timing import RESULTS, machine

STEM = "quality-leaderboard"
PAGE = Path(__file__).parents[3] / "docs/leaderboard.md"
PICTURE = f"![LDS and QLD of every row](../benchmarks/results/{STEM}.png)\n"
UNMEASURED = "not measured so far"
COLOURS = {"assay": "tab:blue", "peer": "tab:orange", "control": "tab:gray"}


def ranked(case: Mapping[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """Rows, the highest LDS first."""
    return sorted(case["methods"].items(), key=lambda item: -item[1]["lds"]["value"])


def show(console: Console, case: Mapping[str, Any]) -> None:
    """The board, what is compared with its peers, and what is not on it."""
    table = Table(title=_setting(case))
    columns = _columns(case)
    for column in ("", *columns):
        table.add_column(column, justify="right" if column else "left")
    for label, row in ranked(case):
        table.add_row(label, *(cell(row) for cell in columns.values()))
    console.print(table)
    rivals(console, case)
    for label, reason in case["absent"].items():
        console.print(f"  {label}: {reason}", highlight=False)


def rivals(console: Console, case: Mapping[str, Any]) -> None:
    """Methods of assay less the peers' implementations of the same."""
    table = Table(title="assay less its peers, paired 95 % intervals")
    for column in ("method", "peer", "LDS", "QLD"):
        table.add_column(column, justify="left" if column in ("method", "peer") else "right")
    for label, other, minus in _pairs(case):
        table.add_row(label, other, _told(minus["lds"]), _told(minus.get("qld"), _digits(case)))
    if table.row_count:
        console.print(table)


def _pairs(case: Mapping[str, Any]) -> Iterator[tuple[str, str, Mapping[str, Any]]]:
    for label, row in case["methods"].items():
        for other, minus in row["minus"].items():
            if case["methods"].get(other, {}).get("kind") == "peer":
                yield label, other, minus


def _setting(case: Mapping[str, Any]) -> str:
    smooth = ", ".join(f"{s:.3f}" for s in case["metasmoothness"])
    return (
        f"{case['title']}: {case['train']} rows, {case['queries']} queries, {case['steps']} steps, "
        f"{case['drops']} drops of {case['share']:.0%}; metasmoothness {smooth}; query loss {case['query_loss']:.3f}"
    )


def _told(found: Mapping[str, Any] | None, digits: int = 3) -> str:
    if found is None:
        return "not taken"
    low, high = found["interval"]
    return f"{found['value']:.{digits}f} [{low:.{digits - 1}f}, {high:.{digits - 1}f}]"


def _columns(case: Mapping[str, Any]) -> dict[str, Callable[[Mapping[str, Any]], str]]:
    """Heading -> what a row has under it."""
    digits = _digits(case)

    def less(other: str, measure: str, digits: int) -> Callable[[Mapping[str, Any]], str]:
        return lambda row: _told(found, digits) if (found := row["minus"].get(other, {}).get(measure)) else ""

    columns = {"LDS": lambda row: _told(row["lds"]), "less EK-FAC": less("EK-FAC", "lds", 3)}
    columns["QLD"] = lambda row: _told(row.get("qld"), digits)
    if "BM25" in case["methods"]:
        columns["less BM25"] = less("BM25", "qld", digits)
    columns["tail patch"] = lambda row: f"{row['tail']['value']:.2g}"
    if any("recall" in row for row in case["methods"].values()):
        columns["facts"] = lambda row: f"{row['recall']['mrr']:.2f}, {row['recall']['share']:.2f}"
    columns["s"] = lambda row: f"{row['seconds']:.1f}"
    columns["MB"] = lambda row: "" if row["megabytes"] is None else f"{row['megabytes']:.0f}"
    return columns


def _digits(case: Mapping[str, Any]) -> int:
    """Of a QLD: what tells the board's rows apart."""
    return 4 if max((row["qld"]["value"] for row in case["methods"].values() if "qld" in row), default=0) > 0.05 else 5


def figure(cases: Sequence[Mapping[str, Any]], path: Path) -> None:
    """LDS and QLD of every row with their intervals, a pair of panels for each board."""
    import matplotlib.pyplot as plt

    height = max(len(case["methods"]) for case in cases)
    panels, axes = plt.subplots(
        1, 2 * len(cases), figsize=(7.5 * len(cases), 1 + 0.24 * height), squeeze=False, layout="constrained"
    )
    for i, case in enumerate(cases):
        rows = ranked(case)[::-1]
        for axis, measure, name in ((axes[0, 2 * i], "lds", "LDS"), (axes[0, 2 * i + 1], "qld", "QLD, top 1 %")):
            for y, (_, row) in enumerate(rows):
                if measure not in row:
                    continue
                colour = COLOURS[row["kind"]]
                axis.plot(row[measure]["interval"], [y, y], color=colour, linewidth=1.5)
                axis.plot(row[measure]["value"], y, "o", color=colour, markersize=4)
            axis.axvline(0, color="black", linewidth=0.5)
            axis.grid(axis="x", alpha=0.3)
            axis.set(xlabel=f"{name}, 95 % interval", ylim=(-0.7, len(rows) - 0.3))
            axis.set_yticks(range(len(rows)), [label for label, _ in rows] if measure == "lds" else [], fontsize=7)
        axes[0, 2 * i].set_title(case["name"])
    handles = [plt.Line2D([], [], color=colour, marker="o", label=kind) for kind, colour in COLOURS.items()]
    axes[0, 1].legend(handles=handles, fontsize=7, loc="lower right")
    panels.savefig(path, dpi=110)
    plt.close(panels)


def write(cases: Sequence[Mapping[str, Any]], seconds: float, labels: Iterable[str], some: bool) -> None:
    """Boards that were measured take the places of those that are there.

    Args:
        labels: all rows: what no one measured is named.
        some: only some rows were measured: they are put among those that are there.

    Raises:
        SystemExit: some rows, and the others that are there are of another bank.
    """
    path = RESULTS / f"{STEM}.json"
    kept = {case["name"]: case for case in json.loads(path.read_text())["cases"]} if path.exists() else {}
    for case in cases:
        whole = {**case, "machine": machine()}
        if some and (there := kept.get(case["name"])) is not None:
            if there["bank"] != case["bank"]:
                raise SystemExit(
                    f"{path.name}: {case['name']!r} is there with bank {there['bank']}, and these rows are of bank "
                    f"{case['bank']}; measure all of it first"
                )
            absent = {label: why for label, why in there["absent"].items() if label not in case["methods"]}
            methods = {label: row for label, row in there["methods"].items() if label not in case["absent"]}
            whole = {**there, "absent": absent | case["absent"], "methods": methods | case["methods"]}
        unknown = {label: UNMEASURED for label in labels if label not in whole["methods"]}
        kept[case["name"]] = {**whole, "absent": unknown | whole["absent"]}
    path.write_text(dumps({"seconds": round(seconds, 1), "cases": list(kept.values())}, indent=1) + "\n")
    figure(list(kept.values()), path.with_suffix(".png"))
    page(list(kept.values()))


# ---- The page


def page(cases: Sequence[Mapping[str, Any]]) -> None:
    """Put each board's tables between the page's marks for it, if it has some."""
    text = PAGE.read_text(encoding="utf-8")
    if PICTURE not in text:
        text = text.replace("<!-- figure -->\n", f"<!-- figure -->\n{PICTURE}")
    for case in cases:
        begin, end = f"<!-- {case['name']} -->\n", f"<!-- end of {case['name']} -->"
        if begin in text:
            before, rest = text.split(begin)
            text = before + begin + markdown(case) + end + rest.split(end)[1]
    PAGE.write_text(text, encoding="utf-8")


def markdown(case: Mapping[str, Any]) -> str:
    """A board: its setting in a line, its rows, what is compared with peers, what is not on it."""
    columns = _columns(case)
    lines = [_setting(case), "", "| " + " | ".join(["", *columns]) + " |", "|---" * (1 + len(columns)) + "|"]
    for label, row in ranked(case):
        name = f"*{label}*" if row["kind"] == "peer" else label
        lines.append("| " + " | ".join([name, *(cell(row) for cell in columns.values())]) + " |")
    pairs = list(_pairs(case))
    if pairs:
        lines += ["", "| assay less a peer, paired | LDS | QLD |", "|---|---|---|"]
        lines += [
            f"| {a} − *{b}* | {_told(minus['lds'])} | {_told(minus.get('qld'), _digits(case))} |"
            for a, b, minus in pairs
        ]
    later = [label for label, reason in case["absent"].items() if reason == UNMEASURED]
    if reasons := [f"{label} ({reason})" for label, reason in case["absent"].items() if label not in later]:
        lines += ["", f"Not on this board: {'; '.join(reasons)}."]
    if later:
        lines += ["", f"Not measured so far: {'; '.join(later)}."]
    return "\n".join(lines) + "\n"
