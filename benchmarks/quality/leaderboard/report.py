"""The board as tables in the terminal, as a figure, as JSON."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from assay._json import dumps
from benchmarks.timing import RESULTS, machine, read

STEM = "quality-leaderboard"
DOCS = Path(__file__).parents[3] / "docs"
PAGES = ("leaderboard.md", "methods/magic.md", "methods/source.md")
MARK = re.compile(r"(<!-- (?P<board>[\w-]+)(?:: (?P<labels>[^\n]*))? -->\n).*?(<!-- end of (?P=board) -->)", re.DOTALL)
PICTURE = f"![LDS and QLD of every row](../benchmarks/results/{STEM}.png)\n"
UNMEASURED = "not measured so far"
NOT_TAKEN = "not taken"
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
        return NOT_TAKEN
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

    height, across = max(len(case["methods"]) for case in cases), min(2, len(cases))
    down = -(-len(cases) // across)
    size = (7.5 * across, down * (1 + 0.24 * height))
    panels, axes = plt.subplots(down, 2 * across, figsize=size, squeeze=False, layout="constrained")
    pairs = axes.reshape(-1, 2)
    for pair in pairs[len(cases) :]:
        for axis in pair:
            axis.set_axis_off()
    for case, pair in zip(cases, pairs, strict=False):
        rows = ranked(case)[::-1]
        for axis, measure, name in zip(pair, ("lds", "qld"), ("LDS", "QLD, top 1 %"), strict=True):
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
        pair[0].set_title(case["name"])
    handles = [plt.Line2D([], [], color=colour, marker="o", label=kind) for kind, colour in COLOURS.items()]
    pairs[0][1].legend(handles=handles, fontsize=7, loc="lower right")
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
    kept = {case["name"]: case for case in read(path)["cases"]} if path.exists() else {}
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
            methods |= case["methods"]
            whole = {**there, "larger": case["larger"], "absent": absent | case["absent"], "methods": methods}
        unknown = {label: UNMEASURED for label in labels if label not in whole["methods"]}
        kept[case["name"]] = {**whole, "absent": unknown | whole["absent"]}
    path.write_text(dumps({"seconds": round(seconds, 1), "cases": list(kept.values())}, indent=1) + "\n")
    figure(list(kept.values()), path.with_suffix(".png"))
    for page in PAGES:
        text = (DOCS / page).read_text(encoding="utf-8")
        (DOCS / page).write_text(filled(text, kept), encoding="utf-8")


# ---- The pages


def filled(page: str, cases: Mapping[str, Mapping[str, Any]]) -> str:
    """A page with the boards' tables between its marks: whole ones after ``<!-- board -->``, and after
    ``<!-- board: label; label -->`` these rows with larger drops."""

    def fill(found: re.Match[str]) -> str:
        begin, board, labels, end = found.groups()
        if board not in cases:
            return found[0]
        table = markdown(cases[board]) if labels is None else excerpt(cases[board], labels.split("; "))
        return begin + table + end

    if PICTURE not in page:
        page = page.replace("<!-- figure -->\n", f"<!-- figure -->\n{PICTURE}")
    return MARK.sub(fill, page)


def excerpt(case: Mapping[str, Any], labels: Sequence[str]) -> str:
    """A board's setting in a line, and some of its rows: LDS of small and of larger drops, QLD, seconds."""
    larger = case.get("larger", ())  # a board, and a row, that was measured before has none
    columns = ["", *(f"LDS, {share:.0%} dropped" for share in (case["share"], *larger)), "QLD", "s"]
    lines = [_setting(case), "", "| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    rows = dict(ranked(case))
    if unknown := [label for label in labels if label not in rows]:
        raise ValueError(f"{case['name']}: no row {unknown[0]!r}; expected some of {list(rows)}")
    for label in (label for label in rows if label in labels):
        row = rows[label]
        found = [row["lds"], *(row.get("larger", {}).get(f"{share:g}") for share in larger)]
        cells = [label, *(_told(each) if each else "" for each in found)]
        cells += [f"{row['qld']['value']:.3f}" if "qld" in row else NOT_TAKEN, f"{row['seconds']:.1f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


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
