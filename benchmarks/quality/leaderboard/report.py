"""The board as tables in the terminal, as a figure, as JSON."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from assay._json import dumps
from benchmarks.timing import RESULTS, machine

STEM = "quality-leaderboard"
PAGE = Path(__file__).parents[3] / "docs/leaderboard.md"
PICTURE = f"![LDS and QLD of every row](../benchmarks/results/{STEM}.png)\n"
COLOURS = {"assay": "tab:blue", "peer": "tab:orange", "control": "tab:gray"}


def ranked(case: Mapping[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """Rows, the highest LDS first."""
    return sorted(case["methods"].items(), key=lambda item: -item[1]["lds"]["value"])


def show(console: Console, case: Mapping[str, Any]) -> None:
    """The board, what is compared with its peers, and what is not on it."""
    table = Table(title=_setting(case))
    columns = ["method", "LDS", "− EK-FAC", "QLD, top 1 %", "tail patch"]
    columns += ["facts: MRR, in 3"] if _has_facts(case) else []
    for column in (*columns, "s", "MB"):
        table.add_column(column, justify="left" if column == "method" else "right")
    for label, row in ranked(case):
        minus = row["minus"].get("EK-FAC")
        cells = [label, _told(row["lds"]), _told(minus["lds"]) if minus else "", _told(row["qld"], 4), _tail(row)]
        cells += [_facts(row)] if _has_facts(case) else []
        memory = row["megabytes"]
        table.add_row(*cells, f"{row['seconds']:.1f}", "" if memory is None else f"{memory:.0f}")
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
        table.add_row(label, other, _told(minus["lds"]), _told(minus["qld"], 4))
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


def _told(found: Mapping[str, Any], digits: int = 3) -> str:
    low, high = found["interval"]
    return f"{found['value']:.{digits}f} [{low:.{digits - 1}f}, {high:.{digits - 1}f}]"


def _tail(row: Mapping[str, Any]) -> str:
    return f"{row['tail']['value']:.2g}"


def _has_facts(case: Mapping[str, Any]) -> bool:
    return any("recall" in row for row in case["methods"].values())


def _facts(row: Mapping[str, Any]) -> str:
    return f"{row['recall']['mrr']:.2f}, {row['recall']['share']:.2f}"


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


def write(cases: Sequence[Mapping[str, Any]], seconds: float, some: bool) -> None:
    """Boards that were measured take the places of those that are there.

    Args:
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
        kept[case["name"]] = whole
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
    lines = [
        _setting(case),
        "",
        "| | LDS | less EK-FAC | QLD | tail patch | " + "facts | " * _has_facts(case) + "s | MB |",
    ]
    lines.append("|---" * (lines[-1].count("|") - 1) + "|")
    for label, row in ranked(case):
        name = f"*{label}*" if row["kind"] == "peer" else label
        minus = row["minus"].get("EK-FAC")
        cells = [name, _told(row["lds"]), _told(minus["lds"]) if minus else "", _told(row["qld"], 4), _tail(row)]
        cells += [_facts(row)] if _has_facts(case) else []
        cells += [f"{row['seconds']:.1f}", "" if row["megabytes"] is None else f"{row['megabytes']:.0f}"]
        lines.append("| " + " | ".join(cells) + " |")
    pairs = list(_pairs(case))
    if pairs:
        lines += ["", "| assay less a peer, paired | LDS | QLD |", "|---|---|---|"]
        lines += [f"| {a} − *{b}* | {_told(minus['lds'])} | {_told(minus['qld'], 4)} |" for a, b, minus in pairs]
    if case["absent"]:
        reasons = "; ".join(f"{label} ({reason})" for label, reason in case["absent"].items())
        lines += ["", f"Not on this board: {reasons}."]
    return "\n".join(lines) + "\n"
