"""The page: sections put together from what was found, in elements of `assay.report.html` alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone

import numpy as np

from assay._json import dumps
from assay._version import __version__
from assay.report.charts import histogram
from assay.report.confusion import Confusion
from assay.report.duplicates import Duplicates
from assay.report.facts import Facts
from assay.report.groups import Groups
from assay.report.html import Html, element, join, table
from assay.report.kinds import kinds_section
from assay.report.neighbours import Neighbours
from assay.report.output import MARK
from assay.report.relations import Matrix, overlaps, rank_correlations
from assay.report.rows import Ends, Shown, labels_section, samples_section
from assay.report.run import run_section
from assay.report.style import heat, style
from assay.report.surveying import QUANTILES, Column, Cut, Distribution, Survey
from assay.report.twins import twins_section
from assay.report.words import in_digits, percent, rows_of, short

# Neither scripts nor anything from elsewhere; images are the page's own.
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
_ENDS = {
    "high": "Higher is better: a selection keeps the high end.",
    "low": "Lower is better: a selection keeps the low end.",
}
_NEITHER = "Neither end is better: the number describes a row and does not rank it."
_QUANTILE_WORDS = {share: f"{100 * share:g} %" for share in QUANTILES}
_MOST_LEFT_OUT, _MOST_RECIPE = 8, 20_000


@dataclass(frozen=True)
class Page:
    """What the page says."""

    facts: Facts
    survey: Survey
    ends: Sequence[Ends] = ()
    random: Sequence[Shown] = ()
    confusion: Confusion | str | None = None
    """Or why there is none, where an ensemble predicts."""
    groups: Sequence[Groups] = ()
    not_grouped: Mapping[str, str] = field(default_factory=dict)
    duplicates: Duplicates | None = None
    neighbours: Sequence[Neighbours] = ()
    twins: Mapping[int, Shown] = field(default_factory=dict)
    """The rows that ``duplicates`` and ``neighbours`` name, by their places."""

    def to_html(self) -> str:
        """All of it. ImportError without matplotlib."""
        sections = list(self._sections())
        contents = [
            element("li", element("a", title, href=f"#{anchor}"), self._below(anchor)) for anchor, title, _ in sections
        ]
        head = join(
            element("meta", http_equiv="Content-Security-Policy", content=_POLICY),
            element("meta", name="viewport", content="width=device-width, initial-scale=1"),
            element("title", f"Scores of {short(self.facts.corpus)}"),
            element("style", style()),
        )
        body = join(
            element("header", *_head(self.facts, self.survey), element("nav", element("ol", *contents))),
            element("main", *(element("section", element("h2", t), its, id=anchor) for anchor, t, its in sections)),
        )
        return f"{MARK}{head}</head><body>{body}</body></html>\n"

    def _sections(self) -> Iterator[tuple[str, str, Html]]:
        yield "made", "What was scored, and how", _made(self.facts, self.survey)
        yield "run", "How the run went", run_section(self.facts)
        if not self.survey.distributions:
            return
        places = {ends.by: i for i, ends in enumerate(self.ends, start=1)}
        yield "scores", "The scores, one by one", _scores(self.survey, places)
        if self.survey.rows and len(self.survey.distributions) > 1:
            yield "relations", "How the scores relate to each other", _relations(self.survey)
        if self.survey.rows:
            yield "cuts", "What a cut keeps", _cuts(self.survey)
        if self.survey.rows and (self.groups or self.not_grouped):
            yield "kinds", "Kinds of rows", kinds_section(self.groups, self.not_grouped, self.survey)
        if self.ends or self.random:
            yield "samples", "Rows of the data: best, worst and random", samples_section(self.ends, self.random)
        if self.confusion is not None:
            yield "labels", "Labels against the models' predictions", labels_section(self.confusion)
        if self.duplicates is not None or self.neighbours:
            its = twins_section(self.duplicates, self.neighbours, self.twins, self.survey.rows)
            yield "twins", "Rows that are there more than once", its

    def _below(self, anchor: str) -> Html:
        names = [its.column.name for its in self.survey.distributions] if anchor == "scores" else []
        links = (element("li", element("a", short(n), href=f"#score-{i}")) for i, n in enumerate(names, start=1))
        return element("ul", *links) if names else Html("")


def _head(facts: Facts, survey: Survey) -> Iterator[Html]:
    yield element("h1", f"Scores of {short(facts.corpus)}")
    yield element(
        "p",
        "assay reads a collection of training data and gives every row scores: numbers that say how useful the row is "
        "likely to be for training, or how suspicious. This page shows what the numbers look like, what would be kept "
        "by them, and the rows at either end, so that you can judge whether a score deserves your trust.",
    )
    tiles = {
        "rows scored": f"{survey.rows:,}",
        "rows in quarantine": f"{facts.quarantined:,}",
        "shards (files)": f"{facts.shards:,}",
        "scores per row": f"{len(survey.distributions):,}",
    }
    yield element("dl", *(element("div", element("dt", k), element("dd", v)) for k, v in tiles.items()), class_="tiles")


def _made(facts: Facts, survey: Survey) -> Html:
    parts = [
        element(
            "p",
            f"Of {facts.rows:,} rows {survey.rows:,} have scores and {facts.quarantined:,} are in quarantine: rows "
            "that could not be scored.",
        )
    ]
    if survey.skipped:
        total, named = len(survey.distributions) + len(survey.skipped), ", ".join(map(short, survey.skipped[:12]))
        more = f" and {len(survey.skipped) - 12:,} more" if len(survey.skipped) > 12 else ""
        text = f"This page shows {len(survey.distributions):,} of {total:,} scores. Not on it: {named}{more}; "
        parts.append(element("p", text, element("code", "assay report --by SCORE"), " chooses which are."))
    if lacking := {its.column.name: its.nan for its in survey.distributions if its.nan}:
        rows = [(short(name), f"{count:,}") for name, count in lacking.items()]
        parts.append(table(("score", "rows without a number (NaN)"), rows))
    if facts.left_out:
        some = [(short(path), short(why)) for path, why in list(facts.left_out.items())[:_MOST_LEFT_OUT]]
        text = f"{len(facts.left_out):,} of {facts.shards:,} shards are not on this page, because they have no scores "
        parts.append(element("p", text + "that belong to them as they are now:"))
        parts.append(table(("shard", "why"), some, "words"))
    parts.append(element("h4", "Made by"))
    parts.append(table(("what", "value"), [(name, short(value)) for name, value in _makers(facts)], "words"))
    recipe = dumps(facts.recipe, indent=2, ensure_ascii=False)
    cut = recipe if len(recipe) <= _MOST_RECIPE else recipe[:_MOST_RECIPE] + "\n…"
    parts.append(element("details", element("summary", "The recipe in full"), element("pre", cut)))
    return join(*parts)


def _makers(facts: Facts) -> Iterator[tuple[str, str]]:
    methods = facts.recipe.get("methods")
    named = [str(its.get("method")) for its in methods if isinstance(its, dict)] if isinstance(methods, list) else []
    task = facts.recipe.get("task")
    if named:
        yield "methods", ", ".join(named)
    if isinstance(task, dict) and "kind" in task:
        yield "task", str(task["kind"])
    for name, digest in facts.models.items():
        yield f"model {short(name)}", _digest(digest)
    yield "recipe", _digest(facts.recipe_hash)
    yield "corpus", facts.corpus
    yield "scores folder", facts.folder
    if facts.written:
        first, last = (_time(facts.written[i][0]) for i in (0, -1))
        yield "scored", first if first == last else f"{first} to {last}"
    if facts.versions:
        yield "scored by", f"assay {', '.join(facts.versions)}"
    yield "this page by", f"assay {__version__}, {_time(datetime.now(timezone.utc).timestamp())}"


def _digest(digest: str) -> str:
    """Enough of a hash to tell it by."""
    kind, colon, its = digest.rpartition(":")
    return f"{kind}{colon}{its[:12]}{'…' if len(its) > 12 else ''}"


def _time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, timezone.utc).strftime("%Y-%m-%d %H:%M UTC")


def _scores(survey: Survey, places: Mapping[str, int]) -> Html:
    cards = [_score(its, i, places.get(its.column.name)) for i, its in enumerate(survey.distributions, start=1)]
    parts = [
        element(
            "p",
            "Each chart counts all rows. Dashed lines mark three quantiles: 10 %, 50 % (the median) and 90 % of the "
            "rows lie to their left. The numbers below a chart say at which score so many per cent of the rows end.",
        ),
        element("div", *cards, class_="cards"),
    ]
    if survey.wide:
        names = ", ".join(short(name) for name in survey.wide)
        parts.append(element("p", f"Several numbers per row, and not charted: {names}.", class_="quiet"))
    return join(*parts)


def _score(its: Distribution, number: int, place: int | None) -> Html:
    column = its.column
    parts = [element("h3", short(column.name))]
    if column.description:
        parts.append(element("p", column.description[:600]))
    parts.append(element("p", _ENDS.get(column.keep, _NEITHER)))
    if its.nan:
        share = 100 * its.nan / its.rows
        parts.append(
            element("p", f"No number (NaN) for {rows_of(its.nan)} ({share:.3g} %), which no chart or cut has.")
        )
    if not its.numbers:
        parts.append(element("p", "There is no number to chart." if its.rows else "There is no row."))
    elif its.minimum == its.maximum:
        text = f"All {its.numbers:,} numbers are {in_digits(its.minimum)}: this score tells no row from another."
        parts.append(element("p", text))
    else:
        parts += [histogram(its, number), *_tails(its), _quantiles(its)]
        if its.logarithmic:
            parts.append(element("p", "The scale below the chart is logarithmic.", class_="quiet"))
    if place is not None:
        parts.append(element("p", element("a", "Its best and worst rows", href=f"#sample-{place}"), class_="quiet"))
    return element("article", *parts, class_="card", id=f"score-{number}")


def _tails(its: Distribution) -> Iterator[Html]:
    low, high = float(its.edges[0]), float(its.edges[-1])
    tails = [f"left of it {rows_of(its.below)}, down to {in_digits(its.minimum)}"] if its.below else []
    tails += [f"right of it {rows_of(its.above)}, up to {in_digits(its.maximum)}"] if its.above else []
    if tails:
        text = f"The chart shows {low:.4g} to {high:.4g}, where most rows are; {', '.join(tails)}."
        yield element("p", text, class_="quiet")


def _quantiles(its: Distribution) -> Html:
    held = {"least": its.minimum}
    held |= {_QUANTILE_WORDS[share]: value for share, value in its.quantiles.items()}
    held["greatest"] = its.maximum
    boxes = (element("div", element("dt", name), element("dd", f"{value:.4g}")) for name, value in held.items())
    return element("dl", *boxes, class_="quantiles")


def _relations(survey: Survey) -> Html:
    columns = [its.column for its in survey.distributions]
    correlations = rank_correlations(survey.sample.scores)
    return join(
        element(
            "p",
            "Rank correlation (Spearman's ρ): 1 where two scores put the rows in the same order, −1 in the opposite "
            "one, 0 where one says nothing of the other. Blue is above zero, orange below. Two scores near 1 or −1 are "
            "one opinion, not two.",
        ),
        _matrix(columns, correlations, "ρ"),
        _sampled(survey),
    )


def _sampled(survey: Survey) -> Html:
    rows = len(survey.sample.places)
    if rows == survey.rows:
        return element("p", f"Computed on all {rows:,} rows.", class_="quiet")
    text = f"Computed on {rows:,} rows that were drawn uniformly, with a fixed seed, from all {survey.rows:,}."
    return element("p", text, class_="quiet")


def _matrix(columns: Sequence[Column], values: Matrix, corner: str) -> Html:
    lines = []
    for i, (column, line) in enumerate(zip(columns, values.tolist(), strict=True), start=1):
        cells = (element("td", "–" if np.isnan(value) else _hundredths(value), class_=heat(value)) for value in line)
        lines.append((f"{i}  {short(column.name)}", *cells))
    return table((corner, *(str(i) for i in range(1, len(columns) + 1))), lines, "matrix")


def _hundredths(value: float) -> str:
    return f"{value if abs(value) >= 0.005 else 0.0:.2f}".replace("-", "−")


def _cuts(survey: Survey) -> Html:
    shown = [its for its in survey.distributions if its.numbers]
    if not shown:
        return element("p", "No score has a number to cut at.")
    first = shown[0].cuts
    heads = (join(percent(cut.share), element("span", f"{cut.rows:,} rows", class_="small")) for cut in first)
    rows = [(short(its.column.name), *(_cut(cut, its.column) for cut in its.cuts)) for its in shown]
    parts = [
        element(
            "p",
            "From which score on a row is among the best so many per cent of all rows; ",
            element("code", "assay select --top"),
            " keeps the same ones. Where rows share that score, so that more have it or a better one, their number "
            "stands below it.",
        ),
        table(("keep the best", *heads), rows),
    ]
    ranked = [its.column for its in survey.distributions if its.column.keep in ("high", "low")]
    if any(its.column not in ranked for its in shown):
        text = "Of a score that is better at neither end, ≥ means its high end here."
        parts.append(element("p", text, class_="quiet"))
    if len(ranked) > 1:
        parts += [
            element("h4", "Do two scores keep the same rows?"),
            element(
                "p",
                "Rows that are in the best half by both scores, as a share of those that are by either (Jaccard's "
                "index). 1: both keep the same half. About 0.33: no more in common than chance. 0: opposite halves.",
            ),
            _matrix(ranked, overlaps(survey.sample.scores, ranked), "overlap"),
            _sampled(survey),
        ]
    return join(*parts)


def _cut(cut: Cut, column: Column) -> Html:
    if cut.threshold is None:
        return element("td", "–")
    sign = "≤" if column.keep == "low" else "≥"
    ties = cut.at_threshold - cut.rows
    note = element("span", f"{cut.at_threshold:,} rows", class_="small") if ties else Html("")
    return element("td", f"{sign} {in_digits(cut.threshold)}", note)
