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


@pytest.mark.parametrize(
    ("subsets", "outputs", "settings", "words"),
    [
        (np.full((12, 3), 2), np.zeros(12), {}, "subsets: expected membership, 0 or 1 for each sample, got 2"),
        (np.full((12, 3), np.nan), np.zeros(12), {}, "subsets: expected membership, .* got nan"),
        (np.ones((12, 3)), np.zeros(12), {}, "subsets: expected different ones"),
        ([[1], [1, 0]], np.zeros(2), {}, "subsets: expected an array of numbers, got list"),
        (None, np.zeros(2), {}, "subsets: expected an array of numbers, got NoneType"),
        (np.zeros((12, 0)), np.zeros(12), {}, r"got \(12, 0\) and \(12, 1\)"),
        (np.eye(12), np.zeros((12, 0)), {}, r"got \(12, 12\) and \(12, 0\)"),
        (np.eye(12), np.zeros(12) * 1j, {}, "outputs: expected an array of numbers"),
        (np.eye(12), ["a"] * 12, {}, "outputs: expected an array of numbers"),
        (np.eye(12), np.zeros(12), {"held_out": 0}, "held_out: expected a share of the subsets between 0 and 1, got 0"),
        (np.eye(12), np.zeros(12), {"held_out": np.nan}, "held_out: expected a number between 0 and 1, got nan"),
        (np.eye(12), np.zeros(12), {"seed": -1}, "seed: expected an integer of at least 0, got -1"),
        (np.eye(12), np.zeros(12), {"seed": None}, "seed: expected an integer"),
    ],
)
def test_what_cannot_be_fitted_is_named(subsets, outputs, settings, words) -> None:
    with pytest.raises(ValueError, match=words):
        SmallModelDatamodel.fit(subsets, outputs, **settings)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"subsets": 9}, "at least 10 subsets"),
        ({"subsets": -1}, "subsets: expected an integer of at least 1, got -1"),
        ({"subsets": 12.5}, "subsets: expected an integer"),
        ({"seeds": 0}, "seeds: expected an integer of at least 1, got 0"),
        ({"share": np.nan}, "share: expected a number between 0 and 1, got nan"),
        ({"share": 1.5}, "share=1.5: leaves 30 of 20"),
        ({"kind": "tree"}, "kind 'tree'"),
        ({"seed": -1}, "seed: expected an integer of at least 0"),
        ({"samples": 2.5}, "samples: expected an integer"),
    ],
)
def test_nothing_is_trained_for_a_fit_that_must_fail(settings, words) -> None:
    trained = []
    with pytest.raises(ValueError, match=words):
        SmallModelDatamodel.retrain(lambda *args: trained.append(args) or 1.0, **({"samples": 20} | settings))
    assert not trained


@pytest.mark.parametrize(
    ("train", "words"),
    [
        (lambda indices, seed: None, "train: expected an array of numbers, got NoneType"),
        (lambda indices, seed: np.zeros((2, 2)), r"train: expected outputs \(T,\) of one length, got \(2, 2\)"),
        (lambda indices, seed: [], r"train: expected outputs \(T,\) of one length, got \(0,\)"),
        (lambda indices, seed: np.zeros(1 + seed), r"train: expected outputs .* got \(2,\), first \(1,\)"),
        (lambda indices, seed: [0.0, -np.inf][seed], "train: the outputs of subset 0, seed 1 are not finite"),
        (lambda indices, seed: np.nan, "train: the outputs of subset 0, seed 0 are not finite"),
    ],
)
def test_a_training_that_fails_is_named_at_once(train, words) -> None:
    with pytest.raises(ValueError, match=words):
        SmallModelDatamodel.retrain(train, 20, subsets=12, seeds=2)


def test_samples_of_which_nothing_is_known_have_no_score() -> None:
    rng = np.random.default_rng(0)
    members = random_subsets(20, 80, 0.5)
    members[:, 3], members[:, 4] = False, True
    truth = rng.normal(size=20)
    model = SmallModelDatamodel.fit(members, members @ truth)
    assert np.flatnonzero(np.isnan(model.scores[:, 0])).tolist() == [3, 4]
    np.testing.assert_allclose(model.predict(members)[:, 0], members @ truth, atol=0.05)
    assert model.predict(members[0]).shape == (1,)
    with pytest.raises(ValueError, match=r"subsets: expected membership \(m, 20\), got shape \(80, 19\)"):
        model.predict(members[:, 1:])


def test_a_training_may_do_what_it_likes_with_its_indices() -> None:
    seen = []

    def train(indices, seed):
        seen.append(indices.copy())
        indices[:] = 0
        return float(seed)

    SmallModelDatamodel.retrain(train, 20, subsets=12, seeds=2)
    assert all((a == b).all() for a, b in zip(seen[::2], seen[1::2], strict=True))
