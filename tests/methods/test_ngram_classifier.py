"""The n-gram classifier against scikit-learn on the same features."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.sparse import csr_matrix, vstack
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import normalize

import assay
from assay.methods import NGramClassifier
from assay.methods.ngram_classifier import minimise
from assay.ops import ngram_counts
from tests.methods.small_texts import POOL, TARGETS, texts_of, views

BUCKETS = 1 << 12


def features(texts: list[str]) -> csr_matrix:
    found = ngram_counts(texts, BUCKETS, 2, punctuation=True)
    counts = csr_matrix((found.counts.astype(float), found.features, found.offsets), (len(texts), BUCKETS))
    return normalize(counts)


@pytest.mark.parametrize("penalty", [1.0, 0.05])
def test_it_is_scikit_learns_optimum(penalty: float) -> None:
    pool, target = POOL[:60], TARGETS["code"]
    method = NGramClassifier({"t": views(target)}, buckets=BUCKETS, penalty=penalty).fit(views(pool))
    scores = assay.score(views(pool), [method])["ngram_classifier"].to_numpy()
    labels = np.arange(len(target) + len(pool)) < len(target)
    solver = LogisticRegression(C=1 / penalty, class_weight="balanced", tol=1e-9, max_iter=10_000)
    solver.fit(vstack([features(target), features(pool)]), labels)
    np.testing.assert_allclose(scores, solver.decision_function(features(pool)), atol=2e-4)
    assert "not converged" not in method.metadata()["fit_t"]
    unseen = [*texts_of("code", 20, 7), *texts_of("prose", 20, 7)]
    judged = assay.score(views(unseen), [method])["ngram_classifier"].to_numpy()
    assert (judged[:20, None] > judged[20:]).mean() > 0.8


def test_what_is_no_text_has_no_odds() -> None:
    method = NGramClassifier({"t": views(TARGETS["code"])}, buckets=BUCKETS).fit(views(POOL))
    scores = assay.score(views(["", None, "\n", 3, "never seen"]), [method])["ngram_classifier"].to_numpy()
    np.testing.assert_array_equal(np.isnan(scores), [True, True, True, True, False])


def test_a_steep_valley_is_walked_to_its_end() -> None:
    scale = np.array([1.0, 1e3, 1e-2])

    def loss(x: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
        return float((scale * (x - 3) ** 2).sum() / 2), scale * (x - 3)

    found, steps, converged = minimise(loss, np.zeros(3), 1e-9)
    np.testing.assert_allclose(found, 3, rtol=1e-6)
    assert converged
    assert steps < 100


def test_what_is_wrong_is_named() -> None:
    target = {"t": views(["gold"])}
    with pytest.raises(ValueError, match="penalty: expected more than 0"):
        NGramClassifier(target, penalty=0)
    with pytest.raises(ValueError, match="ngram_classifier: the pool has no text with a word"):
        NGramClassifier(target).fit(views([None]))
