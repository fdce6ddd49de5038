"""Choosing among models: LEEP's closed forms, distances and clusters by hand, and a selection that is followed."""

from __future__ import annotations

import numpy as np
import pytest

from assay.retrain import choose_model, leep
from assay.retrain.choosing import model_distances, predicted_accuracy, recall


def probabilities(rows: int, classes: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).dirichlet(np.full(classes, 0.3), rows)


def test_leep_is_minus_the_entropy_where_predictions_say_nothing() -> None:
    labels = np.repeat([0, 1, 2], [50, 30, 20])
    shares = np.array([0.5, 0.3, 0.2])
    entropy = -(shares * np.log(shares)).sum()
    same = np.tile([0.1, 0.2, 0.7], (100, 1))
    assert leep(same, labels) == pytest.approx(-entropy, abs=1e-12)
    assert leep(np.ones((100, 1)), labels) == pytest.approx(-entropy, abs=1e-12)
    # Every class has the same set of predictions: independent of y, though not of x.
    independent = np.concatenate([np.tile(probabilities(10, 4), (n, 1)) for n in (5, 3, 2)])
    assert leep(independent, labels) == pytest.approx(-entropy, abs=1e-12)


def test_leep_is_at_most_0_and_0_where_classes_are_told_apart() -> None:
    rng = np.random.default_rng(1)
    for seed in range(20):
        labels = rng.integers(0, 4, 60)
        assert leep(probabilities(60, 6, seed), labels) <= 0
    labels = rng.integers(0, 3, 50)
    assert leep(np.eye(5)[labels + 1], labels) == 0  # of the model's five classes, two are never predicted
    assert leep(np.eye(5)[labels + 1], np.array(["a", "b", "c"])[labels]) == 0


def test_leep_by_its_definition() -> None:
    theta, labels = probabilities(40, 5), np.random.default_rng(2).integers(0, 3, 40)
    total = 0.0
    for i in range(40):
        expected = 0.0
        for z in range(5):
            joint = sum(theta[j, z] for j in range(40) if labels[j] == labels[i])
            expected += joint / theta[:, z].sum() * theta[i, z]
        total += np.log(expected)
    assert leep(theta, labels) == pytest.approx(total / 40, rel=1e-12)


def test_distances_are_of_the_largest_differences() -> None:
    accuracies = np.array([[0.5] * 6, [0.5, 0.6, 0.7, 0.8, 0.9, 1.0], [0.0] * 6])
    found = model_distances(accuracies)
    assert found[0, 1] == pytest.approx((0.1 + 0.2 + 0.3 + 0.4 + 0.5) / 5)
    assert found[0, 2] == pytest.approx(0.5)
    np.testing.assert_array_equal(found, found.T)
    with pytest.raises(ValueError, match=r"of more than 5 benchmarks, got \(3, 5\)"):
        model_distances(accuracies[:, :5])


def two_clusters() -> np.ndarray:
    """Models 0, 2, 5 alike and good, 1 and 4 alike and middling, 3 alone."""
    base = {0: 0.8, 2: 0.82, 5: 0.79, 1: 0.5, 4: 0.55}
    rows = [np.full(6, base.get(m, 0.0)) for m in range(6)]
    rows[3] = np.array([0.9, 0.1, 0.9, 0.1, 0.9, 0.1])
    return np.stack(rows)


def test_recall_by_hand() -> None:
    accuracies, worth = two_clusters(), np.array([0.5, np.nan, 0.6, 0.01, 0.9, np.nan])
    found = recall(accuracies, np.log(worth), keep=4)
    assert found.clusters.tolist() == [0, 1, 0, 2, 1, 0]
    assert found.representatives.tolist() == [2, 4]
    cosine = 3 / np.sqrt(6 * 2.46)  # of model 3 with either representative
    expected = [0.8 * 0.5, 0.5 * 0.9, 0.82 * 0.6, 0.5 * cosine * (0.6 + 0.9) / 2, 0.55 * 0.9, 0.79 * 0.6]
    np.testing.assert_allclose(found.scores, expected, rtol=1e-12)
    assert found.kept.tolist() == [4, 2, 5, 1]
    with pytest.raises(ValueError, match="leeps: model 2 stands for others; its own is missing"):
        recall(accuracies, [0, 0, np.nan, 0, 0, 0])


def test_models_that_are_all_alone_have_their_own_leep() -> None:
    accuracies = np.stack([np.full(6, 0.2 * m) for m in range(1, 5)])
    found = recall(accuracies, [-1.0, -0.5, -2.0, -0.1])
    assert found.clusters.tolist() == [0, 1, 2, 3]
    assert not len(found.representatives)
    np.testing.assert_allclose(found.scores, [0.2, 0.4, 0.6, 0.8] * np.exp([-1.0, -0.5, -2.0, -0.1]))


