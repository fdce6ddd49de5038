"""KNN-Shapley against Shapley's definition over all subsets, and what it finds."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score

from assay.methods import knn_shapley
from tests.methods.data import noisy_digits


def utility(chosen, cosines, match, k) -> float:
    """The expected share of the target's class among the k nearest, ties in random order; k counts those missing."""
    total, left = 0.0, k
    for nearness in sorted({cosines[i] for i in chosen}, reverse=True):
        group = [i for i in chosen if cosines[i] == nearness]
        taken = min(left, len(group))
        total += taken * np.mean([match[i] for i in group])
        left -= taken
    return total / k


def shapley(cosines, match, k) -> np.ndarray:
    n = len(match)
    values = np.zeros(n)
    for i in range(n):
        others = [j for j in range(n) if j != i]
        for size in range(n):
            share = math.factorial(size) * math.factorial(n - size - 1) / math.factorial(n)
            for chosen in itertools.combinations(others, size):
                values[i] += share * (utility((*chosen, i), cosines, match, k) - utility(chosen, cosines, match, k))
    return values


def game(n: int, seed: int, ties: bool = False):
    """Unit vectors in a plane, so that cosines are exact functions of one angle each."""
    rng = np.random.default_rng(seed)
    angles = rng.choice(4, n) if ties else rng.permutation(n) + rng.random(n) / 2
    x = torch.tensor(np.stack([np.cos(angles / 8), np.sin(angles / 8)], 1), dtype=torch.float32)
    return x, torch.tensor(rng.integers(2, size=n)), -angles


@pytest.mark.parametrize(("n", "k"), [(7, 3), (7, 7), (4, 6), (6, 1), (1, 2)])
@pytest.mark.parametrize("ties", [False, True])
def test_equals_the_definition(n, k, ties) -> None:
    x, y, nearness = game(n, n + k, ties)
    target = torch.tensor([[1.0, 0.0]])
    for label in (0, 1):
        match = (y == label).tolist()
        expected = shapley(nearness.tolist(), match, k)
        got = knn_shapley([(x, y)], target, torch.tensor([label]), k)
        np.testing.assert_allclose(got.numpy(), expected, atol=1e-12)
        whole = utility(range(n), nearness.tolist(), match, k)
        assert abs(float(got.sum()) - whole) < 1e-12  # efficiency


@pytest.mark.parametrize("ties", [False, True])
def test_euclidean_values_equal_the_definition(ties) -> None:
    """Of vectors of all lengths and around a far point, so that cosines say nothing."""
    rng = np.random.default_rng(ties)
    x = torch.tensor(rng.integers(-2, 3, (7, 2)) if ties else rng.standard_normal((7, 2))) + 100.0
    y, target = torch.tensor(rng.integers(2, size=7)), torch.full((1, 2), 100.0)
    squares = ((x - target) ** 2).sum(1).tolist()
    for blocks in ([(x, y)], [(x[:3], y[:3]), (x[3:], y[3:])]):
        got = knn_shapley(blocks, target, torch.tensor([1]), 3, metric="euclidean")
        np.testing.assert_allclose(got.numpy(), shapley([-s for s in squares], (y == 1).tolist(), 3), atol=1e-12)


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
def test_a_mean_over_targets_whatever_the_blocks(metric) -> None:
    data = noisy_digits(0.2, size=300)
    x, y, t, labels = data.x[:250], data.given[:250], data.x[250:262], data.true[250:262]
    whole = knn_shapley([(x, y)], t, labels, 5, metric=metric)
    pieces = knn_shapley(
        [(x[:7], y[:7].float()), (x[7:7], y[7:7]), (x[7:], y[7:].double())], t, labels, 5, metric=metric
    )
    np.testing.assert_allclose(pieces.numpy(), whole.numpy(), atol=1e-12)
    each = [knn_shapley([(x, y)], t[i : i + 1], labels[i : i + 1], 5, metric=metric) for i in range(len(t))]
    np.testing.assert_allclose(whole.numpy(), torch.stack(each).mean(0).numpy(), atol=1e-12)
    backwards = knn_shapley([(x.flip(0), y.flip(0))], t, labels, 5, metric=metric).flip(0)
    np.testing.assert_allclose(backwards.numpy(), whole.numpy(), atol=1e-12)


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
def test_beyond_the_exact_ranks_values_are_off_by_at_most_their_size(metric) -> None:
    data = noisy_digits(0.2)
    x, y, t, labels = data.x[:1500], data.given[:1500], data.x[1500:1515], data.true[1500:1515]
    exact = knn_shapley([(x, y)], t, labels, 5, exact=1500, metric=metric)
    coarse = knn_shapley([(x, y)], t, labels, 5, exact=20, bins=64, metric=metric)
    error = (exact - coarse).abs().max()
    assert 0 < error < 1 / 20
    assert abs(float(exact.sum() - coarse.sum())) < 1e-9  # the k nearest, all that utility sees, are held exactly
    for i in range(3):  # one target alone: the nearest 19 differ only by what is behind them
        pair = [
            knn_shapley([(x, y)], t[i : i + 1], labels[i : i + 1], 5, exact=e, bins=64, metric=metric)
            for e in (1500, 20)
        ]
        apart = -torch.nn.functional.cosine_similarity(x, t[i : i + 1])
        apart = torch.linalg.vector_norm(x - t[i], dim=1) if metric == "euclidean" else apart
        near = apart.argsort()[:19]
        np.testing.assert_allclose((pair[1] - pair[0])[near].numpy(), float((pair[1] - pair[0])[near[0]]), atol=1e-12)


