"""Datamodel matching: exact where the datamodel is, and a distance between models that is one."""

from __future__ import annotations

import copy
import logging

import numpy as np
import pytest
import torch
from torch import nn

from assay.retrain import forget, klom, margins, outputs_without


def least_squares(x, y):
    return np.linalg.solve(x.T @ x, x.T @ y)


def leave_one_out(x, y, at):
    """(N, T, C): what each sample adds to a regression's predictions, f − f₋ᵢ = (x_tᵀ (XᵀX)⁻¹ x_i) r_i / (1 − h_i)."""
    inverse = np.linalg.inv(x.T @ x)
    residual = y - x @ least_squares(x, y)
    h = np.einsum("ni,ij,nj->n", x, inverse, x)
    return (at @ inverse @ x.T).T[:, :, None] * (residual / (1 - h)[:, None])[:, None, :]


def regression(n=40, d=5, c=3):
    rng = np.random.default_rng(0)
    return rng.normal(size=(n, d)), rng.normal(size=(n, c))


def test_one_removal_from_a_regression_is_exact() -> None:
    x, y = regression()
    effects, fitted = leave_one_out(x, y, x), x @ least_squares(x, y)
    for i in (0, 7, 39):
        rest = np.arange(40) != i
        expected = x @ least_squares(x[rest], y[rest])
        np.testing.assert_allclose(outputs_without(fitted, effects, [i]), expected, rtol=0, atol=1e-12)
        np.testing.assert_allclose(outputs_without(fitted, effects, ~rest), expected, rtol=0, atol=1e-12)


def test_matching_arrives_at_the_retrained_regression() -> None:
    x, y = regression()
    model = nn.Linear(5, 3, bias=False).double()
    model.weight.data = torch.tensor(least_squares(x, y).T)
    before, effects = copy.deepcopy(model.state_dict()), leave_one_out(x, y, x)
    found = forget(model, torch.tensor(x), effects, [7], steps=600, batch_size=40, learning_rate=0.01)
    rest = np.arange(40) != 7
    retrained = least_squares(x[rest], y[rest]).T
    moved = float(np.abs(before["weight"].numpy() - retrained).max())
    assert moved > 1e-2
    np.testing.assert_allclose(found.model.weight.detach().numpy(), retrained, atol=1e-3 * moved)
    assert torch.equal(model.weight, before["weight"])
    assert found.after < 1e-6 * found.before
    np.testing.assert_allclose(found.wanted, x @ retrained.T, atol=1e-12)
    ours = (found.before, found.after)
    theirs = [
        float(np.square(x @ w - found.wanted).sum(1).mean())
        for w in (before["weight"].numpy().T, found.model.weight.detach().numpy().T)
    ]
    assert ours == pytest.approx(theirs, rel=1e-9)


def test_outputs_of_ones_own_and_batches_follow_the_seed() -> None:
    x, y = regression(c=1)
    model = nn.Sequential(nn.Linear(5, 4), nn.Dropout(0.5), nn.Tanh(), nn.Linear(4, 1)).double().train()
    effects = leave_one_out(x, y, x)[:, :, 0]

    def squeezed(m, inputs):
        return m(inputs["x"])[:, 0]

    def run(seed):
        return forget(model, {"x": x}, effects, [1, 2], outputs=squeezed, steps=5, batch_size=8, seed=seed)

    first, again, other = run(0), run(0), run(1)
    state = first.model.state_dict()
    assert all(torch.equal(state[name], p) for name, p in again.model.state_dict().items())
    assert any(not torch.equal(state[name], p) for name, p in other.model.state_dict().items())
    assert first.model.training  # as it was found
    assert first.wanted.shape == (40,)


def test_a_tuning_that_does_not_help_is_warned_of(caplog) -> None:
    x, y = regression()
    model = nn.Linear(5, 3, bias=False).double()
    with caplog.at_level(logging.WARNING, "assay"):
        forget(model, torch.tensor(x), leave_one_out(x, y, x), [0], steps=1, learning_rate=50.0)
    assert "brought the outputs no nearer" in caplog.text


def test_margins_are_log_odds() -> None:
    logits, labels = torch.randn(4, 6, 3, dtype=torch.float64), torch.tensor([0, 1, 2, 0, 1, 2])
    p = logits.softmax(-1)[:, torch.arange(6), labels]
    torch.testing.assert_close(margins(logits, labels), (p / (1 - p)).log())
    with pytest.raises(ValueError, match=r"labels: expected integers 0\.\.2"):
        margins(logits, labels + 1)
    with pytest.raises(ValueError, match=r"got \(4, 6, 3\) and \(5,\)"):
        margins(logits, labels[:5])


def test_klom_by_hand() -> None:
    """Two bins: {0, 0, 1, 1} against {0, 1, 1, 1}, the largest value counted."""
    p, q, e = np.array([0.5, 0.5]), np.array([0.25, 0.75]), 1e-5
    p, q = (p + e) / (1 + 2 * e), (q + e) / (1 + 2 * e)
    expected = float((p * np.log(p / q)).sum())
    found = klom(np.array([[0.0], [0], [1], [1]]), np.array([[0.0], [1], [1], [1]]), bins=2)
    np.testing.assert_allclose(found, [expected], rtol=1e-12)