def test_trends_are_means_of_one_dimensional_clusters() -> None:
    early = np.array([0.1, 0.12, 0.4, 0.42, 0.7, 0.71, 0.9])
    final = np.array([0.2, 0.3, 0.6, 0.7, 0.75, 0.85, 0.99])
    for current, expected in ((0.0, 0.25), (0.3, 0.65), (0.69, 0.8), (1.0, 0.99)):
        assert predicted_accuracy(current, early, final) == pytest.approx(expected)
    assert predicted_accuracy(0.5, early, final, groups=1) == pytest.approx(final.mean())
    assert predicted_accuracy(0.5, [0.4, 0.4], [0.6, 0.8]) == pytest.approx(0.7)  # fewer values than groups
    with pytest.raises(ValueError, match="current: 1 of 1 are not finite"):
        predicted_accuracy(float("nan"), early, final)


def world() -> dict[str, np.ndarray]:
    """Five models alike on the benchmarks, where final accuracy is validation's at the same place, plus a tenth."""
    validation = np.tile(np.linspace(0.1, 0.8, 8), (5, 1))
    return {
        "accuracies": validation + 0.1,
        "curves": np.repeat(validation[:, :, None], 4, axis=2),
        "leeps": np.full(5, -0.5),
    }


def test_a_selection_that_is_followed_step_by_step() -> None:
    accuracy = np.array([[0.2, 0.9, 0.9], [0.7, 0.7, 0.75], [0.68, 0.71, 0.8], [0.1, 0.1, 0.1], [0.3, 0.3, 0.3]])
    asked: list[tuple[int, int]] = []

    def train(model, epoch):
        asked.append((model, epoch))
        return accuracy[model, epoch]

    found = choose_model(train, **world(), epochs=3, names=list("abcde"))
    # Epoch 0: d, a and e are worse than b and predicted so; c is in b's cluster. Epoch 1: half of two is c alone.
    assert asked == [(0, 0), (1, 0), (2, 0), (3, 0), (4, 0), (1, 1), (2, 1), (2, 2)]
    assert (found.model, found.epochs) == ("c", 8)
    rows = {row["model"]: row for row in found.table.to_pylist()}
    assert [rows[m]["epochs"] for m in "abcde"] == [1, 2, 3, 1, 1]
    assert [rows[m]["accuracy"] for m in "abcde"] == [0.2, 0.7, 0.8, 0.1, 0.3]
    assert [m for m in "abcde" if rows[m]["chosen"]] == ["c"]
    assert rows["a"]["predicted"] == pytest.approx(0.25)  # beside 0.1 and 0.2 on the benchmarks


def test_halving_is_forced_where_trends_tell_nothing_apart() -> None:
    asked: list[int] = []

    def train(model, epoch):
        asked.append(model)
        return [0.75, 0.76, 0.77, 0.78, 0.79][model]

    found = choose_model(train, **world(), epochs=4)
    assert found.model == "4"
    assert asked == [0, 1, 2, 3, 4, 4, 3, 2, 4, 3, 4]


def test_what_is_not_recalled_is_not_trained() -> None:
    given = world()
    given["leeps"] = np.array([-0.1, -3.0, -0.2, -3.0, -3.0])
    asked: set[int] = set()
    found = choose_model(lambda m, e: asked.add(m) or 0.5, **given, keep=2, epochs=2)
    assert asked == {0, 2}
    assert found.table["accuracy"].null_count == 3
    assert found.table["recalled"].to_pylist() == [True, False, True, False, False]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"accuracies": np.full((5, 8), 1.5)}, "accuracies: expected accuracies from 0 to 1, got 1.5 to 1.5"),
        ({"accuracies": np.full((5, 5), 0.5)}, "more than 5 benchmarks"),
        ({"accuracies": np.full((5, 8), np.nan)}, "accuracies: 40 of 40 are not finite"),
        ({"curves": np.zeros((5, 8, 2))}, r"curves: expected \(5, 8, 3\) or more epochs, got \(5, 8, 2\)"),
        ({"curves": np.full((5, 8, 3), -1)}, "curves: expected accuracies from 0 to 1"),
        ({"leeps": np.zeros(4)}, "leeps: expected 5 numbers of at most 0"),
        ({"leeps": np.ones(5)}, "leeps: expected 5 numbers of at most 0"),
        ({"names": ["a"] * 5}, "names: expected 5 different ones"),
        ({"threshold": 0}, "threshold: expected a finite number above 0"),
        ({"train": lambda m, e: 71.0}, r"train: model 0, epoch 0: expected an accuracy from 0 to 1, got 71\.0"),
        ({"train": lambda m, e: None}, "expected an accuracy from 0 to 1, got None"),
    ],
)
def test_what_is_refused(settings, words) -> None:
    with pytest.raises(ValueError, match=words):
        choose_model(**({"train": lambda m, e: 0.5, "epochs": 3} | world() | settings))


@pytest.mark.parametrize(
    ("theta", "labels", "words"),
    [
        (np.ones((3, 2)), [0, 1, 1], "row 0 has values from 1 that sum to 2"),
        (np.array([[1.5, -0.5]]), [0], "row 0 has values from -0.5"),
        (np.ones((3, 1)), [0, 1], r"got \(3, 1\) and \(2,\)"),
        (np.full((2, 1), np.nan), [0, 1], "probabilities: 2 of 2 are not finite"),
    ],
)
def test_leep_of_what_it_cannot_be_of_is_refused(theta, labels, words) -> None:
    with pytest.raises(ValueError, match=words):
        leep(theta, labels)
