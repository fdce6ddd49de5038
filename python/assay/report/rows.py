"""The page's sections with rows of the corpus: those at the ends of each score, and labels against predictions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from assay.report.confusion import Confusion
from assay.report.html import Html, element, join, table
from assay.report.style import heat
from assay.report.words import in_digits, short

_MOST_CLASSES, _MOST_CONFUSED = 20, 12


@dataclass(frozen=True)
class Shown:
    """A row of the corpus as it is shown.

    Attributes:
        name: its id; where: shard and row.
        scores: all of them.
        texts: by column, and pictures: by column a data URI of our own making.
        fault: why something of it cannot be shown.
    """

    name: str
    where: str
    scores: Mapping[str, float]
    texts: Mapping[str, str] = field(default_factory=dict)
    pictures: Mapping[str, str] = field(default_factory=dict)
    fault: str = ""


@dataclass(frozen=True)
class Ends:
    """The best and the worst rows by a score; of one that is better at neither end, the highest and the lowest."""

    by: str
    keep: str
    best: Sequence[Shown]
    worst: Sequence[Shown]


def samples_section(by_score: Sequence[Ends], drawn: Sequence[Shown]) -> Html:
    """Rows at both ends of scores, and ``drawn`` ones."""
    parts = [
        element(
            "p",
            "The rows themselves, as they are in the data, shortened. A good score has rows at its best end that you "
            "would keep and rows at its worst end that you would not.",
        )
    ]
    for i, ends in enumerate(by_score, start=1):
        names = ("Best", "Worst") if ends.keep in ("high", "low") else ("Highest", "Lowest")
        halves = [
            element("div", element("h4", name), *cards(rows, ends.by), class_=kind)
            for name, rows, kind in ((names[0], ends.best, "best"), (names[1], ends.worst, "worst"))
        ]
        both = element("div", *halves, class_="ends")
        parts.append(element("article", element("h3", short(ends.by)), both, class_="card", id=f"sample-{i}"))
    if drawn:
        text = "Drawn uniformly with a fixed seed, the same for every score: what the data is like as a whole."
        columns = element("div", *(element("div", card) for card in cards(drawn, None)), class_="ends")
        parts.append(element("article", element("h3", "Random rows"), element("p", text), columns, class_="card"))
    return join(parts[0], element("div", *parts[1:], class_="stack"))


def cards(rows: Sequence[Shown], by: str | None) -> Iterator[Html]:
    """Rows of the corpus, under their score ``by`` if there is one."""
    if not rows:
        yield element("p", "No row has a number.", class_="quiet")
    for shown in rows:
        yield element("div", *_card(shown, by), class_="sample")


def _card(shown: Shown, by: str | None) -> Iterator[Html]:
    value = [element("span", in_digits(shown.scores[by]), class_="value"), Html("&ensp;")] if by is not None else []
    name = shown.where if shown.name == shown.where else f"{short(shown.name)}  ({short(shown.where)})"
    yield element("div", *value, element("span", name, class_="id"))
    for column, source in shown.pictures.items():
        yield element("div", short(column), class_="column")
        yield element("img", src=source, alt="")
    for column, text in shown.texts.items():
        yield element("div", short(column), class_="column")
        yield element("div", text, class_="text")
    if shown.fault:
        yield element("p", f"Not shown: {short(shown.fault)}", class_="quiet")
    others = "\n".join(f"{short(name)}  {value:.6g}" for name, value in shown.scores.items() if name != by)
    if others:
        what = "its scores" if by is None else "its other scores"
        yield element("details", element("summary", what), element("div", others, class_="text"), class_="column")


def labels_section(confusion: Confusion | str) -> Html:
    """How often the predicted class is the label, and which classes are taken for which; or why nobody can tell."""
    if isinstance(confusion, str):
        return element("p", f"The models' predictions cannot be compared with labels: {confusion}.")
    total, agree = sum(confusion.counts.values()), confusion.agree
    which = f"all {confusion.rows:,} rows" if confusion.all_rows else f"the first {confusion.rows:,} rows"
    text = f"Counted over {which}, of which {total:,} have a label and a prediction ({short(confusion.by)}). "
    if agree is None:
        text += "Which class a label is, only the models know; so the classes are numbers."
    else:
        text += f"In {agree:,} of them ({100 * agree / max(total, 1):.3g} %) the models together predict the label."
    names = confusion.names if agree is not None else {}
    parts = [element("p", text)]
    labels = [label for label, _ in confusion.by_label()]
    classes = sorted({predicted for _, predicted in confusion.counts} | set(confusion.places.values()))
    if labels and len(labels) <= _MOST_CLASSES and len(classes) <= _MOST_CLASSES:
        ordered = sorted(labels, key=lambda label: confusion.places.get(label, len(classes)))
        parts.append(_confusion_matrix(confusion, ordered, classes, names))
    if most := confusion.most()[:_MOST_CONFUSED]:
        rows = [(short(label), short(names.get(its, str(its))), f"{count:,}") for label, its, count in most]
        text = "Where they disagree, the label may be wrong, the models may be, or two classes are hard to tell apart."
        parts += [
            element("h4", "The commonest disagreements"),
            element("p", text),
            table(("label in the data", "predicted", "rows"), rows),
        ]
    return join(*parts)


def _confusion_matrix(
    confusion: Confusion, labels: Sequence[str], classes: Sequence[int], names: Mapping[int, str]
) -> Html:
    totals = dict(confusion.by_label())
    rows = []
    for label in labels:
        counts = [confusion.counts.get((label, predicted), 0) for predicted in classes]
        cells = (element("td", f"{count:,}", class_=heat(count / totals[label])) for count in counts)
        rows.append((short(label), *cells, f"{totals[label]:,}"))
    heads = (short(names.get(predicted, str(predicted))) for predicted in classes)
    return table(("label ↓  predicted →", *heads, "rows"), rows, "matrix")
