"""BM25 towards target texts: does this text have the words that the targets have, and others do not?

Robertson & Zaragoza, "The Probabilistic Relevance Framework: BM25 and Beyond", 2009, with Lucene's idf, which is never
negative.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import numpy as np

from assay.methods.checks import check_at_least
from assay.methods.sums import Folded
from assay.methods.targets import Targets
from assay.methods.text_method import Floats, Ints, TextMethod
from assay.ops import NGramCounts, Terms
from assay.ops.ngrams import Texts


@dataclass(frozen=True)
class _Fitted:
    terms: Terms
    weights: Floats  # (V, targets): idf times the share of the target's texts that have the term (less the pool's)
    mean_length: float
    texts: int  # of the pool


class BM25(TextMethod):
    """Each target's texts as queries against every sample; the mean over the queries. Column ``bm25``, keep high.

      score(d) = mean_q Σ_{t ∈ q} idf(t) · f (k1 + 1) / (f + k1 (1 − b + b |d| / mean |d|)),
      idf(t) = ln(1 + (N − n(t) + ½) / (n(t) + ½))

    with f how often d has t, a query's terms counted once, and N, n(t), mean |d| those of ``fit``'s sample of the pool.
    Terms are words in lower case, as ``ops.ngram_hashes`` has them; nothing is stemmed and no word is left out.

    Args:
        targets: batches by the target's name, with the raw column.
        text_column: the raw column that holds the texts; None: ``text`` (in a recipe: the task's).
        k1: how soon more of the same word count no more; b: how much a long text is discounted, 0 to 1.
        order: terms are n-grams of 1 to so many words.
        contrast: less the same score with the sample's texts as queries, of which the targets' terms alone are counted:
            words that every long text has, and so every long query, then weigh nothing.
        name: of the column, and prefix of the targets'.
    """

    kind = "BM25"
    gathers: ClassVar[int | None] = 0

    def __init__(
        self,
        targets: Targets,
        text_column: str | None = None,
        *,
        k1: float = 1.5,
        b: float = 0.75,
        order: int = 1,
        contrast: bool = False,
        name: str = "bm25",
    ) -> None:
        super().__init__(targets, text_column, order, False, name)
        check_at_least("k1", k1, 0)
        if not 0 <= b <= 1:
            raise ValueError(f"b: expected a number from 0 to 1, got {b}")
        self.k1, self.b, self.contrast = float(k1), float(b), contrast

    def _learn(self, targets: Mapping[str, Sequence[Texts]], pool: Iterable[Any]) -> tuple[_Fitted, Folded]:
        terms = Terms(np.concatenate([self._hashes(texts).hashes for own in targets.values() for texts in own]))
        weights, count = np.zeros((len(terms), len(targets))), partial(_having, len(terms))
        for j, own in enumerate(targets.values()):
            asked, _ = self._summed(own, terms, count)
            weights[:, j] = asked[:-2] / asked[-1]
        found, folded = self._total(pool, terms, count)
        having, length, n = found[:-2], int(found[-2]), int(found[-1])
        if not n:
            raise self._wordless("the pool")
        if self.contrast:
            weights -= (having / n)[:, None]
        idf = np.log1p((n - having + 0.5) / (having + 0.5))
        return _Fitted(terms, idf[:, None] * weights, length / n, n), folded

    def _values(self, texts: Texts, fitted: _Fitted) -> tuple[Floats, Ints]:
        found = self._counts(texts, fitted.terms)
        f, k = found.counts, self.k1 * (1 - self.b + self.b * found.lengths / fitted.mean_length)
        saturated = f * (self.k1 + 1) / (f + k[found.rows])
        return found.weighted(fitted.weights, saturated), found.lengths

    def metadata(self) -> dict[str, str]:
        facts = {"k1": f"{self.k1:g}", "b": f"{self.b:g}", "idf": "Lucene's", "contrast": str(self.contrast).lower()}
        if self._fitted is not None:
            facts |= {"terms": str(len(self._fitted.terms)), "pool_texts": str(self._fitted.texts)}
        return super().metadata() | facts


def _having(terms: int, counts: NGramCounts) -> Ints:
    """(V + 2,): of each of V terms the texts that have it; then all texts' words, and the texts that have any."""
    having = np.bincount(counts.features, minlength=terms)
    return np.append(having, [counts.lengths.sum(), (counts.lengths > 0).sum()]).astype(np.int64)