def test_klom_is_a_distance_in_the_order_that_it_says() -> None:
    rng = np.random.default_rng(0)
    oracles = rng.normal(size=(400, 3))
    near, far = rng.normal(size=(400, 3)), rng.normal(size=(400, 3)) + 2
    assert (klom(oracles, oracles) == 0).all()
    assert (klom(near, oracles) < 0.2).all()
    assert (klom(far, oracles) > 1).all()
    assert not np.allclose(klom(far[:, :1] * 0.1, oracles[:, :1]), klom(oracles[:, :1], far[:, :1] * 0.1), rtol=0.1)
    assert (klom(np.full((2, 1), 7.0), np.full((3, 1), 7.0)) == 0).all()  # no range at all


def test_klom_clips() -> None:
    wild = np.array([[np.inf], [-1e9]])
    np.testing.assert_array_equal(klom(wild, wild), [0])
    np.testing.assert_array_equal(klom(np.array([[1e9], [500.0]]), np.array([[101.0], [np.inf]])), [0])


def test_klom_of_a_range_of_fewer_numbers_than_bins() -> None:
    step = 1 + np.finfo(np.float64).eps
    found = klom(np.array([[step], [step]]), np.array([[1.0], [step]]), bins=20)
    rest = 18 * 1e-5
    p, q = (np.array([low, high]) + 1e-5 for low, high in ((0, 1), (0.5, 0.5)))
    total = 1 + 20 * 1e-5
    assert p.sum() + rest == pytest.approx(total)
    assert found == pytest.approx((p / total * np.log(p / q)).sum())


def test_margins_of_narrow_logits_are_as_good_as_wide_ones() -> None:
    logits, labels = (4 * torch.randn(50, 10)).bfloat16(), torch.arange(50) % 10
    torch.testing.assert_close(margins(logits, labels), margins(logits.float(), labels), rtol=0, atol=0)


def test_no_effect_is_no_reason_to_warn(caplog) -> None:
    with caplog.at_level(logging.WARNING, "assay"):
        found = forget(nn.Linear(2, 2), torch.randn(5, 2), np.zeros((5, 5, 2)), [1], steps=1)
    assert (found.before, found.after, caplog.text) == (0, 0, "")


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: outputs_without(np.zeros(4), np.zeros((5, 3)), [0]), r"effects: expected .* \(4,\).* got \(5, 3\)"),
        (lambda: outputs_without(np.zeros(4), np.zeros((5, 4)), [5]), r"removed: row 5 lies outside 0\.\.4"),
        (lambda: outputs_without(np.zeros(4), np.zeros((5, 4)), []), "removed: expected row numbers"),
        (lambda: outputs_without(np.zeros(4), np.zeros((5, 4)), [1, 1]), "removed: expected each row once"),
        (lambda: outputs_without(np.zeros(4), np.zeros((5, 4)), [0.5]), "removed: expected row numbers"),
        (lambda: outputs_without([np.nan, 0.0], np.zeros((5, 2)), [1]), "outputs: 1 of 2 are not finite"),
        (lambda: outputs_without(np.zeros(2), np.full((5, 2), np.nan), [3]), "effects: those of removed sample 3"),
        (lambda: outputs_without(np.zeros(2), np.ma.masked_all((5, 2)), [3]), "effects: those of removed sample 3"),
        (lambda: outputs_without(np.zeros(2), np.zeros((5, 2)), [[1], [1, 2]]), "removed: expected row numbers"),
        (lambda: klom(np.zeros((3, 2)), np.zeros((3, 1))), r"got \(3, 2\) and \(3, 1\)"),
        (lambda: klom(np.zeros((1, 2)), np.zeros((3, 2))), "of two models or more each"),
        (lambda: klom(np.full((3, 2), np.nan), np.zeros((3, 2))), "unlearned: 6 of 6 margins are NaN"),
        (lambda: klom(np.zeros((3, 2)), np.zeros((3, 2)), bins=1), "bins: expected an integer of at least 2"),
    ],
)
def test_what_is_refused(call, words) -> None:
    with pytest.raises(ValueError, match=words):
        call()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"steps": 0}, "steps: expected an integer of at least 1"),
        ({"learning_rate": np.nan}, "learning_rate: expected a finite number above 0"),
        ({"outputs": lambda m, x: m(x).sum()}, r"outputs: expected one row for each of 40 inputs, got \(\)"),
        ({"outputs": lambda m, x: m(x) * torch.nan}, "outputs: the model's are not finite"),
        ({"learning_rate": 1e300, "steps": 5}, "the tuning diverged at step 1"),
    ],
)
def test_a_tuning_that_cannot_be_is_refused(settings, words) -> None:
    x, y = regression()
    with pytest.raises(ValueError, match=words):
        forget(nn.Linear(5, 3).double(), torch.tensor(x), leave_one_out(x, y, x), [0], **settings)


def test_a_frozen_model_is_refused() -> None:
    x, y = regression()
    with pytest.raises(ValueError, match="nothing to tune"):
        forget(nn.Linear(5, 3).double().requires_grad_(False), torch.tensor(x), leave_one_out(x, y, x), [0])
