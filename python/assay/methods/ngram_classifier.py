"""A linear classifier of hashed n-grams: is this text more like the targets' or like the pool's?

The family of fastText's quality classifiers (Joulin et al., 1607.01759; DCLM, 2406.11794), as a convex problem: one
weight per bucket in place of an embedding, solved rather than trained, so that no order of samples and no learning rate
decides anything.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from assay.methods.checks import check_at_least
from assay.methods.sums import Folded
from assay.methods.targets import Targets
from assay.methods.text_method import Floats, Ints, TextMethod, note
from assay.ops import NGramCounts
from assay.ops.ngrams import Texts, check_features

_MOST_STEPS = 500
_HISTORY = 10


@dataclass(frozen=True)
class _Matrix:
    """Rows of features, each of length 1: (M,) row, place of the feature, value."""

    rows: Ints
    places: Ints
    values: Floats
    shape: tuple[int, int]

    def times(self, weights: Floats) -> Floats:
        return np.bincount(self.rows, self.values * weights[self.places], self.shape[0]).astype(np.float64)

    def transposed_times(self, rows: Floats) -> Floats:
        return np.bincount(self.places, self.values * rows[self.rows], self.shape[1]).astype(np.float64)


@dataclass(frozen=True)
class _Fitted:
    weights: Floats  # (buckets, targets)
    biases: Floats  # (targets,)
    facts: Mapping[str, str]


class NGramClassifier(TextMethod):
    """Log odds of a logistic regression, the target's texts against ``fit``'s sample of the pool. Column
    ``ngram_classifier``, keep high; choose by a quantile, for 0 means nothing: the pool has target texts in it, too.

    A text's features are the counts of its n-grams' buckets, divided by their Euclidean length. The weights minimise
    ½ penalty ‖w‖² + Σ_i s_i log(1 + exp(−y_i (w·x_i + b))), with s_i so that both sides weigh the same. That is
    scikit-learn's ``LogisticRegression(C=1 / penalty, class_weight="balanced")``.

    Args:
        targets: batches by the target's name, with the raw column; a classifier for each.
        text_column: the raw column that holds the texts; None: ``text`` (in a recipe: the task's).
        order, buckets: n-grams of 1 to so many tokens, in so many buckets.
        penalty: above 0; more of it is a simpler classifier.
        punctuation: whether runs of it are tokens.
        name: of the column, and prefix of the targets'.
    """

    kind = "log odds of hashed n-grams"
    gathers: ClassVar[int | None] = 0

    def __init__(
        self,
        targets: Targets,
        text_column: str | None = None,
        *,
        order: int = 2,
        buckets: int = 1 << 18,
        penalty: float = 1.0,
        punctuation: bool = True,
        name: str = "ngram_classifier",
    ) -> None:
        super().__init__(targets, text_column, order, punctuation, name)
        check_features(buckets)
        check_at_least("penalty", penalty, 0)
        if penalty == 0:
            raise ValueError("penalty: expected more than 0; without one the weights have no end")
        self.buckets, self.penalty = buckets, float(penalty)

    def _learn(self, targets: Mapping[str, Sequence[Texts]], pool: Iterable[Any]) -> tuple[_Fitted, Folded]:
        negatives = [self._counts(texts, self.buckets) for texts in self._texts(pool)]
        if not any(len(counts.features) for counts in negatives):
            raise self._wordless("the pool")
        folded = Folded()
        for counts in negatives:
            note(folded, counts.lengths)
        weights, biases = np.zeros((self.buckets, len(targets))), np.zeros(len(targets))
        facts: dict[str, str] = {}
        for j, (name, own) in enumerate(targets.items()):
            positives = [self._counts(texts, self.buckets) for texts in own]
            matrix, used = _matrix([*positives, *negatives])
            first = sum(int((counts.lengths > 0).sum()) for counts in positives)
            positive = np.arange(matrix.shape[0]) < first
            found, steps, converged = fit_logistic(matrix, positive, self.penalty)
            weights[used, j], biases[j] = found[:-1], found[-1]
            facts[f"fit_{name}"] = f"{first} against {matrix.shape[0] - first} texts, {steps} steps" + (
                "" if converged else ", not converged: take a larger penalty"
            )
        return _Fitted(weights, biases, facts), folded

    def _values(self, texts: Texts, fitted: _Fitted) -> tuple[Floats, Ints]:
        found = self._counts(texts, self.buckets)
        lengths = np.sqrt(found.sums(np.square(found.counts, dtype=np.float64)))
        lengths[lengths == 0] = 1
        return found.weighted(fitted.weights) / lengths[:, None] + fitted.biases, found.lengths

    def metadata(self) -> dict[str, str]:
        facts = super().metadata() | {"penalty": f"{self.penalty:g}", "buckets": str(self.buckets)}
        return facts | (dict(self._fitted.facts) if self._fitted is not None else {})


def _matrix(parts: Sequence[NGramCounts]) -> tuple[_Matrix, Ints]:
    """The rows that have features, over the buckets that are used, and which these are."""
    rows, features, values, count = [], [], [], 0
    for part in parts:
        kept = np.cumsum(part.lengths > 0) - 1
        lengths = np.sqrt(part.sums((part.counts**2).astype(np.float64)))
        rows.append(count + kept[part.rows])
        features.append(part.features)
        values.append(part.counts / lengths[part.rows])
        count += int((part.lengths > 0).sum())
    used, places = np.unique(np.concatenate(features), return_inverse=True)
    shape = (count, len(used))
    return _Matrix(np.concatenate(rows), places.astype(np.int64), np.concatenate(values), shape), used


def fit_logistic(matrix: _Matrix, positive: NDArray[np.bool_], penalty: float) -> tuple[Floats, int, bool]:
    """The weights and, last, the bias that minimise the loss of ``NGramClassifier``; the steps that it took, and
    whether they came to the end.

    All sums are NumPy's own and of one thread, not a BLAS's: the bits are the same with any number of threads.
    """
    n, k = len(positive), int(positive.sum())
    sign, weight = np.where(positive, 1.0, -1.0), np.where(positive, n / (2 * k), n / (2 * (n - k)))

    def loss(w: Floats) -> tuple[float, Floats]:
        margin = sign * (matrix.times(w[:-1]) + w[-1])
        value = (weight * np.logaddexp(0, -margin)).sum() + 0.5 * penalty * (w[:-1] ** 2).sum()
        pull = -sign * weight * np.exp(-np.logaddexp(0, margin))
        return float(value), np.append(matrix.transposed_times(pull) + penalty * w[:-1], pull.sum())

    return minimise(loss, np.zeros(matrix.shape[1] + 1), 1e-7 * n)


def minimise(
    loss: Callable[[Floats], tuple[float, Floats]], start: Floats, tolerance: float
) -> tuple[Floats, int, bool]:
    """L-BFGS for a smooth convex loss, until no entry of its gradient is above ``tolerance``."""
    x, (value, gradient) = start, loss(start)
    history: deque[tuple[Floats, Floats, float]] = deque(maxlen=_HISTORY)
    for step in range(_MOST_STEPS):
        if np.abs(gradient).max() <= tolerance:
            return x, step, True
        direction = _descent(gradient, history)
        slope, size = _dot(gradient, direction), 1.0 if history else min(1.0, 1 / np.abs(gradient).sum())
        while True:  # halved until the loss falls by a part of what the slope says
            new = x + size * direction
            new_value, new_gradient = loss(new)
            if new_value <= value + 1e-4 * size * slope:
                break
            size /= 2
            if size < 1e-12:  # the loss is exact to its last bits
                return x, step, False
        s, y = new - x, new_gradient - gradient
        if (curvature := _dot(s, y)) > 0:
            history.append((s, y, 1 / curvature))
        x, value, gradient = new, new_value, new_gradient
    return x, _MOST_STEPS, False


def _descent(gradient: Floats, history: Sequence[tuple[Floats, Floats, float]]) -> Floats:
    """−H gradient, with the inverse Hessian H that the last steps tell (Nocedal & Wright, algorithm 7.4)."""
    q, kept = gradient.copy(), []
    for s, y, rho in reversed(history):
        kept.append(rho * _dot(s, q))
        q -= kept[-1] * y
    if history:
        s, y, _ = history[-1]
        q *= _dot(s, y) / _dot(y, y)
    for (s, y, rho), a in zip(history, reversed(kept), strict=True):
        q += (a - rho * _dot(y, q)) * s
    return -q


def _dot(a: Floats, b: Floats) -> float:
    return float((a * b).sum())
