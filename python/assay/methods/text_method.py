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
from assay.methods.targets import Targets, TargetSet
from assay.ops import NGramCounts, NGramHashes, Terms, ngram_counts, ngram_hashes
from assay.ops.ngrams import Texts, are_texts, check_settings
from assay.probe import Signals

if TYPE_CHECKING:
    from typing_extensions import Self

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


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
        for name, own in targets.items():
            if not any(self._hashes(texts).offsets[-1] for texts in own):
                raise self._wordless(f"target {name!r}")
        self._fitted = self._learn(targets, pool)
        return self

    def score(self, signals: Mapping[str, Signals]) -> dict[str, Tensor]:
        if self._fitted is None:
            raise RuntimeError(f"{self.name}: call fit() before scoring")
        texts = known_texts(signals["text"].raw[self.text_column])
        values, lengths = self._values(texts, self._fitted)
        values[lengths == 0] = np.nan
        return self.targets.scores(torch.from_numpy(values))

    @abstractmethod
    def _learn(self, targets: Mapping[str, Sequence[Texts]], pool: Iterable[Any]) -> Any:
        """What scores are made with, from batches of texts by target, and those of the pool, which may have no word."""

    @abstractmethod
    def _values(self, texts: Texts, fitted: Any) -> tuple[Floats, NDArray[np.int64]]:
        """(B, targets), and how many n-grams each text has."""

    def _total(self, batches: Iterable[Any], count: Callable[[Texts], Ints]) -> Ints:
        """What ``count`` gives of some texts, integers, added up over those of all batches."""

        def part(batches: Iterable[Any], first: int) -> State:
            return torch.from_numpy(summed(self._texts(batches), count))

        return sum((state.numpy() for state in states(batches, part)), start=count([]))

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


def summed(batches: Iterable[Texts], count: Callable[[Texts], Ints]) -> Ints:
    """What ``count`` gives of some texts, added up over batches of them; of no text, too."""
    return sum(map(count, batches), start=count([]))


def known_texts(values: Any) -> Texts:
    """The values of a list or an array, None in place of those that are no texts."""
    if are_texts(values):
        return values
    values = values.to_pylist() if isinstance(values, pa.Array | pa.ChunkedArray) else values
    return [value if isinstance(value, str | bytes) else None for value in values]
