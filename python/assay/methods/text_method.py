"""What methods that look at texts alone have in common: no model runs, the sample's own column is the signal."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor

from assay.methods.base import Column, Method, Need, Views
from assay.methods.parts import State, states
from assay.methods.sums import Folded, samples_left_out
from assay.methods.targets import Targets, TargetSet
from assay.ops import NGramCounts, NGramHashes, Terms, ngram_counts, ngram_hashes
from assay.ops.ngrams import Texts, are_texts, check_settings
from assay.probe import Signals

if TYPE_CHECKING:
    from typing_extensions import Self

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Count = Callable[[NGramCounts], Ints]


class TextMethod(Method):
    """A score per target from the n-grams of a text, fitted to the targets' texts and to a sample of the pool's.

    A text without a single token, and what is no text, has no score: NaN; in ``fit`` it is left out.
    """

    uses_pool: ClassVar[bool] = True
    kind: ClassVar[str]
    """What descriptions of columns begin with."""

    def __init__(self, targets: Targets, text_column: str | None, order: int, punctuation: bool, name: str) -> None:
        check_settings(order, 0)
        self.name = name
        self.text_column = "text" if text_column is None else text_column
        self.order, self.punctuation = order, punctuation
        self.targets = TargetSet(name, targets).required()
        self._fitted: Any = None
        self._of_pool, self._of_targets = Folded(), Folded()  # texts that fit() went through

    @property
    def columns(self) -> Sequence[Column]:
        return self.targets.columns(self.kind)

    def needs(self) -> Mapping[str, Need]:
        return {"text": Need(raw=[self.text_column])}

    def fit(self, pool: Iterable[Any] = ()) -> Self:
        """Learn from the targets' texts and the pool's.

        Args:
            pool: batches with the raw column, as the targets are: ``methods.Views``. Gone through once.

        Raises:
            ValueError: a target or the pool without a text that has a token, or a batch without the column.
        """
        targets = {name: list(self._texts(batches)) for name, batches in self.targets.batches.items()}
        of_targets = Folded()
        for name, own in targets.items():
            if not sum(note(of_targets, np.diff(self._hashes(texts).offsets)) for texts in own):
                raise self._wordless(f"target {name!r}")
        self._fitted, self._of_pool = self._learn(targets, pool)
        self._of_targets = of_targets
        return self

    def score(self, signals: Mapping[str, Signals]) -> dict[str, Tensor]:
        if self._fitted is None:
            raise RuntimeError(f"{self.name}: call fit() before scoring")
        texts = known_texts(signals["text"].raw[self.text_column])
        values, lengths = self._values(texts, self._fitted)
        values[lengths == 0] = np.nan
        return self.targets.scores(torch.from_numpy(values))

    @abstractmethod
    def _learn(self, targets: Mapping[str, Sequence[Texts]], pool: Iterable[Any]) -> tuple[Any, Folded]:
        """What scores are made with, from batches of texts by target, and those of the pool, which may have no word;
        and what the pool's are."""

    def metadata(self) -> dict[str, str]:
        return {
            "left_out": samples_left_out(self._of_pool),
            "targets_left_out": samples_left_out(self._of_targets),
        }

    @abstractmethod
    def _values(self, texts: Texts, fitted: Any) -> tuple[Floats, NDArray[np.int64]]:
        """(B, targets), and how many n-grams each text has."""

    def _total(self, batches: Iterable[Any], features: int | Terms, count: Count) -> tuple[Ints, Folded]:
        """As ``_summed``, of the texts of all batches."""

        def part(batches: Iterable[Any], first: int) -> State:
            total, folded = self._summed(self._texts(batches), features, count)
            return {"total": torch.from_numpy(total), "folded": folded.state()}

        total, folded = self._summed([], features, count)
        for state in states(batches, part):
            total = total + state["total"].numpy()
            folded.join(state["folded"])
        return total, folded

    def _summed(self, batches: Iterable[Texts], features: int | Terms, count: Count) -> tuple[Ints, Folded]:
        """What ``count`` gives of texts' n-grams, integers, added up; and what the texts are."""
        total, folded = count(self._counts([], features)), Folded()
        for texts in batches:
            counts = self._counts(texts, features)
            note(folded, counts.lengths)
            total = total + count(counts)
        return total, folded

    def _wordless(self, what: str) -> ValueError:
        return ValueError(f"{self.name}: {what} has no text with a word in {self.text_column!r}")

    def _hashes(self, texts: Texts) -> NGramHashes:
        return ngram_hashes(texts, self.order, punctuation=self.punctuation)

    def _counts(self, texts: Texts, features: int | Terms) -> NGramCounts:
        return ngram_counts(texts, features, self.order, punctuation=self.punctuation)

    def _texts(self, batches: Iterable[Any]) -> Iterator[Texts]:
        for batch in batches:
            if not isinstance(batch, Views) or self.text_column not in batch.raw:
                raise ValueError(
                    f"{self.name}: a batch without the raw column {self.text_column!r}; "
                    f"expected methods.Views(main, raw={{{self.text_column!r}: [...]}})"
                )
            yield known_texts(batch.raw[self.text_column])


def note(folded: Folded, lengths: Ints) -> int:
    """Note texts, by how many n-grams each has: a fit leaves those without any out -> how many are left."""
    without = int((lengths == 0).sum())
    folded.samples += len(lengths)
    folded.broken_samples += without
    return len(lengths) - without


def known_texts(values: Any) -> Texts:
    """The values of a list or an array, None in place of those that are no texts."""
    if are_texts(values):
        return values
    values = values.to_pylist() if isinstance(values, pa.Array | pa.ChunkedArray) else values
    return [value if isinstance(value, str | bytes) else None for value in values]
