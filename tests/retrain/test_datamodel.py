"""Datamodels: a known linear function is found again, and noise is called noise."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression

from assay.retrain import SmallModelDatamodel
from assay.retrain.datamodel import random_subsets


@pytest.mark.parametrize("kind", ["ridge", "lasso"])
def test_a_linear_world_is_found(kind) -> None:
    rng = np.random.default_rng(0)
    truth = np.where(rng.random((40, 2)) < 0.3, rng.normal(size=(40, 2)), 0.0)
    asked: list[tuple[int, int]] = []

    def train(indices, seed):
        asked.append((len(indices), seed))
        return truth[indices].sum(0) + 3.0 + 0.1 * np.random.default_rng((seed, *indices)).normal(size=2)

    model = SmallModelDatamodel.retrain(train, 40, subsets=200, share=0.25, seeds=2, seed=5, kind=kind)
    assert model.scores.shape == (40, 2)
    assert set(asked) == {(10, 5), (10, 6)}
    assert len(asked) == 400
    for t in range(2):
        assert np.corrcoef(model.scores[:, t], truth[:, t])[0, 1] > 0.98
    assert model.lds.min() > 0.9
    subset = random_subsets(40, 1, 0.25, 9)
    np.testing.assert_allclose(model.predict(subset), truth[subset[0]].sum(0)[None] + 3, atol=0.5)


def test_lds_is_about_zero_where_membership_does_not_matter() -> None:
    lds = [
        SmallModelDatamodel.fit(random_subsets(30, 100, 0.5, s), np.random.default_rng(s).normal(size=100), seed=s).lds
        for s in range(10)
    ]
    assert abs(float(np.nanmean(lds))) < 0.2  # 20 subsets held out, 10 draws: a standard error of .07


def test_a_flipped_label_hurts_in_truth() -> None:
    """Real retrainings: samples whose labels are wrong get lower scores than the others."""
    x, y = load_digits(return_X_y=True)
    keep = np.flatnonzero(y < 2)[:160]
    x, y = x[keep] / 16, y[keep]
    pool, target = slice(0, 60), slice(60, 160)
    labels = y[pool].copy()
    flipped = np.arange(0, 60, 6)
    labels[flipped] = 1 - labels[flipped]

    def train(indices, seed):
        model = LogisticRegression(C=1.0).fit(x[pool][indices], labels[indices])
        p = model.predict_proba(x[target])[np.arange(100), y[target]]
        return np.log(p).mean()

    model = SmallModelDatamodel.retrain(train, 60, subsets=150)
    others = np.setdiff1d(np.arange(60), flipped)
    assert model.lds[0] > 0.5
    assert np.median(model.scores[flipped]) < np.quantile(model.scores[others], 0.1)


def test_subsets_are_of_their_size_and_follow_from_the_seed() -> None:
    members = random_subsets(50, 30, 0.3, 4)
    assert members.shape == (30, 50)
    assert (members.sum(1) == 15).all()
    assert (members == random_subsets(50, 30, 0.3, 4)).all()
    assert (members != random_subsets(50, 30, 0.3, 5)).any()


def test_errors() -> None:
    members = random_subsets(20, 12, 0.5)
    with pytest.raises(ValueError, match=r"share=1\.0: leaves 20 of 20"):
        random_subsets(20, 12, 1.0)
    with pytest.raises(ValueError, match=r"got \(12, 20\) and \(11, 1\)"):
        SmallModelDatamodel.fit(members, np.zeros(11))
    with pytest.raises(ValueError, match="1 of 12 are not finite"):
        SmallModelDatamodel.fit(members, np.where(np.arange(12) == 3, np.nan, 1.0))
    with pytest.raises(ValueError, match="at least 10 subsets"):
        SmallModelDatamodel.fit(members[:6], np.zeros(6))
    with pytest.raises(ValueError, match="kind 'tree'"):
        SmallModelDatamodel.fit(members, np.zeros(12), kind="tree")
