"""Clusters' worth: matched gradients are matched, and effects are those of real trainings where samples are real."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from sklearn.datasets import load_digits
from torch import nn

from assay.retrain import cluster_effects, clusters_by_class, distil
from assay.retrain.gradient_matching import Distilled


def small_digits(samples: int = 300) -> tuple[torch.Tensor, torch.Tensor]:
    x, y = load_digits(n_class=5, return_X_y=True)
    order = np.random.default_rng(0).permutation(len(x))[:samples]
    return torch.tensor(x[order] / 16, dtype=torch.float32), torch.tensor(y[order])


def descended(model, x, y, steps, rate=0.5, kept=None):
    """States of plain gradient descent on the mean loss, by step."""
    model, states = copy.deepcopy(model), []
    rows = torch.arange(len(x)) if kept is None else kept
    for _ in range(steps + 1):
        states.append({name: p.detach().clone() for name, p in model.named_parameters()})
        loss = nn.functional.cross_entropy(model(x[rows]), y[rows])
        for p, slope in zip(model.parameters(), torch.autograd.grad(loss, list(model.parameters())), strict=True):
            p.data -= rate * slope
    return states


def test_clusters_lie_within_classes() -> None:
    x, y = small_digits()
    found = clusters_by_class(x, y, per_class=3)
    assert sorted(set(found.tolist())) == list(range(15))
    assert all(len(set(y[torch.tensor(found == k)].tolist())) == 1 for k in range(15))
    np.testing.assert_array_equal(found, clusters_by_class(x, y, per_class=3))
    assert clusters_by_class(np.eye(3), [0, 0, 1], per_class=2).max() == 2


def test_a_cluster_of_one_is_its_sample_and_effects_are_of_real_trainings() -> None:
    """Nothing is approximated then: every gradient matches at the start, and runs are trainings without a sample."""
    x, y = small_digits(12)
    model = nn.Linear(64, 5)
    states = descended(model, x, y, 6)
    found = distil(model, states[::3], x, y, np.arange(12), sweeps=1, learning_rate=1e-9)
    assert found.before < 1e-10
    torch.testing.assert_close(found.inputs, x)
    assert found.labels.tolist() == y.tolist()
    target = small_digits(40)
    effects = cluster_effects(model, states[0], found, target, steps=6, learning_rate=0.5)
    for k in (0, 7):
        ends = [
            descended(model, x, y, 6, kept=kept)[-1] for kept in (None, torch.tensor([i for i in range(12) if i != k]))
        ]
        losses = [
            nn.functional.cross_entropy(torch.func.functional_call(model, end, target[0]), target[1], reduction="none")
            for end in ends
        ]
        np.testing.assert_allclose(effects[k], (losses[1] - losses[0]).numpy(), rtol=0, atol=2e-5)


def test_what_is_frozen_is_held_and_modes_are_eval() -> None:
    """Effects of a model with a frozen layer and dropout, in training mode, are of trainings of the other layer."""
    torch.manual_seed(0)
    x, y = torch.randn(6, 2), torch.tensor([0, 0, 1, 1, 0, 1])
    model = nn.Sequential(nn.Linear(2, 3), nn.Dropout(0.5), nn.Linear(3, 2))
    model[0].requires_grad_(False)
    state = {name: p.detach().clone() for name, p in model.named_parameters()}
    found = distil(model, [state], x, y, np.arange(6), sweeps=1, learning_rate=1e-9)
    assert found.before < 1e-10
    effects = cluster_effects(model, state, found, (x, y), steps=20, learning_rate=0.5)
    assert model[1].training
    assert [p.requires_grad for p in model.parameters()] == [False, False, True, True]
    hidden = model[0](x)
    ends = [descended(model[2], hidden, y, 20, kept=torch.tensor(kept))[-1] for kept in (range(6), range(1, 6))]
    losses = [
        nn.functional.cross_entropy(torch.func.functional_call(model[2], end, hidden), y, reduction="none")
        for end in ends
    ]
    np.testing.assert_allclose(effects[0], (losses[1] - losses[0]).detach().numpy(), rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="nothing to train"):
        distil(model.requires_grad_(False), [state], x, y, np.arange(6))


def test_matching_brings_gradients_together() -> None:
    x, y = small_digits()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 16), nn.Tanh(), nn.Linear(16, 5))
    states = descended(model, x, y, 40)[::20]
    clusters = clusters_by_class(x, y, per_class=2)
    found = distil(model, states, x, y, clusters, sweeps=10, learning_rate=0.02)
    assert found.after < 0.5 * found.before
    assert found.sizes.tolist() == np.bincount(clusters).tolist()


def test_dropping_a_cluster_ranks_as_training_without_it_does() -> None:
    x, y = small_digits()
    torch.manual_seed(0)
    model, target = nn.Linear(64, 5), small_digits(450)
    target = (target[0][300:], target[1][300:])
    clusters = clusters_by_class(x, y, per_class=3)
    states = descended(model, x, y, 60)
    distilled = distil(model, states[::20], x, y, clusters, sweeps=5)
    effects = cluster_effects(model, states[0], distilled, target, steps=60, learning_rate=0.5)

    def losses(end):
        logits = torch.func.functional_call(model, end, target[0])
        return nn.functional.cross_entropy(logits, target[1], reduction="none").numpy()

    whole = losses(states[-1])
    kept = [torch.tensor(np.flatnonzero(clusters != k)) for k in range(15)]
    truth = np.stack([losses(descended(model, x, y, 60, kept=rows)[-1]) - whole for rows in kept])
    ranks = [spearmanr(a, b).statistic for a, b in zip(effects.T, truth.T, strict=True)]
    shuffled = np.random.default_rng(0).permutation(15)
    chance = [spearmanr(a, b).statistic for a, b in zip(effects[shuffled].T, truth.T, strict=True)]
    assert np.mean(ranks) > 0.8
    assert abs(np.mean(chance)) < 0.4


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"states": []}, "states: expected the parameters"),
        ({"states": [{"weight": torch.zeros(5, 64)}]}, r"states\[0\]: expected parameter 'bias' \(5,\), found none"),
        ({"clusters": np.zeros(12, int)}, "cluster 0 has samples of several classes"),
        ({"clusters": np.arange(12) + 1}, r"clusters: expected numbers 0\.\.K−1 with samples in each"),
        ({"clusters": np.arange(11)}, r"integer clusters \(N,\)"),
        ({"labels": small_digits(12)[1].where(torch.arange(12) != 3, -100)}, "labels: expected class numbers"),
        ({"inputs": torch.zeros(12, 64, dtype=torch.int64)}, "the inputs floating"),
        ({"inputs": torch.full((12, 64), torch.nan)}, "the squared length nan"),
    ],
)
def test_what_is_refused(settings, words) -> None:
    x, y = small_digits(12)
    model = nn.Linear(64, 5)
    given = {"inputs": x, "labels": y, "states": [dict(model.named_parameters())], "clusters": np.arange(12)}
    with pytest.raises(ValueError, match=words):
        distil(model, **(given | settings))


def test_a_run_that_diverges_is_refused() -> None:
    x, y = small_digits(4)
    model = nn.Linear(64, 5)
    distilled = Distilled(x * torch.inf, y, torch.ones(4, dtype=torch.int64), 0.0, 0.0)
    state = dict(model.named_parameters())
    with pytest.raises(ValueError, match="a run diverged"):
        cluster_effects(model, state, distilled, (x, y), steps=2)
    with pytest.raises(ValueError, match="the matching diverged"):
        distil(model, [state], x, y, np.arange(4), learning_rate=1e25)
    with pytest.raises(ValueError, match="expected two clusters at least"):
        cluster_effects(model, state, distil(model, [state], x[:1], y[:1], [0], sweeps=1), (x, y))
    with pytest.raises(ValueError, match="targets: expected class numbers from 0 on, got -100"):
        cluster_effects(model, state, distil(model, [state], x, y, range(4), sweeps=1), (x, y.where(y != y[0], -100)))
    with pytest.raises(ValueError, match="got nan in row 1"):
        clusters_by_class(x[:2], [0.0, np.nan])


def test_a_layer_with_two_names_keeps_its_parameters() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(3, 3)
    model = nn.Sequential(layer, nn.Tanh(), layer)
    before, state = list(model.parameters()), dict(model.named_parameters())
    x, y = torch.randn(6, 3), torch.arange(6) % 3
    cluster_effects(model, state, distil(model, [state], x, y, y.numpy(), sweeps=1), (x, y), steps=2)
    assert list(map(id, model.parameters())) == list(map(id, before))
