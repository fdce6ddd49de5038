"""Code lengths against the mixture of all sequences of readouts, and what they find."""

from __future__ import annotations

import itertools
import json
import math

import numpy as np
import pytest
import torch
from sklearn.dummy import DummyClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.naive_bayes import GaussianNB

from assay.retrain import SwitchingCode, readout_switching
from tests.methods.data import noisy_digits


def logs(rows: int, readouts: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(rows, readouts, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).log()


@pytest.mark.parametrize("switches", [1.0, 1.3, 2.0, 4.0])
def test_equals_the_mixture_of_all_sequences_of_readouts(switches) -> None:
    rows, readouts = 6, 3
    p = logs(rows, readouts).exp().numpy()
    whole = 0.0
    for sequence in itertools.product(range(readouts), repeat=rows):
        chance = 1 / readouts
        for t in range(1, rows):
            share = min(1.0, (switches - 1) / t)
            chance *= share / readouts + (1 - share) * (sequence[t] == sequence[t - 1])
        whole += chance * np.prod([p[t, k] for t, k in enumerate(sequence)])
    lengths = SwitchingCode(readouts, switches).code(torch.tensor(p).log())
    assert float(lengths.sum()) == pytest.approx(-math.log(whole), rel=1e-12)


def test_one_readout_is_its_prequential_loss_and_equal_ones_are_one() -> None:
    own = logs(50, 1)
    np.testing.assert_allclose(SwitchingCode(1).code(own).numpy(), -own[:, 0].numpy(), rtol=1e-12)
    np.testing.assert_allclose(SwitchingCode(3).code(own.expand(-1, 3)).numpy(), -own[:, 0].numpy(), rtol=1e-12)


def test_batches_and_a_saved_state_give_the_same_bits_and_another_order_does_not() -> None:
    rows = logs(40, 3)
    expected = SwitchingCode(3).code(rows)
    code, parts = SwitchingCode(3), []
    for part in rows.split(7):
        parts.append(code.code(part))
        code = SwitchingCode.resume(json.loads(json.dumps(code.state())))
    assert torch.equal(torch.cat(parts), expected)
    assert code.seen == 40
    assert not torch.allclose(SwitchingCode(3).code(rows.flip(0)).flip(0), expected)


def test_it_follows_the_readout_that_is_better_now() -> None:
    """The small one first, the large one later: switching costs less than either, and than the plain mixture."""
    rows = torch.cat([torch.tensor([[0.8, 0.1]]).expand(100, 2), torch.tensor([[0.3, 0.9]]).expand(100, 2)]).double()
    whole = float(SwitchingCode(2).code(rows.log()).sum())
    plain = float(SwitchingCode(2, 1).code(rows.log()).sum())
    assert whole < plain - 20
    assert whole < -float(rows.log().sum(0).max()) - 20
    assert whole > -float(rows.log().amax(1).sum())


def test_without_switches_it_is_the_bayesian_mixture_however_long_a_readout_was_bad() -> None:
    early, late = torch.tensor([[0.99, 1e-5]]).double(), torch.tensor([[1e-5, 0.99]]).double()
    rows = torch.cat([early.expand(100, 2), late.expand(200, 2)]).log()  # a weight of 1e-500 in between
    exact = -float(torch.logsumexp(rows.sum(0) - math.log(2), 0))
    code = SwitchingCode(2, 1)
    first = code.code(rows[:150])
    code = SwitchingCode.resume(json.loads(json.dumps(code.state(), allow_nan=False)))
    assert float(first.sum() + code.code(rows[150:]).sum()) == pytest.approx(exact, rel=1e-9)
    never = SwitchingCode(2, 1)
    assert float(never.code(torch.tensor([[0.0, -math.inf], [-2000.0, -1.0]]).double())[1]) == pytest.approx(2000)
    again = SwitchingCode.resume(json.loads(json.dumps(never.state(), allow_nan=False)))
    np.testing.assert_array_equal(again.weights, [1, 0])


def test_rows_of_which_nothing_is_known_teach_nothing() -> None:
    rows = logs(10, 2)
    odd = torch.cat([rows[:4], torch.tensor([[math.nan, -1.0]]).double(), rows[4:]])
    lengths = SwitchingCode(2).code(odd)
    assert lengths[4].isnan()
    assert torch.equal(lengths[[*range(4), *range(5, 11)]], SwitchingCode(2).code(rows))
    half = torch.tensor([[-math.inf, -1.0]]).double()
    assert float(SwitchingCode(2).code(half)) == pytest.approx(1 + math.log(2))
    code = SwitchingCode(2)
    with pytest.raises(ValueError, match="row 4: every readout gives it probability 0; smooth them"):
        code.code(torch.cat([rows[:4], torch.full((1, 2), -math.inf).double()]))
    assert torch.equal(code.code(rows), SwitchingCode(2).code(rows))  # none of those four counted
    with pytest.raises(ValueError, match=r"expected shape \(T, 2\), got \(3, 1\)"):
        SwitchingCode(2).code(torch.zeros(3, 1))
    with pytest.raises(ValueError, match=r"expected at most 0, got 0\.5"):
        SwitchingCode(1).code(torch.tensor([[0.5]]))
    with pytest.raises(ValueError, match="readouts: expected at least 1, got 0"):
        SwitchingCode(0)
    with pytest.raises(ValueError, match=r"switches: expected a finite number of at least 1, got 0\.5"):
        SwitchingCode(2, 0.5)


def test_wrong_labels_cost_more_and_worse_features_cost_more() -> None:
    data = noisy_digits(0.2, size=500)
    members = [GaussianNB(var_smoothing=0.1), LogisticRegression(C=0.05, max_iter=200)]
    x, y = data.x.numpy(), data.given.numpy()
    found = readout_switching(members, x, y, orders=2, first=40, growth=2)
    assert roc_auc_score(data.wrong, found.lengths.numpy()) > 0.9
    assert float(found.lengths.sum()) == pytest.approx(float(found.totals.mean()))
    assert (found.totals <= found.readouts.min(1).values + 30).all()  # little more than the better readout
    assert found.readouts.shape == found.weights.shape == (2, 2)
    noise = readout_switching(members, np.random.default_rng(0).normal(size=x.shape), y, orders=1, first=40, growth=2)
    assert noise.totals[0] > found.totals.max() + 100
    again = readout_switching(members, x, y, orders=2, first=40, growth=2)
    assert torch.equal(again.lengths, found.lengths)


def test_what_the_first_rows_cost_is_known() -> None:
    """A readout of frequencies: everything can be written down."""
    y = np.array([0, 1, 2, 0, 0, 1])
    found = readout_switching([DummyClassifier(strategy="prior")], np.zeros((6, 1)), y, first=3, growth=2, orders=1)
    order = np.random.default_rng(0).permutation(6)
    counts = np.bincount(y[order[:3]], minlength=3)
    p = counts / 3 if (counts > 0).sum() > 1 else np.full(3, 1 / 3)
    smoothed = (3 * p + 1) / 6 if (counts > 0).sum() > 1 else p
    expected = np.r_[np.full(3, math.log(3)), -np.log(smoothed[y[order[3:]]])]
    np.testing.assert_allclose(found.lengths.numpy()[order], expected, rtol=1e-5)
    once = readout_switching([DummyClassifier()], np.zeros((6, 1)), y, first=3, growth=1e308, orders=1)
    assert torch.equal(once.lengths, found.lengths)  # one block for all that is left


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"y": [0, 0, 0]}, "y: expected at least two classes, got 1"),
        ({"y": [0, 1]}, r"y: expected one label per sample, shape \(3,\)"),
        ({"first": 0}, "expected first and orders of at least 1, got 0 and 4"),
        ({"first": 1.5}, "expected first and orders of at least 1, got 1.5 and 4"),
        ({"batch_size": 0}, "batch_size: expected at least 1, got 0"),
        ({"growth": 1}, "growth: expected a finite number above 1, got 1"),
        (
            {"members": [[GaussianNB()]]},
            r"members\[0\]: expected a scikit-learn classifier, a function fit\(x, y\); got",
        ),
    ],
)
def test_what_is_refused(change, message) -> None:
    given = {"members": [GaussianNB()], "x": np.zeros((3, 1)), "y": [0, 1, 1]} | change
    with pytest.raises((TypeError, ValueError), match=message):
        readout_switching(**given)