def test_finds_wrong_labels() -> None:
    data = noisy_digits(0.2)
    values = knn_shapley([(data.x[:1200], data.given[:1200])], data.x[1200:1300], data.true[1200:1300], 5, bins=256)
    assert roc_auc_score(data.wrong[:1200], -values.numpy()) > 0.95


def test_rows_of_which_nothing_is_known_take_no_part(caplog: pytest.LogCaptureFixture) -> None:
    x, y, _ = game(6, 1)
    target, label = torch.tensor([[1.0, 0.0], [0.0, 0.0], [torch.nan, 1.0]]), torch.tensor([1, 1, 1])
    expected = knn_shapley([(x, y)], target[:1], label[:1], 2)
    more = torch.cat([x, torch.tensor([[0.0, 0.0], [torch.nan, 1], [torch.inf, 1], [1, 1]])])
    labels = torch.cat([y.float(), torch.tensor([1, 1, 1, torch.nan])])
    assert not caplog.text
    got = knn_shapley([(more, labels)], target, label, 2)
    assert "2 of 3 targets are left out: they have not a class and a direction" in caplog.text
    assert torch.equal(got[:6], expected)
    assert bool(got[6:].isnan().all())
    with pytest.raises(TypeError, match="such as a list, got an iterator"):
        knn_shapley(iter([(x, y)]), target, label, 2)
    with pytest.raises(ValueError, match="none of 2 targets has a class and a direction"):
        knn_shapley([(x, y)], target[1:], label[1:], 2)
    with pytest.raises(ValueError, match="no sample of the pool"):
        knn_shapley([(0 * x, y)], target, label, 2)
    with pytest.raises(ValueError, match=r"blocks: expected embeddings .* got \(6, 2\) and \(5,\)"):
        knn_shapley([(x, y[:5])], target, label, 2)
    ignored = torch.cat([y, torch.tensor([-100])])
    assert torch.equal(knn_shapley([(torch.cat([x, x[:1]]), ignored)], target, label, 2).isnan(), ignored == -100)
    euclidean = knn_shapley([(more, labels)], target, label, 2, metric="euclidean").isnan()
    assert euclidean.tolist() == [False] * 7 + [True] * 3  # 0 is an embedding as any other
    with pytest.raises(ValueError, match="none of 1 targets has a class and a finite embedding"):
        knn_shapley([(x, y)], target[2:], label[2:], 2, metric="euclidean")
    with pytest.raises(ValueError, match="knn_shapley: metric 'manhattan'; expected 'cosine' or 'euclidean'"):
        knn_shapley([(x, y)], target, label, 2, metric="manhattan")  # type: ignore[arg-type]
    for k in (0, 2.5, True):
        with pytest.raises(ValueError, match=f"k: expected a whole number of at least 1, got {k}"):
            knn_shapley([(x, y)], target, label, k)  # type: ignore[arg-type]
