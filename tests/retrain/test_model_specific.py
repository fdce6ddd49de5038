"""Predicted drops in validation loss: what a regression's refit does, the more exactly the larger the set."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch import nn

from assay.methods.gauss_newton import GaussNewton
from assay.retrain import predicted_drops, subsample
from assay.retrain.model_specific import _solve, _validation_gradient
from assay.tasks import Classification, Regression

PENALTY = 3.0  # of the sum: it does not grow with the samples


def problem(samples: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(samples, 4))
    return x, x @ np.array([1.0, -2.0, 0.5, 0.0]) + rng.normal(size=samples)


def hessian(x: np.ndarray) -> np.ndarray:
    """Of Σ (w·x − y)² + PENALTY/2 ‖w‖²."""
    return 2 * x.T @ x + PENALTY * np.eye(x.shape[1])


def ridge(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.linalg.solve(hessian(x), 2 * x.T @ y)


def linear(w: np.ndarray) -> nn.Module:
    model = nn.Linear(len(w), 1, bias=False).double()
    model.weight.data = torch.tensor(w)[None]
    return model


def batch(x: np.ndarray, y: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.tensor(x), torch.tensor(y)[:, None]


def test_first_order_drops_approach_sherman_and_morrison() -> None:
    """Refits by the rank-one update of the inverse, on four times as many samples each time."""
    validation, candidates = problem(200, 1), problem(40, 2)
    errors = []
    for size in (20, 80, 320, 1280):
        x, y = problem(size)
        w, inverse = ridge(x, y), np.linalg.inv(hessian(x))

        def loss(w):
            return float(np.square(validation[0] @ w - validation[1]).mean())

        truth = []
        for z, target in zip(*candidates, strict=True):
            along = inverse @ z
            updated = inverse - 2 * np.outer(along, along) / (1 + 2 * z @ along)
            after = updated @ (2 * x.T @ y + 2 * target * z)
            truth.append(loss(w) - loss(after))
        drops, at, residual = predicted_drops(
            linear(w), Regression(), [batch(x, y)], [batch(*validation)], [batch(*candidates)], penalty=PENALTY / size
        )
        assert at == pytest.approx(loss(w), rel=1e-5)
        assert residual < 1e-5
        errors.append(np.abs(drops - truth).max() / np.abs(truth).max())
    assert all(later < earlier for earlier, later in itertools.pairwise(errors))
    assert errors[-1] < errors[0] / 10
    assert errors[-1] < 0.03


def test_drops_are_the_formula_in_any_batches() -> None:
    (x, y), validation, candidates = problem(30), problem(50, 1), problem(17, 2)
    w = ridge(x, y)
    gradient = 2 * validation[0].T @ (validation[0] @ w - validation[1]) / 50
    slopes = 2 * candidates[0] * (candidates[0] @ w - candidates[1])[:, None]
    expected = slopes @ np.linalg.solve(hessian(x) / 30, gradient) / 31

    def drops(pieces):
        return predicted_drops(
            linear(w),
            Regression(),
            *[
                [batch(a, b) for a, b in zip(*(np.array_split(c, pieces) for c in columns), strict=True)]
                for columns in ((x, y), validation, candidates)
            ],
            penalty=PENALTY / 30,
        )[0]

    np.testing.assert_allclose(drops(1), expected, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(drops(3), expected, rtol=1e-4, atol=1e-6)


def test_a_set_is_grown_by_the_best_and_by_random_ones() -> None:
    (x, y), validation = problem(120), problem(60, 1)
    y[::2] += np.random.default_rng(9).normal(size=60) * 30  # half of the pool is noise
    seen: list[np.ndarray] = []
    seeds: list[int] = []

    def train(rows, seed):
        seen.append(rows.copy())
        seeds.append(seed)
        rows[:] = 0  # a training may do what it likes
        return linear(ridge(x[seen[-1]], y[seen[-1]]))

    found = subsample(
        train, batch(x, y), batch(*validation), Regression(), 50, penalty=0.1, first=10, rounds=4, explore=0.0, seed=3
    )
    assert seeds == [3, 4, 5, 6]
    assert found.sizes.tolist() == [10, 20, 30, 40, 50]
    assert len(np.unique(found.rows)) == 50
    assert all((rows == found.rows[: len(rows)]).all() for rows in seen)
    np.testing.assert_array_equal(seen[0], np.random.default_rng(3).permutation(120)[:10])
    w = ridge(x[seen[0]], y[seen[0]])  # the first round's choice, by hand
    rest = np.setdiff1d(np.arange(120), seen[0])
    gradient = 2 * validation[0].T @ (validation[0] @ w - validation[1]) / 60
    inverse = np.linalg.inv(2 * x[seen[0]].T @ x[seen[0]] / 10 + 0.1 * np.eye(4))
    scores = 2 * x[rest] * (x[rest] @ w - y[rest])[:, None] @ inverse @ gradient / 11
    assert set(found.rows[10:20]) == set(rest[np.argsort(-scores)[:10]])
    # Ten together: each has one part in twenty of the new mean, not one in eleven.
    assert found.predicted[0] == pytest.approx(np.sort(scores)[-10:].sum() * 11 / 20, rel=1e-4)
    assert found.explored.tolist() == [0, 0, 0, 0]
    explored = subsample(
        train, batch(x, y), batch(*validation), Regression(), 50, penalty=0.1, first=10, rounds=4, explore=0.5, seed=3
    )
    assert 5 < explored.explored.sum() < 35
    assert len(np.unique(explored.rows)) == 50
    assert len(set(explored.rows[10:20]) & set(found.rows[10:20])) >= 10 - explored.explored[0]


def test_of_a_classifier_the_curvature_is_the_loss_own() -> None:
    """Logistic regression: Gauss–Newton is the Hessian, which autograd makes here."""
    torch.manual_seed(0)
    model = nn.Linear(3, 4).double()
    sets = [(torch.randn(n, 3, dtype=torch.float64), torch.randint(4, (n,))) for n in (25, 30, 8)]

    def mean_loss(theta, data):
        return nn.functional.cross_entropy(data[0] @ theta[:12].view(4, 3).T + theta[12:], data[1])

    theta = torch.cat([model.weight.flatten(), model.bias]).detach()
    curvature = torch.autograd.functional.hessian(lambda t: mean_loss(t, sets[0]), theta)
    gradient = torch.autograd.functional.jacobian(lambda t: mean_loss(t, sets[1]), theta)
    solved = torch.linalg.solve(curvature + 0.05 * torch.eye(16, dtype=torch.float64), gradient)
    losses = torch.autograd.functional.jacobian(
        lambda t: nn.functional.cross_entropy(sets[2][0] @ t[:12].view(4, 3).T + t[12:], sets[2][1], reduction="none"),
        theta,
    )
    expected = (losses @ solved / 26).numpy()
    found, _, _ = predicted_drops(model, Classification(), *([own] for own in sets), penalty=0.05)
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-6)


def test_what_many_should_bring_together_approaches_their_refit() -> None:
    """A tenth as many again each time: what is promised is first-order in the new samples' share of all."""
    validation, errors = problem(200, 1), []
    for size, added in ((400, 200), (400, 40), (400, 8)):
        x, y = problem(size + added)
        seen: list[np.ndarray] = []

        def train(rows, seed, x=x, y=y, seen=seen):
            seen.append(rows)
            return linear(ridge(x[rows], y[rows]))

        found = subsample(
            train,
            batch(x, y),
            batch(*validation),
            Regression(),
            size + added,
            penalty=PENALTY / size,
            first=size,
            rounds=1,
            explore=0.0,
        )

        def loss(w):
            return float(np.square(validation[0] @ w - validation[1]).mean())

        truth = loss(ridge(x[seen[0]], y[seen[0]])) - loss(ridge(x, y))
        errors.append(abs(found.predicted[0] - truth) / abs(truth))
    assert errors[2] < errors[1] < errors[0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_residual_is_the_real_one(dtype) -> None:
    """A curvature that is nearly singular, in numbers so narrow that the iteration's own residual goes on falling."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).to(dtype)
    sets = [(torch.randn(n, 4).to(dtype), torch.randint(3, (n,))) for n in (30, 30)]
    names = [name for name, _ in model.named_parameters()]
    gradient, _ = _validation_gradient(model, Classification(), [sets[1]], names)
    curvature = GaussNewton(model, Classification(), names, [sets[0]])
    solved, residual = _solve(curvature, gradient, 1e-4, 60)
    (product,) = curvature([solved])
    left = [gradient[name].double() - product[name].double() - 1e-4 * solved[name].double() for name in names]
    length = torch.cat([gradient[name].double().flatten() for name in names]).norm()
    assert residual == pytest.approx(float(torch.cat([p.flatten() for p in left]).norm() / length), rel=1e-2)
    assert {v.dtype for v in solved.values()} == {torch.float32}


def test_samples_without_a_loss_are_not_counted(caplog) -> None:
    (x, y), validation, candidates = problem(30), [batch(*problem(50, 1))], [batch(*problem(17, 2))]
    model = linear(ridge(x, y))

    def drops(*chosen):
        return predicted_drops(model, Regression(), chosen, validation, candidates, penalty=0.1)[0]

    plain = drops(batch(x, y))
    np.testing.assert_allclose(drops(batch(x, y), batch(x, y * np.nan)), plain, rtol=1e-9)
    assert not caplog.text
    np.testing.assert_allclose(drops(batch(x, y), batch(x * np.inf, y)), plain, rtol=1e-9)
    assert "the curvature of 30 chosen samples is not finite" in caplog.text


def test_what_is_no_model_and_no_samples_are_refused() -> None:
    (one,) = [batch(*problem(5))]
    with pytest.raises(TypeError, match=r"expected a trained torch\.nn\.Module, got NoneType"):
        subsample(lambda rows, seed: None, one, one, Regression(), 5, penalty=1.0, rounds=1)  # type: ignore[arg-type]
    model = linear(np.ones(4))
    for name, chosen, candidates in (("chosen", [], [one]), ("candidates", [one], [])):
        with pytest.raises(ValueError, match=f"{name}: expected batches"):
            predicted_drops(model, Regression(), chosen, [one], candidates, penalty=1.0)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"size": 121}, "expected first < size ≤ N"),
        ({"first": 50}, "expected first < size ≤ N"),
        ({"rounds": 41}, "a sample per round at least"),
        ({"explore": 1.5}, "explore: expected a number from 0 to 1, got 1.5"),
        ({"penalty": 0.0}, "penalty: expected a finite number above 0, got 0.0"),
        ({"data": (np.zeros((3, 4)), np.zeros((2, 1)))}, r"data: expected columns of one length, .* got \[3, 2\]"),
        ({"validation": (np.full((2, 4), np.inf), np.zeros((2, 1)))}, "validation: the loss .* is not finite"),
        ({"validation": (np.full((2, 4), np.nan), np.zeros((2, 1)))}, "validation: expected samples with a loss"),
        ({"batch_size": 0}, "batch_size: expected an integer of at least 1"),
    ],
)
def test_what_is_refused(settings, words) -> None:
    given = {"data": batch(*problem(120)), "validation": batch(*problem(60)), "size": 50, "penalty": 1.0, "first": 10}
    with pytest.raises(ValueError, match=words):
        subsample(lambda rows, seed: linear(np.ones(4)), task=Regression(), **(given | settings))
