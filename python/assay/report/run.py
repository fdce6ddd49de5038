"""The page's section of the run itself: how fast it got on, and what it could not do."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from assay.report.charts import course
from assay.report.facts import OTHER_REASONS, Facts
from assay.report.html import Html, element, join, table
from assay.report.words import rows_of, short

_MOST_REASONS, _MOST_WARNINGS = 8, 12
_UNITS = (("days", 86400.0), ("hours", 3600.0), ("minutes", 60.0), ("seconds", 1.0))
_LEAST_TIMES = 3
_MOST_POINTS = 400


def run_section(facts: Facts) -> Html:
    """Throughput, rows in quarantine, and warnings of methods."""
    return join(*_pace(facts), *_quarantine(facts), *_warnings(facts))


def _pace(facts: Facts) -> Iterator[Html]:
    yield element("h4", "How fast")
    rate = _rate(facts)
    if rate is None:
        text = "The times of the files do not tell how fast the run was: they are all the same, or not known."
        yield element("p", text)
        return
    rows, seconds, since = rate
    text = f"{rows_of(rows)} in {duration(seconds)} {since}: {_in_words(rows / seconds)} rows per second, "
    text += "all workers together."
    gaps = [(b[0] - a[0]) for a, b in zip(facts.written[:-1], facts.written[1:], strict=True)]
    if len(gaps) >= _LEAST_TIMES:
        text += f" The longest time between two tables was {duration(max(gaps))}."
    yield element("p", text)
    if len({time for time, _ in facts.written}) >= _LEAST_TIMES:
        yield course(*_course(facts, since))
    text = "From the times at which the score tables were written; copies of files may have times of their own."
    yield element("p", text, class_="quiet")


def _rate(facts: Facts) -> tuple[int, float, str] | None:
    """Rows, the seconds that they took, and since when these are counted."""
    if not facts.written:
        return None
    first, last = facts.written[0], facts.written[-1]
    rows = sum(rows for _, rows in facts.written)
    if facts.began is not None and facts.began < first[0]:
        return rows, last[0] - facts.began, "since the run began"
    if first[0] < last[0]:  # nobody knows how long the first table took
        later = sum(rows for time, rows in facts.written if time > first[0])
        return later, last[0] - first[0], "since the first table was written"
    return None


def _course(facts: Facts, since: str) -> tuple[list[float], list[int], str]:
    """Times and rows done by then, and what the times are in."""
    written = facts.written
    start = written[0][0] if facts.began is None else min(facts.began, written[0][0])
    unit, length = next(its for its in _UNITS if written[-1][0] - start >= 2 * its[1] or its[1] == 1)
    times, rows = [0.0], [0]
    for time, count in written:
        times.append((time - start) / length)
        rows.append(rows[-1] + count)
    shown = np.unique(np.linspace(0, len(times) - 1, _MOST_POINTS).round().astype(int)).tolist()
    return [times[i] for i in shown], [rows[i] for i in shown], f"{unit} {since}"


def _in_words(rate: float) -> str:
    return f"{rate:,.0f}" if rate >= 10 else f"{rate:.2g}"


def duration(seconds: float) -> str:
    """A length of time in the two largest units that it has."""
    if seconds < 10:
        return f"{seconds:.2g} s"
    left = round(seconds)
    parts: list[str] = []
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60), ("s", 1)):
        if left >= length or parts:
            parts.append(f"{left // length} {unit}")
            left %= length
    return " ".join(parts[:2])


def _quarantine(facts: Facts) -> Iterator[Html]:
    yield element("h4", "What could not be scored")
    if not facts.quarantined:
        yield element("p", "No row is in quarantine: every row of the shards on this page has scores.")
        return
    share = 100 * facts.quarantined / facts.rows
    text = f"{rows_of(facts.quarantined)} of {facts.rows:,} ({share:.3g} %) in quarantine, each listed with its reason "
    yield element("p", text, "in the scores folder, under ", element("code", "quarantine"), ".")
    rows = [(reason, f"{count:,}") for reason, count in facts.reasons[:_MOST_REASONS]]
    if rest := sum(count for _, count in facts.reasons[_MOST_REASONS:]):
        rows.append((OTHER_REASONS, f"{rest:,}"))
    yield table(("why rows are in quarantine (N: some number)", "rows"), rows)
    if facts.shards > 1:
        lines = [
            (short(path), f"{bad:,}", f"{rows:,}", f"{100 * bad / rows:.3g} %") for path, rows, bad in facts.faulty
        ]
        yield table(("shards with most of them", "in quarantine", "rows", "share"), lines)


def _warnings(facts: Facts) -> Iterator[Html]:
    if not facts.warnings:
        return
    yield element("h4", "What the methods warn of")
    lines = [(text, f"{count:,}") for text, count in facts.warnings[:_MOST_WARNINGS]]
    if rest := len(facts.warnings) - _MOST_WARNINGS:
        lines += [(f"{rest:,} other warnings", "")] if rest > 0 else []
    yield table(("warning", "shards"), lines)
