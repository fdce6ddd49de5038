"""Which labels of the data the models together take for which classes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from assay.corpus.errors import CorpusError, ShardError
from assay.corpus.layout import table_path
from assay.corpus.readers import columns_of, read
from assay.corpus.score_files import opened_table
from assay.corpus.scores_folder import Scores, State
from assay.corpus.shards import Shard

MOST_ROWS = 1_000_000
_MOST_PAIRS = 200_000
_LONGEST_LABEL = 1_000

Classes = Sequence[Any] | Mapping[Any, int] | None


@dataclass(frozen=True)
class Confusion:
    """Rows by label and predicted class.

    Attributes:
        by: the score that predicts.
        counts: rows by (label as the data has it, predicted class).
        places: by label the class that it is; none of a label of which only the models know.
        rows: of all scored ones those that were looked at; ``all_rows`` says whether these are all.
    """

    by: str
    counts: Mapping[tuple[str, int], int]
    places: Mapping[str, int]
    rows: int
    all_rows: bool

    @property
    def names(self) -> dict[int, str]:
        """By class the first label that is it."""
        return {place: label for label, place in reversed(list(self.places.items()))}

    @property
    def agree(self) -> int | None:
        """Rows whose label is the predicted class; None if of some label nobody knows which class it is."""
        if any(label not in self.places for label, _ in self.counts):
            return None
        return sum(count for (label, predicted), count in self.counts.items() if self.places[label] == predicted)

    def by_label(self) -> list[tuple[str, int]]:
        """Labels with their rows, the commonest first."""
        totals: Counter[str] = Counter()
        for (label, _), count in self.counts.items():
            totals[label] += count
        return totals.most_common()

    def most(self) -> list[tuple[str, int, int]]:
        """Label, predicted class and rows of the commonest disagreements; none where `agree` is None."""
        if self.agree is None:
            return []
        apart = [(*pair, count) for pair, count in self.counts.items() if self.places[pair[0]] != pair[1]]
        return sorted(apart, key=lambda entry: (-entry[2], entry[0], entry[1]))


def count_labels(scores: Scores, by: str, column: str, labels: Classes) -> Confusion:
    """Of up to a million rows, from the first shard on, the label in ``column`` and the class that ``by`` predicts.

    ``labels``: the recipe's, in the order of the classes, or by label its class; None: labels are classes already.
    CorpusError if the corpus has no such column now, cannot be read, or has so many labels that they are none.
    """
    counts: Counter[tuple[str, int]] = Counter()
    places: dict[str, int] = {}
    rows, done = 0, scores.of(State.DONE)
    for status in done:
        if rows == MOST_ROWS:
            break
        kept, predicted = _predictions(scores, status.shard, by, MOST_ROWS - rows)
        rows += len(kept)
        for value, class_, names in _labels(status.shard, column, kept, predicted):
            named = _named(_named(value, names), labels)
            label = str(named)
            counts[label, class_] += 1
            if label not in places and (place := _place(named, labels)) is not None:
                places[label] = place
            if len(counts) > _MOST_PAIRS or len(label) > _LONGEST_LABEL:
                raise CorpusError(f"{column} has so many or so long values that they are no classes")
    total = sum(status.table.scored for status in done if status.table)
    return Confusion(by, counts, dict(sorted(places.items(), key=lambda item: item[1])), rows, rows == total)


def _labels(
    shard: Shard, column: str, rows: npt.NDArray[np.int64], predicted: npt.NDArray[np.float32]
) -> Iterator[tuple[Any, int, Classes]]:
    """Label and predicted class of every row that has both, and the names of the shard's classes."""
    try:
        facts = columns_of(shard)
        if column not in facts:
            raise CorpusError(f"{shard.path} has no column {column} any more, which held the labels")
        for value, class_ in _labelled(shard, column, rows, predicted):
            yield value, class_, facts[column].classes
    except (ShardError, OSError) as error:
        raise CorpusError(f"{shard.path} cannot be read: {error}") from error


def _predictions(
    scores: Scores, shard: Shard, by: str, most: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
    """The first rows of a shard and their prediction, NaN where there is none."""
    rows, values, count = [np.empty(0, np.int64)], [np.empty(0, np.float32)], 0
    with opened_table(scores.store, table_path(shard)) as table:
        for batch in table.iter_batches(columns=["row", by]):
            rows.append(batch.column("row").to_numpy()[: most - count])
            values.append(batch.column(by).to_numpy(zero_copy_only=False)[: most - count])
            count += len(rows[-1])
            if count == most:
                break
    return np.concatenate(rows), np.concatenate(values)


def _labelled(
    shard: Shard, column: str, rows: npt.NDArray[np.int64], predicted: npt.NDArray[np.float32]
) -> Iterator[tuple[Any, int]]:
    """Label and predicted class of every row that has both."""
    for chunk in read(shard, [column]) if len(rows) else ():
        first, last = np.searchsorted(rows, [chunk.first, chunk.first + chunk.length])
        values = chunk.columns[column]
        for row, class_ in zip(rows[first:last].tolist(), predicted[first:last].tolist(), strict=True):
            value = values[row - chunk.first]
            if isinstance(value, float) and value.is_integer():
                value = int(value)  # nulls make floats of a column
            if class_ == class_ and value is not None and row - chunk.first not in chunk.faults:
                yield value, int(class_)
        if last == len(rows):
            return


def _named(value: Any, names: Classes) -> Any:
    """The name that a number stands for, if ``names`` are names in the order of the classes."""
    if isinstance(value, bool) or not isinstance(value, int) or not isinstance(names, Sequence) or value in names:
        return value
    return names[value] if 0 <= value < len(names) else value


def _place(label: Any, labels: Classes) -> int | None:
    """The class that a label is, as far as the recipe says."""
    if isinstance(labels, Mapping):  # JSON made texts of its keys
        return labels.get(str(label).lower() if isinstance(label, bool) else str(label))
    if labels is not None and label in labels:
        return list(labels).index(label)
    return int(label) if isinstance(label, int) else None
