"""The page's section of the kinds of rows: where each label, source or language stands by the scores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from assay.report.groups import NOT_READ, NOTHING, Groups
from assay.report.html import Html, element, join, table
from assay.report.style import heat
from assay.report.surveying import Column, Floats, Survey
from assay.report.words import short

MOST_VALUES = 16
LEAST_ROWS = 5


def kinds_section(groups: Sequence[Groups], refused: Mapping[str, str], survey: Survey) -> Html:
    """A table for each column."""
    columns = [its.column for its in survey.distributions if its.minimum < its.maximum]
    parts = [
        element(
            "p",
            "Where the rows of each kind stand among all rows, by each score: 50 is like all the others, 100 would be "
            "above every other row, 0 below. Blue is high, orange low. A score whose numbers differ much from kind to "
            "kind keeps or drops whole kinds, whatever it says of single rows.",
        )
    ]
    for its in groups:
        parts += [element("h3", f"By {short(its.column)}"), _kinds(its, survey, columns), _looked(its, survey)]
    if refused:
        lines = [f"{short(column)} {why}" for column, why in refused.items()]
        parts.append(element("p", f"Not shown, for it is no grouping: {'; '.join(lines)}.", class_="quiet"))
    return join(*parts)


def _kinds(its: Groups, survey: Survey, columns: Sequence[Column]) -> Html:
    counts = np.bincount(its.codes[its.codes >= 0], minlength=len(its.names)).tolist()
    sampled = its.codes[survey.sample.places]
    known = sampled != NOT_READ
    ranks = {column.name: standing(survey.sample.scores[column.name], known) for column in columns}
    entries = [(name, sampled == i, counts[i]) for i, name in enumerate(its.names[:MOST_VALUES])]
    if rest := its.names[MOST_VALUES:]:
        entries.append((f"{len(rest):,} others", sampled >= MOST_VALUES, sum(counts[MOST_VALUES:])))
    if nothing := int(np.count_nonzero(its.codes == NOTHING)):
        entries.append(("(no value)", sampled == NOTHING, nothing))
    lines = [
        (short(name), f"{count:,}", *(_cell(ranks[column.name][inside]) for column in columns))
        for name, inside, count in entries
    ]
    return table((short(its.column), "rows", *(short(column.name) for column in columns)), lines, "matrix kinds")


def standing(values: Floats, among: npt.NDArray[np.bool_]) -> npt.NDArray[np.float64]:
    """Of each value the share of the others ``among`` them that are smaller, equal ones by half, in per cent; NaN where
    there is no number, or it is not among them."""
    held = among & ~np.isnan(values)
    found = np.full(len(values), np.nan)
    if held.sum() > 1:
        _, places, counts = np.unique(values[held], return_inverse=True, return_counts=True)
        below = np.cumsum(counts) - counts
        found[held] = 100 * (below + (counts - 1) / 2)[places] / (held.sum() - 1)
    return found


def _cell(ranks: npt.NDArray[np.float64]) -> Html:
    held = ranks[~np.isnan(ranks)]
    if len(held) < LEAST_ROWS:
        return element("td", "–")
    mean = float(held.mean())
    return element("td", f"{mean:.0f}", class_=heat((mean - 50) / 50))


def _looked(its: Groups, survey: Survey) -> Html:
    read, sampled = its.read, int(np.count_nonzero(its.codes[survey.sample.places] != NOT_READ))
    which = f"all {survey.rows:,} rows" if read == survey.rows else f"{read:,} of {survey.rows:,} rows"
    text = f"Counted over {which}; where they stand is that of {sampled:,} of these, drawn uniformly. "
    text = f"Computed on {which}. " if sampled == read else text
    return element("p", f"{text}–: fewer than {LEAST_ROWS} rows of that kind are among these.", class_="quiet")
