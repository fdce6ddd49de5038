"""The page's section of rows that are there more than once, or nearly."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from assay.report.duplicates import Duplicates
from assay.report.html import Html, element, join, table
from assay.report.neighbours import Neighbours
from assay.report.rows import Shown, cards
from assay.report.words import rows_of, short

_MOST_PAIRS = 6


def twins_section(same: Duplicates | None, near: Sequence[Neighbours], shown: Mapping[int, Shown], scored: int) -> Html:
    """What is the same, and by the features of each method nearly so. ``shown``: rows by their places."""
    parts: list[Html] = []
    if same is not None:
        parts += [element("h4", "The same content"), *_same(same, shown, scored)]
    for its in near:
        parts += [element("h4", f"Near by the features of {short(its.method)}"), *_near(its, shown, scored)]
    return join(*parts)


def _same(its: Duplicates, shown: Mapping[int, Shown], scored: int) -> Iterator[Html]:
    columns = ", ".join(short(column) for column in its.columns)
    which = f"all {scored:,} rows" if its.all_rows else f"{its.rows:,} of {scored:,} rows"
    text = f"Compared are {which} by what they have in {columns}. Between texts, upper and lower case, spaces and line "
    yield element("p", text + "breaks, and variants of one character make no difference.")
    if not its.groups:
        yield element("p", "No two rows are the same.")
        return
    extra = its.repeated - its.groups
    text = f"{its.repeated:,} rows have the content of another one. Without the repeats there would be "
    text += (
        f"{rows_of(extra)} less ({100 * extra / its.rows:.3g} %). Training sees a row as often as it is there, and a "
    )
    yield element("p", text + "score that likes one of its copies likes them all.")
    if its.apart:
        text = f"In {its.apart:,} of {its.groups:,} groups the same content has different labels: not all can be right."
        yield element("p", element("strong", text))
    if not its.all_rows:
        text = "A repeat is found only where both rows were looked at: the whole corpus has more of them."
        yield element("p", text, class_="quiet")
    firsts = [(group, shown[group.places[0]]) for group in its.largest if group.places[0] in shown]
    columns_ = [element("div", element("h4", f"{group.rows:,} times"), *cards([row], None)) for group, row in firsts]
    yield element("div", element("div", *columns_, class_="ends"), class_="card")


def _near(its: Neighbours, shown: Mapping[int, Shown], scored: int) -> Iterator[Html]:
    which = f"all {scored:,} rows" if its.all_rows else f"{its.rows:,} of {scored:,} rows"
    text = f"{its.drawn:,} rows were drawn, and each was compared with {which} by the cosine of their features: 1 is "
    yield element("p", text + "the same direction. What that means for the content, the pairs below show.")
    lines = [
        (f"{level:g} or nearer", f"{count:,}", f"{100 * count / its.drawn:.3g} %") for level, count in its.near.items()
    ]
    yield table(("another row at a cosine of", "rows drawn", "share"), lines)
    pairs = [(cosine, [shown[place] for place in pair if place in shown]) for cosine, *pair in its.closest]
    apart = [(cosine, rows) for cosine, rows in pairs if len(rows) == 2 and _differ(*rows)]
    if pairs and not apart:
        yield element("p", "The nearest pairs are of rows with the same content.")
    boxes = [
        element("div", element("h4", f"cosine {cosine:.4f}"), element("div", *map(_half, rows), class_="ends"))
        for cosine, rows in apart[:_MOST_PAIRS]
    ]
    if boxes:
        yield element("p", "The nearest pairs whose content is not the same:")
        yield element("div", *boxes, class_="card")


def _differ(one: Shown, other: Shown) -> bool:
    return (one.texts, one.pictures, one.fault) != (other.texts, other.pictures, other.fault)


def _half(row: Shown) -> Html:
    return element("div", *cards([row], None))
