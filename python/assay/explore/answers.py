"""What the page is told, as plain JSON: every text of a stranger's made visible, nothing in it markup."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from assay.explore.explorer import Explorer
from assay.report import Distribution, Shown
from assay.report.html import visible
from assay.report.words import short

_ENDS = {"high": "higher is better", "low": "lower is better"}


def facts(explorer: Explorer) -> dict[str, Any]:
    """What stays as it is while the page is open."""
    survey, scores = explorer.survey, explorer.scores
    flat = [its.column.name for its in survey.distributions if its not in explorer.shown]
    return {
        "corpus": name(scores.corpus_path),
        "rows": len(explorer.rows),
        "quarantined": sum(table.quarantined for _, table in explorer.rows.tables),
        "scores": [_score(its) for its in explorer.shown],
        "others": [name(its) for its in (*flat, *survey.wide)],
        "skipped": [name(its) for its in survey.skipped],
        "groups": [
            {"column": name(its.column), "names": [name(n) for n in its.names], "rest": its.rest, "rows": its.rows}
            for its in explorer.groupings
        ],
        "not_grouped": [f"{name(column)} {why}" for column, why in explorer.not_grouped.items()],
    }


def _score(its: Distribution) -> dict[str, Any]:
    return {
        "name": name(its.column.name),
        "keep": its.column.keep,
        "end": _ENDS.get(its.column.keep, ""),
        "description": visible(its.column.description[:600]),
        "edges": its.edges.tolist(),
        "logarithmic": its.logarithmic,
        "whole": its.whole,
        "counts": its.counts.tolist(),
        "below": its.below,
        "above": its.above,
        "minimum": its.minimum,
        "maximum": its.maximum,
        "median": its.quantiles[0.5],
        "nan": its.nan,
    }


def samples(sides: Mapping[str, Sequence[Shown]], by: str | None) -> dict[str, Any]:
    """Rows on both sides of a cut at ``by``."""
    return {side: [_sample(shown, by) for shown in rows] for side, rows in sides.items()}


def _sample(shown: Shown, by: str | None) -> dict[str, Any]:
    where = name(shown.where)
    return {
        "name": where if shown.name == shown.where else f"{name(shown.name)}  ({where})",
        "value": None if by is None else _number(shown.scores[by]),
        "pictures": [[name(column), source] for column, source in shown.pictures.items()],
        "texts": [[name(column), visible(text)] for column, text in shown.texts.items()],
        "fault": name(shown.fault),
        "scores": [[name(its), _number(value)] for its, value in shown.scores.items() if its != by],
    }


def _number(value: float) -> str:
    return f"{value:.6g}"


def name(text: str) -> str:
    """A name on one line, its beginning if it is long."""
    return visible(short(" ".join(text.split("\n"))))
