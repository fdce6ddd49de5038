"""SemDeDup and D2 pruning: their properties, and the algorithms written out for a few rows."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.datasets import load_digits

from assay.select import d2, neighbours, random, semdedup, top
from tests.select.test_rules import table


def unit(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x, axis=1, keepdims=True)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch) -> None:
    monkeypatch.setattr(neighbours, "_ROWS", 37)


@pytest.fixture(scope="module")
def digits() -> tuple[np.ndarray, np.ndarray]:
    """300 digits, 100 of them three times more but for a little noise; which digit each row is of."""
    rng = np.random.default_rng(0)
    x = load_digits().data[:300].astype(np.float32)
    source = np.concatenate([np.arange(300), np.repeat(np.arange(100), 3)])
    order = rng.permutation(600)
    return (x[source] + rng.normal(0, 0.02, (600, 64)).astype(np.float32))[order], source[order]


def test_of_duplicates_one_is_kept_and_every_dropped_row_has_a_kept_double(digits) -> None:
    x, source = digits
    selection = semdedup(x, 0.9995)
    counts = np.bincount(source[selection.mask], minlength=300)
    assert (counts == 1).mean() > 0.97  # but for doubles of two clusters
    assert counts.min() == 1
    assert (np.bincount(source[random(table(np.zeros(600)), 300, 0).mask], minlength=300) == 1).mean() < 0.6
    cosines = unit(x.astype(np.float64)) @ unit(x.astype(np.float64)).T
    assert (cosines[~selection.mask][:, selection.mask].max(1) > 0.9995 - 1e-6).all()
    one = semdedup(x, 0.97, clusters=1)
    kept = cosines[np.ix_(one.mask, one.mask)] - 2 * np.eye(one.mask.sum())
    assert kept.max() < 0.97 + 1e-6
    assert (cosines[~one.mask][:, one.mask].max(1) > 0.97 - 1e-6).all()
    np.testing.assert_array_equal(semdedup(x, 0.97, clusters=1).mask, one.mask)


def test_the_best_of_several_is_kept(digits) -> None:
    x, source = digits
    worth = np.random.default_rng(1).random(600)
    worth[source == 5] = np.nan
    kept = semdedup(x, 0.9995, worth=worth, clusters=1).mask
    for s in range(100):
        rows = np.flatnonzero(source == s)
        expected = rows[0] if s == 5 else rows[worth[rows].argmax()]
        assert list(rows[kept[rows]]) == [expected]


def written_out(scores, x, count, gamma, k):
    """Algorithm of the paper, all pairs."""
    u = unit(x.astype(np.float64))
    distance = np.sqrt(np.maximum(2 - 2 * u @ u.T, 0))
    near = np.argsort(distance + 10 * np.eye(len(x)), axis=1, kind="stable")[:, :k]
    scaled = (scores - scores.min()) / (scores.max() - scores.min())
    s = np.array([scaled[i] + sum(np.exp(-distance[i, j]) * scaled[j] for j in near[i]) for i in range(len(x))])
    taken: list[int] = []
    while len(taken) < count:
        i = max((row for row in range(len(x)) if row not in taken), key=lambda row: s[row])
        taken.append(i)
        for j in near[i]:
            s[j] -= np.exp(-gamma * distance[i, j]) * max(s[i], 0)
    return sorted(taken)


@pytest.mark.parametrize("gamma", [0.0, 1.0, 3.0])
def test_d2_is_the_algorithm(gamma) -> None:
    rng = np.random.default_rng(3)
    x, scores = rng.normal(size=(90, 5)), rng.random(90).astype(np.float32)
    for count, k in ((30, 4), (80, 10), (5, 0)):
        got = d2(table(scores), "s", count, x, gamma=gamma, neighbours=k)
        assert list(got.indices) == written_out(scores.astype(np.float64), x, count, gamma, k)
    low = d2(table(-scores, "low"), "s", 30, x.astype(np.float16).astype(np.float64), gamma=gamma)
    assert list(low.indices) == list(d2(table(scores), "s", 30, x.astype(np.float16), gamma=gamma).indices)


def test_without_neighbours_or_lowering_it_is_the_top() -> None:
    rng = np.random.default_rng(4)
    x, scores = rng.normal(size=(90, 5)), table(rng.random(90))
    np.testing.assert_array_equal(d2(scores, "s", 20, x, neighbours=0).mask, top(scores, "s", 20).mask)
    near, distance = neighbours._nearest(x, np.ones(90, bool), 10, 1, 0)
    scaled = scores["s"].to_numpy()
    scaled = (scaled - scaled.min()) / (scaled.max() - scaled.min())
    messages = scaled + (np.exp(-distance) * scaled[near]).sum(1)
    got = d2(scores, "s", 20, x, gamma=1e6)
    assert set(got.indices) == set(np.argsort(-messages)[:20])


def test_d2_takes_fewer_copies(digits) -> None:
    x, source = digits
    scores = table((source < 100) + np.random.default_rng(5).random(600))  # what was copied is what scores high
    distinct = [len(set(source[rule.mask])) for rule in (top(scores, "s", 150), d2(scores, "s", 150, x, gamma=0.1))]
    assert distinct[1] > 1.2 * distinct[0]


def test_rows_of_which_nothing_is_known(digits) -> None:
    x = digits[0][:50].copy()
    x[0], x[1, 3], x[2, 4] = 0, np.nan, np.inf
    x[3] *= 1e30
    selection = semdedup(x, 0.9)
    assert not selection.mask[:3].any()
    assert selection.mask[3:].any()
    assert selection.reasons[0] == "dropped: its features have no direction"
    np.testing.assert_array_equal(
        semdedup(x, 0.9, clusters=1).mask[3:], semdedup(digits[0][3:50], 0.9, clusters=1).mask
    )
    scores = np.arange(50.0)
    scores[49] = np.nan
    got = d2(table(scores), "s", 1.0, x)
    assert list(got.indices) == list(range(49))
    for empty in (np.empty((0, 4)), np.empty((0, 0))):
        assert semdedup(empty).mask.shape == (0,)
        assert d2(table(np.empty(0)), "s", 1.0, empty).mask.shape == (0,)
    assert list(semdedup(x[5:6]).indices) == [0]


@pytest.mark.filterwarnings("error")
def test_scores_of_any_size_are_scaled() -> None:
    """Differences that no float32 or float64 holds."""
    for most in (np.float32(3e38), 1.7e308):
        scores = np.array([-most, most, 0], type(most))
        scaled = neighbours._unit_interval(scores, np.ones(3, bool), "s")
        assert scaled.tolist() == [0, 1, 0.5]
    wide = table(np.array([-3e38, 3e38, 0], np.float32))
    assert d2(wide, "s", 2, np.eye(3), gamma=0.0).indices.tolist() == [1, 2]


def test_nothing_is_less_than_the_least() -> None:
    assert semdedup(np.ones((3, 2)), worth=[np.nan, -np.inf, np.nan]).mask.tolist() == [False, True, False]


def test_mistakes() -> None:
    x, scores = np.ones((4, 2)), table(np.array([0, 1, 2, np.inf]))
    for call, message in (
        (lambda: semdedup(x, 1.0), "cosine=1.0"),
        (lambda: semdedup(np.ones((4, 2), int)), "expected floats"),
        (lambda: semdedup(x, worth=[1]), "a number for each of 4 rows"),
        (lambda: semdedup(x, clusters=0), "clusters=0"),
        (lambda: d2(scores, "s", 2, x), "infinite scores"),
        (lambda: d2(scores, "s", 2, x[:3]), "a row for each of the table's 4, got 3"),
        (lambda: d2(scores, "s", 2, x, gamma=-1), "gamma=-1"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_float32_extremes_are_scaled_as_float64_is() -> None:
    rng = np.random.default_rng(0)
    x, scores = rng.normal(size=(60, 4)), (rng.uniform(-3e38, 3e38, 60)).astype(np.float32)
    assert list(d2(table(scores), "s", 9, x).indices) == written_out(scores.astype(np.float64), x, 9, 1.0, 10)
