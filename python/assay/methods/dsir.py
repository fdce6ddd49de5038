"""DSIR: how much likelier is this text under the targets' bag of hashed n-grams than under the pool's?

Xie, Santurkar, Ma & Liang, "Data Selection for Language Models via Importance Resampling", 2302.03169, section 4. The
paper then draws: ``select.sample(table, "dsir", amount, seed, temperature=1)`` is its Gumbel top k.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from assay.methods.checks import check_at_least
from assay.methods.sums import Folded
from assay.methods.targets import Targets
from assay.methods.text_method import Floats, Ints, TextMethod
from assay.ops import NGramCounts
from assay.ops.ngrams import Texts, check_features


@dataclass(frozen=True)
class _Fitted:
    ratios: Floats  # (buckets, targets)
    pool: int  # n-grams


class DSIR(TextMethod):
    """log importance weights of hashed n-grams. Column ``dsir``, keep high, or draw in proportion to exp(dsir).

      score(d) = Σ_g count_d(g) (log p_target(g) − log p_pool(g)),
      p(g) = (count(g) + smoothing) / (total + smoothing · B)

    over B buckets of n-grams of 1 to ``order`` tokens, words and runs of punctuation, as the paper has them. The sum
    grows with the text's length; so does the paper's.

    Args:
        targets: batches by the target's name, with the raw column.
        text_column: the raw column that holds the texts; None: ``text`` (in a recipe: the task's).
        order, buckets: the paper's 2 and 10,000.
        smoothing: added to every count; above 0. (The authors' code adds 1e-8 to p instead, which makes a text's score
            that of the n-grams which one side has never seen.)
        punctuation: whether runs of it are tokens.
        name: of the column, and prefix of the targets'.
    """

    kind = "log p_target − log p_pool of hashed n-grams"
    gathers: ClassVar[int | None] = 0

    def __init__(
        self,
        targets: Targets,
        text_column: str | None = None,
        *,
        order: int = 2,
        buckets: int = 10_000,
        smoothing: float = 1.0,
        punctuation: bool = True,
        name: str = "dsir",
    ) -> None:
        super().__init__(targets, text_column, order, punctuation, name)
        check_features(buckets)
        check_at_least("smoothing", smoothing, 0)
        if smoothing == 0:
            raise ValueError("smoothing: expected more than 0; an n-gram that one side has never seen would rule all")
        self.buckets, self.smoothing = buckets, float(smoothing)

    def _learn(self, targets: Mapping[str, Sequence[Texts]], pool: Iterable[Any]) -> tuple[_Fitted, Folded]:
        bins, folded = self._total(pool, self.buckets, self._bins)
        if not (total := int(bins.sum())):
            raise self._wordless("the pool")
        logs = [self._logs(self._summed(own, self.buckets, self._bins)[0]) for own in targets.values()]
        return _Fitted(np.stack(logs, 1) - self._logs(bins)[:, None], total), folded

    def _bins(self, counts: NGramCounts) -> Ints:
        """(buckets,) how many n-grams are in each."""
        bins = np.zeros(self.buckets, np.int64)
        np.add.at(bins, counts.features, counts.counts)
        return bins

    def _logs(self, bins: Ints) -> Floats:
        """(buckets,) log p."""
        logs: Floats = np.log((bins + self.smoothing) / (bins.sum() + self.smoothing * self.buckets))
        return logs

    def _values(self, texts: Texts, fitted: _Fitted) -> tuple[Floats, Ints]:
        found = self._counts(texts, self.buckets)
        return found.weighted(fitted.ratios), found.lengths

    def metadata(self) -> dict[str, str]:
        facts = super().metadata() | {"smoothing": f"{self.smoothing:g}", "buckets": str(self.buckets)}
        return facts | ({"pool_ngrams": str(self._fitted.pool)} if self._fitted is not None else {})
